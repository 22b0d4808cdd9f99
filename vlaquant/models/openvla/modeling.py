"""OpenVLA for current transformers: towers → projector → language model → action tokens.

Structure after Kim et al. 2024 (arXiv:2406.09246); parameter names are those of published checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.models.openvla.actions import ActionTokens, action_statistics, normalize, state_statistics, unnormalize
from vlaquant.models.openvla.configuration import OpenVLAConfig
from vlaquant.models.openvla.decoding import CompiledStep, decode, hidden_states, is_plain
from vlaquant.models.openvla.processing import ImageLike, PrismaticProcessor, PromptCache
from vlaquant.models.openvla.regression import ActionHead, ProprioProjector, sees_everything
from vlaquant.models.openvla.vision import LayerScale, Projector, VisionBackbone, VisionTower

IGNORED_LABEL = -100


@dataclass
class OpenVLAOutput(ModelOutput):
    """Result of a forward pass; ``logits`` [b, patches + t, vocabulary] cover the image's positions too.

    ``projector_features`` [b, patches, width] are None when the image came from the cache.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    projector_features: Tensor | None = None


class OpenVLAForActionPrediction(PreTrainedModel, GenerationMixin):
    """The policy. Set ``processor`` (``vlaquant.load`` does) to call :meth:`predict_action`."""

    config_class = OpenVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]  # noqa: RUF012  a list by transformers' convention

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        towers = config.towers
        self.vision_backbone = VisionBackbone(towers, config.image_sizes, config.num_images_in_input)
        self.projector = Projector(self.vision_backbone.width, config.text_config.hidden_size, fused=len(towers) == 2)
        # Built by class and not by `from_config`, which would let text_config's own dtype win over the caller's.
        language_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
        self.language_model = language_class(config.text_config)
        self.action_head: ActionHead | None = None
        self.proprio_projector: ProprioProjector | None = None
        self.add_heads_()
        self.action_tokens = ActionTokens(config.n_action_bins, config.action_vocab_size)
        self.processor: PrismaticProcessor | None = None
        self._compiled_step: CompiledStep | None = None
        self._prompts = PromptCache()
        self.post_init()  # type: ignore[no-untyped-call]

    def add_heads_(self) -> None:
        """The modules of OpenVLA-OFT, with new weights, where the configuration has them and the model has not."""
        config, width = self.config, self.config.text_config.hidden_size
        if config.action_decoding == "regression" and self.action_head is None:
            self.action_head = ActionHead(width, config.action_dim, config.action_head_blocks)
        if config.proprio_dim and self.proprio_projector is None:
            self.proprio_projector = ProprioProjector(config.proprio_dim, width)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LayerScale):
            nn.init.constant_(module.scale_factor, module.initial)
        elif isinstance(module, VisionTower):
            for token in (module.pos_embed, module.cls_token, module.reg_token):
                if token is not None:
                    nn.init.normal_(token, std=0.02)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    @property
    def image_tokens(self) -> int:
        """Positions that the images take, between the first text token and the rest."""
        return self.vision_backbone.images * int(self.vision_backbone.featurizer.pos_embed.shape[1])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> OpenVLAOutput:
        """One pass, with the image while the cache is empty and without it afterwards.

        Args:
            input_ids: [b, t].
            attention_mask: [b, t], or [b, cached text + t] with a cache; 1 for real tokens.
            pixel_values: [b, images · (3 or 6), h, w].
            labels: [b, t]; token ids to predict, −100 elsewhere. The loss is the mean cross-entropy: of the next token
                when decoding is autoregressive, of the same position when it is parallel.
            past_key_values: cache of earlier calls.

        Raises:
            CheckpointError: the first call has no image.
        """
        assert input_ids is not None
        features = None
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            if pixel_values is None:
                raise CheckpointError("OpenVLA needs pixel_values; a prompt without an image has no action")
            features = self.projector(self.vision_backbone(pixel_values))
        embeddings = self._embed(input_ids, features)
        output = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=_with_image(attention_mask, self.image_tokens, 1),
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = self._loss(output.logits, _with_image(labels, self.image_tokens, IGNORED_LABEL))
        return OpenVLAOutput(
            loss=loss, logits=output.logits, past_key_values=output.past_key_values, projector_features=features
        )

    def _embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Text [b, t] and, after its first token, the features of the images -> [b, t (+ patches), width]."""
        text: Tensor = self.get_input_embeddings()(input_ids)
        if features is None:
            return text
        return torch.cat([text[:, :1], features.to(text.dtype), text[:, 1:]], dim=1)

    def _loss(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if self.config.action_decoding == "autoregressive":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL)

    def prepare_inputs_for_generation(  # type: ignore[override]  # its parameters differ between 5.x versions
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step of ``generate`` feeds: everything first, then the last token beside a filled cache.

        Raises:
            CalibrationError: padded prompts.
        """
        filled = past_key_values is not None and past_key_values.get_seq_length() > 0
        if not filled and attention_mask is not None and not bool(attention_mask.all()):
            raise CalibrationError(
                "generate() got padded prompts, and the image and the next token would land at wrong positions; "
                "call it once for each prompt, or batch prompts of one length"
            )
        return {
            "input_ids": input_ids[:, -1:] if filled else input_ids,
            "attention_mask": attention_mask,
            "pixel_values": None if filled else pixel_values,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
        }

    def regress(self, input_ids: Tensor, pixel_values: Tensor, proprio: Tensor | None = None) -> Tensor:
        """Normalised actions [b, chunk, action dimension] from one pass in which every token sees every other.

        The sequence is: first token, patches, state, rest of the prompt, one empty position for each number of the
        chunk, stop token. Each number is read one position before its own, as a language model's next token is.

        Args:
            input_ids: [b, t], prompts of one length.
            pixel_values: [b, images · (3 or 6), h, w].
            proprio: [b, state dimension], normalised; only for policies with a state.

        Raises:
            CheckpointError: the policy has no action head, or a state is missing or not wanted.
        """
        if self.action_head is None:
            raise CheckpointError(f"action_decoding={self.config.action_decoding!r}: this policy has no action head")
        if (proprio is None) != (self.proprio_projector is None):
            wanted = "needs the robot's state" if proprio is None else "takes no state of the robot"
            raise CheckpointError(f"this policy {wanted} (proprio_dim={self.config.proprio_dim} in config.json)")
        seen = self.projector(self.vision_backbone(pixel_values))
        if self.proprio_projector is not None:
            seen = torch.cat([seen, self.proprio_projector(proprio)], dim=1)
        stop = input_ids.new_full((input_ids.shape[0], 1), self.config.stop_token_id)
        text = self.get_input_embeddings()(torch.cat([input_ids, stop], dim=1))
        count = self.config.action_chunk * self.config.action_dim
        empty = text.new_zeros(text.shape[0], count, text.shape[2])
        embeddings = torch.cat([text[:, :1], seen.to(text.dtype), text[:, 1:-1], empty, text[:, -1:]], dim=1)
        hidden = hidden_states(self.language_model, embeddings, sees_everything(embeddings))
        actions: Tensor = self.action_head(hidden[:, -count - 2 : -2])
        return actions

    @torch.inference_mode()
    def predict_tokens(self, input_ids: Tensor, pixel_values: Tensor, *, count: int) -> Tensor:
        """The ``count`` action tokens for one prompt and image each [1, t], [1, c, h, w]; greedy. Returns [count].

        Parallel decoding reads them from one pass over the query tokens, one token each.

        Raises:
            CheckpointError: parallel decoding with another number of query tokens, or a policy without action tokens.
        """
        if self.config.action_decoding == "regression":
            raise CheckpointError("this policy's actions come from a head and not from tokens; call predict_action")
        if self.config.action_decoding == "parallel":
            queries = torch.tensor([self.config.action_query_token_ids], device=input_ids.device)
            if queries.shape[1] != count:
                raise CheckpointError(
                    f"config.json lists {queries.shape[1]} `action_query_token_ids` but the action has {count} tokens "
                    f"(action_chunk={self.config.action_chunk} × dimension); check them and the norm_stats"
                )
            input_ids = torch.cat([input_ids, queries], dim=1)
        embeddings = self._embed(input_ids, self.projector(self.vision_backbone(pixel_values)))
        if self.config.action_decoding == "autoregressive":
            return decode(self.language_model, embeddings, count, self._compiled_step)
        logits: Tensor = self.language_model.lm_head(hidden_states(self.language_model, embeddings)[:, -count:])
        return logits[0].argmax(dim=-1)

    def compile_decoding_(self, backend: str = "inductor") -> None:
        """Compile the step that makes one token from the last, at the next action: minutes once, then faster.

        On a GPU the default backend replays CUDA graphs. Logits differ from those of the plain step by their rounding,
        as attention then covers a cache of fixed length and a backend may round less often.

        Args:
            backend: of ``torch.compile``; ``inductor`` needs a compiler.

        Raises:
            CheckpointError: a policy whose tokens do not follow one another.
        """
        if self.config.action_decoding != "autoregressive":
            raise CheckpointError(
                f"action_decoding={self.config.action_decoding!r}: this policy has no step to compile"
            )
        if not is_plain(self.language_model):
            raise CheckpointError("only the steps of a Llama with sdpa attention, without hooks, can be compiled")
        self._compiled_step = CompiledStep(backend)

    def encode(self, images: ImageLike | Sequence[ImageLike], instruction: str) -> tuple[Tensor, Tensor]:
        """``input_ids`` [1, t], ended by the empty token as in training, and ``pixel_values``, on the model's device.

        Raises:
            CheckpointError: the model has no processor, or wants another number of images.
        """
        if self.processor is None:
            raise CheckpointError("this model has no processor: use vlaquant.load(directory), or set model.processor")
        seen = list(images) if isinstance(images, list | tuple) else [images]
        if len(seen) != self.config.num_images_in_input:
            raise CheckpointError(
                f"{len(seen)} images for a policy with {self.config.num_images_in_input} cameras "
                "(num_images_in_input in config.json); give one of each, in the order of its training"
            )
        tokens = self._prompts.tokens(self.processor.tokenizer, instruction)
        if tokens[-1] != self.config.empty_token_id:
            tokens = [*tokens, self.config.empty_token_id]
        pixels = self.processor.image_processor.preprocess(seen)["pixel_values"]
        device = self.device
        return torch.tensor([tokens], device=device), pixels.flatten(0, 1).unsqueeze(0).to(device)

    def encode_state(self, state: NDArray[np.float64] | None, unnorm_key: str | None = None) -> Tensor | None:
        """The robot's state, normalised [1, state dimension]; None for policies that take none.

        Raises:
            CheckpointError: it is missing or of another length, or there are no statistics of it.
        """
        dimension = self.config.proprio_dim
        if dimension == 0:
            return None
        if state is None or np.shape(state) != (dimension,):
            got = "none" if state is None else f"shape {list(np.shape(state))}"
            raise CheckpointError(f"this policy needs the robot's state as {dimension} numbers, got {got}")
        stats = state_statistics(self.config.norm_stats, unnorm_key, bounds=self.config.action_normalization)
        normalized = normalize(np.asarray(state, dtype=np.float64), stats)
        return torch.from_numpy(normalized).to(device=self.device, dtype=torch.float32).unsqueeze(0)

    def predict_action(
        self,
        image: ImageLike | Sequence[ImageLike],
        instruction: str,
        unnorm_key: str | None = None,
        state: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """The action for what the cameras see and an instruction, in the units of dataset ``unnorm_key``.

        Args:
            image: one, or one of each camera.
            instruction: in words.
            unnorm_key: dataset whose statistics apply; None where the checkpoint knows only one.
            state: of the robot, [state dimension], for policies that take it.

        Returns:
            [action dimension], or [chunk, action dimension] when the checkpoint predicts chunks.

        Raises:
            CheckpointError: no processor, no statistics of that name, or images or a state that do not fit.
        """
        stats = action_statistics(self.config.norm_stats, unnorm_key, bounds=self.config.action_normalization)
        input_ids, pixel_values = self.encode(image, instruction)
        normalized = self.normalized_action(
            input_ids, pixel_values, self.encode_state(state, unnorm_key), dimension=len(stats["low"])
        )
        actions = unnormalize(normalized, stats)
        return actions if self.config.action_chunk > 1 else actions[0]

    @torch.inference_mode()
    def normalized_action(
        self, input_ids: Tensor, pixel_values: Tensor, proprio: Tensor | None = None, *, dimension: int
    ) -> NDArray[np.float64]:
        """The action [chunk, ``dimension``] for one prompt before it gets its units, however this policy decodes.

        Raises:
            CheckpointError: the head makes actions of another dimension.
        """
        if self.action_head is None:
            tokens = self.predict_tokens(input_ids, pixel_values, count=dimension * self.config.action_chunk)
            return self.action_tokens.decode(tokens.cpu().numpy()).reshape(-1, dimension)
        if dimension != self.config.action_dim:
            raise CheckpointError(
                f"the statistics are of actions with {dimension} numbers, and the action head makes "
                f"{self.config.action_dim}; check dataset_statistics.json and the unnorm_key"
            )
        actions = self.regress(input_ids, pixel_values, proprio)[0]
        return np.asarray(actions.double().cpu().numpy())

    @torch.inference_mode()
    def check_sight(self, input_ids: Tensor, pixel_values: Tensor, proprio: Tensor | None = None) -> float:
        """Least change of what decides the action when one of the images is exchanged for its negative.

        Raises:
            CalibrationError: it is zero, so the policy is blind and calibrating it would be meaningless; or it is NaN.
        """
        seen = self._decision(input_ids, pixel_values, proprio)
        changes = []
        for camera in range(self.vision_backbone.images):
            negative = pixel_values.clone().unflatten(1, (self.vision_backbone.images, -1))
            negative[:, camera] *= -1.0
            changes.append(float((seen - self._decision(input_ids, negative.flatten(1, 2), proprio)).abs().max()))
            if math.isnan(changes[-1]):
                raise CalibrationError("the model's outputs are NaN: check the weights and the dtype")
            if changes[-1] == 0.0:
                which = f" of camera {camera + 1}" if self.vision_backbone.images > 1 else ""
                raise CalibrationError(
                    f"two different images{which} give the same outputs: the image does not reach the action. "
                    "Check that the vision weights were loaded and that the checkpoint matches its config.json"
                )
        return min(changes)

    def _decision(self, input_ids: Tensor, pixel_values: Tensor, proprio: Tensor | None) -> Tensor:
        """Float: the chunk of a head, or the logits of the first action token."""
        if self.action_head is not None:
            return self.regress(input_ids, pixel_values, proprio).float()
        logits: Tensor = self(input_ids, pixel_values=pixel_values, use_cache=False).logits
        return logits[:, -1].float()


def _with_image(text: Tensor | None, patches: int, value: int) -> Tensor | None:
    """[b, t] -> [b, t + patches]: ``value`` at the image's positions, which follow the first text token."""
    if text is None:
        return None
    image = text.new_full((text.shape[0], patches), value)
    return torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
