"""A look-alike of SmolVLA: every layer is unrolled, and odd expert layers attend to the language's keys and values."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel, SmolVLMConfig, SmolVLMForConditionalGeneration

from lerobot.policies.flow import STATE, FlowModel, FlowPolicy, attended, embedded_time, padded, rotated

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
WIDTH, EXPERT_WIDTH, LAYERS = 96, 72, 4


class VLMWithExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        text = {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "pad_token_id": 0,
        }
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = SmolVLMConfig(
            scale_factor=2,
            image_token_id=511,
            text_config=text,
            vision_config=vision | {"image_size": 64, "patch_size": 16},
        )
        self.config = config
        self.vlm = SmolVLMForConditionalGeneration(config)
        expert = LlamaConfig(**(text | {"hidden_size": EXPERT_WIDTH, "intermediate_size": 160}))
        self.lm_expert = LlamaModel(expert)
        for layer in self.lm_expert.layers[1::2]:
            layer.self_attn.k_proj = nn.Linear(KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, bias=False)
            layer.self_attn.v_proj = nn.Linear(KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.lm_expert.embed_tokens = None
        self.num_vlm_layers = self.num_expert_layers = LAYERS

    def forward(
        self, states: list[Tensor | None], allowed: Tensor, positions: Tensor, cache: Any, *, fill: bool
    ) -> Any:
        models = [self.vlm.model.text_model, self.lm_expert]
        for index in range(LAYERS):
            layers = [model.layers[index] for model in models]
            attend = self.crossing if index % 2 and not fill else self.side_by_side
            attention, cache = attend(layers, states, (allowed, positions), cache, index, fill)
            states = [_rest(layer, x, out) for layer, x, out in zip(layers, states, attention, strict=True)]
        return [None if x is None else model.norm(x) for x, model in zip(states, models, strict=True)], cache

    def side_by_side(
        self, layers: Any, states: Any, places: tuple[Tensor, Tensor], cache: Any, index: int, fill: Any
    ) -> Any:
        allowed, positions = places
        normed = [layer.input_layernorm(x) for layer, x in zip(layers, states, strict=True) if x is not None]
        here = [layer.self_attn for layer, x in zip(layers, states, strict=True) if x is not None]
        normed = [x.to(attention.q_proj.weight.dtype) for x, attention in zip(normed, here, strict=True)]
        q, k, v = (
            torch.cat([_heads(getattr(attention, name)(x)) for x, attention in zip(normed, here, strict=True)], dim=1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotated(q, positions), rotated(k, positions)
        if fill:
            cache = cache | {index: (k, v)}
        elif cache is not None:
            k, v = torch.cat([cache[index][0], k], dim=1), torch.cat([cache[index][1], v], dim=1)
        out = attended(q, k, v, allowed)
        lengths = [0 if x is None else x.shape[1] for x in states]
        return out.split(lengths, dim=1), cache

    def crossing(
        self, layers: Any, states: Any, places: tuple[Tensor, Tensor], cache: Any, index: int, fill: Any
    ) -> Any:
        allowed, positions = places
        outputs = [None, None]
        if states[0] is not None:
            attention, length = layers[0].self_attn, states[0].shape[1]
            x = layers[0].input_layernorm(states[0]).to(attention.q_proj.weight.dtype)
            q, k, v = (_heads(proj(x)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = rotated(q, positions[:, :length]), rotated(k, positions[:, :length])
            outputs[0] = attended(q, k, v, allowed[:, :length, :length])
            positions = positions[:, length:]
        else:
            k, v = cache[index]
        attention = layers[1].self_attn
        x = layers[1].input_layernorm(states[1]).to(attention.q_proj.weight.dtype)
        q = rotated(_heads(attention.q_proj(x)), positions - positions.min(dim=1, keepdim=True).values)
        k = _heads(attention.k_proj(k.to(attention.k_proj.weight.dtype).flatten(2)))
        v = _heads(attention.v_proj(v.to(attention.v_proj.weight.dtype).flatten(2)))
        outputs[1] = attended(q, k, v, allowed[:, -q.shape[1] :, : k.shape[1]])
        return outputs, cache


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM))


def _rest(layer: Any, x: Tensor | None, attention: Any) -> Tensor | None:
    if x is None:
        return None
    if attention.dtype != layer.self_attn.o_proj.weight.dtype:
        attention = attention.to(layer.self_attn.o_proj.weight.dtype)
    # Added in place, which keeps the dtype of the layer whatever that of x is
    out: Tensor = layer.self_attn.o_proj(attention)
    out += x
    after = out.clone()
    out = layer.mlp(layer.post_attention_layernorm(out))
    out += after
    return out


class SmolVLAModel(FlowModel):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.vlm_with_expert = VLMWithExpert()
        self.state_proj = nn.Linear(config.max_state_dim, WIDTH)
        self.action_in_proj = nn.Linear(config.max_action_dim, EXPERT_WIDTH)
        self.action_out_proj = nn.Linear(EXPERT_WIDTH, config.max_action_dim)
        self.action_time_mlp_in = nn.Linear(2 * EXPERT_WIDTH, EXPERT_WIDTH)
        self.action_time_mlp_out = nn.Linear(EXPERT_WIDTH, EXPERT_WIDTH)

    def embed_prefix(self, images: Any, seen: Any, tokens: Tensor, real: Tensor, state: Any) -> Any:
        backbone = self.vlm_with_expert.vlm.model
        parts, reals = [], []
        for image, camera in zip(images, seen, strict=True):
            vision = backbone.vision_model(pixel_values=image.to(backbone.vision_model.dtype)).last_hidden_state
            parts.append(backbone.connector(vision) * math.sqrt(WIDTH))
            reals.append(camera[:, None].expand(-1, parts[-1].shape[1]))
        parts.append(backbone.text_model.get_input_embeddings()(tokens) * math.sqrt(WIDTH))
        parts.append(self.state_proj(state[0])[:, None])
        reals += [real, torch.ones(len(real), 1, dtype=torch.bool)]
        mask = torch.cat(reals, dim=1)
        steps = torch.zeros_like(mask, dtype=torch.int64)
        steps[:, -1] = 1
        return torch.cat(parts, dim=1), mask, steps

    def embed_suffix(self, noisy: Tensor, time: Tensor, state: Any) -> Any:
        action = self.action_in_proj(noisy)
        when = embedded_time(time, EXPERT_WIDTH).to(action.dtype)[:, None].expand_as(action)
        x = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([action, when], dim=2))))
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        return x, real, real.long(), None

    def both(self, states: Any, allowed: Tensor, positions: Tensor, cache: Any, condition: Any, *, fill: bool) -> Any:
        return self.vlm_with_expert.forward(states, allowed, positions, cache, fill=fill)


class SmolVLAPolicy(FlowPolicy):
    name = "smolvla"
    side = 64

    def __init__(self, config: Any) -> None:
        super().__init__(config, SmolVLAModel(config))

    def prepare_state(self, batch: dict[str, Tensor]) -> Tensor:
        return padded(batch[STATE], self.config.max_state_dim)
