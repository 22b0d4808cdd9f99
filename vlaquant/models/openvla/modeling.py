"""OpenVLA for current transformers: towers → projector → language model → action tokens.

Structure after Kim et al. 2024 (arXiv:2406.09246); parameter names are those of published checkpoints.
"""

import math
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
from vlaquant.models.openvla.actions import ActionTokens, action_statistics, unnormalize
from vlaquant.models.openvla.configuration import OpenVLAConfig
from vlaquant.models.openvla.processing import ImageLike, PrismaticProcessor, prompt
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
        self.vision_backbone = VisionBackbone(towers, config.image_sizes)
        self.projector = Projector(self.vision_backbone.width, config.text_config.hidden_size, fused=len(towers) == 2)
        # Built by class and not by `from_config`, which would let text_config's own dtype win over the caller's.
        language_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
        self.language_model = language_class(config.text_config)
        self.action_tokens = ActionTokens(config.n_action_bins, config.action_vocab_size)
        self.processor: PrismaticProcessor | None = None
        self.post_init()  # type: ignore[no-untyped-call]

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
        """Positions that the image takes, between the first text token and the rest."""
        return int(self.vision_backbone.featurizer.pos_embed.shape[1])

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
            pixel_values: [b, 3 or 6, h, w].
            labels: [b, t]; token ids to predict, −100 elsewhere. The loss is the mean cross-entropy: of the next token
                when decoding is autoregressive, of the same position when it is parallel.
            past_key_values: cache of earlier calls.

        Raises:
            CheckpointError: the first call has no image.
        """
        assert input_ids is not None
        features = None
        embeddings = self.get_input_embeddings()(input_ids)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            if pixel_values is None:
                raise CheckpointError("OpenVLA needs pixel_values; a prompt without an image has no action")
            features = self.projector(self.vision_backbone(pixel_values))
            embeddings = torch.cat([embeddings[:, :1], features.to(embeddings.dtype), embeddings[:, 1:]], dim=1)
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

    @torch.inference_mode()
    def predict_tokens(self, input_ids: Tensor, pixel_values: Tensor, *, count: int) -> Tensor:
        """The ``count`` action tokens for one prompt and image each [1, t], [1, c, h, w]; greedy. Returns [count].

        Parallel decoding reads them from one pass over the query tokens, one token each.

        Raises:
            CheckpointError: parallel decoding with another number of query tokens.
        """
        if self.config.action_decoding == "parallel":
            queries = torch.tensor([self.config.action_query_token_ids], device=input_ids.device)
            if queries.shape[1] != count:
                raise CheckpointError(
                    f"config.json lists {queries.shape[1]} `action_query_token_ids` but the action has {count} tokens "
                    f"(action_chunk={self.config.action_chunk} × dimension); check them and the norm_stats"
                )
            logits: Tensor = self(torch.cat([input_ids, queries], 1), pixel_values=pixel_values, use_cache=False).logits
            return logits[0, -count:].argmax(dim=-1)
        tokens: list[Tensor] = []
        step = self(input_ids, pixel_values=pixel_values, use_cache=True)
        for _ in range(count):
            tokens.append(step.logits[:, -1:].argmax(dim=-1))  # [1, 1]
            if len(tokens) < count:
                step = self(tokens[-1], past_key_values=step.past_key_values, use_cache=True)
        return torch.cat(tokens, dim=1)[0]

    def encode(self, image: ImageLike, instruction: str) -> tuple[Tensor, Tensor]:
        """``input_ids`` [1, t], ended by the empty token as in training, and ``pixel_values``, on the model's device.

        Raises:
            CheckpointError: the model has no processor.
        """
        if self.processor is None:
            raise CheckpointError("this model has no processor: use vlaquant.load(directory), or set model.processor")
        batch = self.processor(prompt(instruction), image)
        input_ids = batch["input_ids"]
        if int(input_ids[0, -1]) != self.config.empty_token_id:
            input_ids = torch.cat([input_ids, torch.tensor([[self.config.empty_token_id]])], dim=1)
        return input_ids.to(self.device), batch["pixel_values"].to(self.device)

    def predict_action(self, image: ImageLike, instruction: str, unnorm_key: str | None = None) -> NDArray[np.float64]:
        """The action for a camera image and an instruction, in the units of dataset ``unnorm_key``.

        Returns:
            [action dimension], or [chunk, action dimension] when the checkpoint predicts chunks.

        Raises:
            CheckpointError: no processor, or no statistics of that name.
        """
        stats = action_statistics(self.config.norm_stats, unnorm_key)
        dimension = len(stats["q01"])
        input_ids, pixel_values = self.encode(image, instruction)
        tokens = self.predict_tokens(input_ids, pixel_values, count=dimension * self.config.action_chunk)
        actions = unnormalize(self.action_tokens.decode(tokens.cpu().numpy()).reshape(-1, dimension), stats)
        return actions if self.config.action_chunk > 1 else actions[0]

    @torch.inference_mode()
    def check_sight(self, input_ids: Tensor, pixel_values: Tensor) -> float:
        """Largest change of a logit between the given image and its negative.

        Raises:
            CalibrationError: it is zero, so the policy is blind and calibrating it would be meaningless; or it is NaN.
        """
        seen = self(input_ids, pixel_values=pixel_values, use_cache=False).logits[:, -1].float()
        negative = self(input_ids, pixel_values=-pixel_values, use_cache=False).logits[:, -1].float()
        change = float((seen - negative).abs().max())
        if math.isnan(change):
            raise CalibrationError("the logits are NaN: check the weights and the dtype")
        if change == 0.0:
            raise CalibrationError(
                "two different images give the same logits: the image does not reach the action. "
                "Check that the vision weights were loaded and that the checkpoint matches its config.json"
            )
        return change


def _with_image(text: Tensor | None, patches: int, value: int) -> Tensor | None:
    """[b, t] -> [b, t + patches]: ``value`` at the image's positions, which follow the first text token."""
    if text is None:
        return None
    image = text.new_full((text.shape[0], patches), value)
    return torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
