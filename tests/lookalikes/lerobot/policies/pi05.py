"""A look-alike of π0.5: two Gemmas layer by layer side by side, the smaller with norms that the time modulates."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from lerobot.policies.flow import FlowModel, FlowPolicy, attended, embedded_time, rotated

WIDTH, EXPERT_WIDTH, HEADS, HEAD_DIM, LAYERS = 64, 48, 4, 16, 3


class PiGemmaRMSNorm(nn.Module):
    """Gives the normed input and a gate, which is None without a condition."""

    def __init__(self, width: int, condition: int | None) -> None:
        super().__init__()
        if condition is None:
            self.weight = nn.Parameter(torch.zeros(width))
            self.dense = None
        else:
            self.dense = nn.Linear(condition, 3 * width)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        normed = x * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + 1e-6)
        if cond is None or self.dense is None:
            return (normed * (1 + self.weight.float())).type_as(x), None
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, dim=-1)
        return (normed * (1 + scale.float()) + shift.float()).type_as(x), gate.type_as(x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        self.q_proj = nn.Linear(width, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(width, HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(width, HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, width, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x).unflatten(-1, (-1, HEAD_DIM)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 128, bias=False)
        self.up_proj = nn.Linear(width, 128, bias=False)
        self.down_proj = nn.Linear(128, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, condition: int | None) -> None:
        super().__init__()
        self.self_attn = Attention(width)
        self.mlp = MLP(width)
        self.input_layernorm = PiGemmaRMSNorm(width, condition)
        self.post_attention_layernorm = PiGemmaRMSNorm(width, condition)

    def after(self, x: Tensor, attention: Tensor, gate: Tensor | None, cond: Tensor | None) -> Tensor:
        if attention.dtype != self.self_attn.o_proj.weight.dtype:
            attention = attention.to(self.self_attn.o_proj.weight.dtype)
        out = self.self_attn.o_proj(attention)
        x = x + (out if gate is None else out * gate)
        out, gate = self.post_attention_layernorm(x, cond)
        if self.mlp.up_proj.weight.dtype == torch.bfloat16:
            out = out.to(torch.bfloat16)
        out = self.mlp(out)
        return x + (out if gate is None else out * gate)

    def forward(
        self, x: Tensor, allowed: Tensor, positions: Tensor, cond: Tensor | None, cache: Any, fill: Any
    ) -> Tensor:
        normed, gate = self.input_layernorm(x, cond)
        q, k, v = self.self_attn.heads(normed)
        q, k = rotated(q, positions), rotated(k, positions)
        if fill is not None:
            fill.append((k, v))
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        return self.after(x, attended(q, k, v, allowed), gate, cond)


class Decoder(nn.Module):
    def __init__(self, width: int, condition: int | None, *, words: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(512, width) if words else None
        self.layers = nn.ModuleList(Layer(width, condition) for _ in range(LAYERS))
        self.norm = PiGemmaRMSNorm(width, condition)

    def forward(self, x: Tensor, allowed: Tensor, positions: Tensor, cond: Any, cache: Any, fill: Any) -> Tensor:
        if self.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
            x = x.to(torch.bfloat16)
        for index, layer in enumerate(self.layers):
            x = layer(x, allowed, positions, cond, None if cache is None else cache[index], fill)
        return self.norm(x, cond)[0]


class PaliGemmaWithExpert(nn.Module):
    def __init__(self, precision: str) -> None:
        super().__init__()
        tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": HEADS}
        config = PaliGemmaConfig(
            vision_config=tower
            | {"image_size": 28, "patch_size": 14, "projection_dim": WIDTH, "vision_use_head": False},
            text_config=text | {"num_key_value_heads": 1, "head_dim": HEAD_DIM, "vocab_size": 512},
            projection_dim=WIDTH,
            image_token_id=511,
        )
        self.paligemma = PaliGemmaForConditionalGeneration(config)
        # A head of its own, as LeRobot's classes come to have one
        self.paligemma.lm_head = nn.Linear(WIDTH, 512, bias=False)
        self.paligemma.model.language_model = Decoder(WIDTH, None, words=True)
        self.gemma_expert = nn.Module()
        self.gemma_expert.lm_head = nn.Linear(EXPERT_WIDTH, 512, bias=False)
        self.gemma_expert.model = Decoder(EXPERT_WIDTH, EXPERT_WIDTH, words=False)
        if precision == "bfloat16":
            self.to(torch.bfloat16)
            for name, parameter in self.named_parameters():
                if any(part in name for part in ("vision_tower", "multi_modal_projector", "layernorm", "model.norm")):
                    parameter.data = parameter.data.float()

    def forward(self, states: Any, allowed: Tensor, positions: Tensor, cache: Any, cond: Any, *, fill: bool) -> Any:
        language, expert = self.paligemma.model.language_model, self.gemma_expert.model
        if states[1] is None:
            filled: list[Any] = []
            return [language.forward(states[0], allowed, positions, None, None, filled), None], filled
        if states[0] is None:
            return [None, expert.forward(states[1], allowed, positions, cond, cache, None)], cache
        for pair in zip(language.layers, expert.layers, strict=True):
            states = self.joint(pair, states, allowed, positions, cond)
        return [language.norm(states[0])[0], expert.norm(states[1], cond)[0]], None

    def joint(self, pair: Any, states: Any, allowed: Tensor, positions: Tensor, cond: Tensor) -> list[Tensor]:
        normed = [layer.input_layernorm(x, c) for layer, x, c in zip(pair, states, (None, cond), strict=True)]
        heads = [layer.self_attn.heads(x) for layer, (x, _) in zip(pair, normed, strict=True)]
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*heads, strict=True))
        out = attended(rotated(q, positions), rotated(k, positions), v, allowed)
        outs = out.split([x.shape[1] for x in states], dim=1)
        gates = [gate for _, gate in normed]
        return [
            layer.after(x, one, gate, c)
            for layer, x, one, gate, c in zip(pair, states, outs, gates, (None, cond), strict=True)
        ]


class PI05Model(FlowModel):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.paligemma_with_expert = PaliGemmaWithExpert(config.dtype)
        self.action_in_proj = nn.Linear(config.max_action_dim, EXPERT_WIDTH)
        self.action_out_proj = nn.Linear(EXPERT_WIDTH, config.max_action_dim)
        self.time_mlp_in = nn.Linear(EXPERT_WIDTH, EXPERT_WIDTH)
        self.time_mlp_out = nn.Linear(EXPERT_WIDTH, EXPERT_WIDTH)

    def embed_prefix(self, images: Any, seen: Any, tokens: Tensor, real: Tensor, state: Any) -> Any:
        backbone = self.paligemma_with_expert.paligemma.model
        parts = [backbone.multi_modal_projector(backbone.vision_tower(x).last_hidden_state) for x in images]
        reals = [camera[:, None].expand(-1, part.shape[1]) for camera, part in zip(seen, parts, strict=True)]
        parts.append(backbone.language_model.embed_tokens(tokens) * WIDTH**0.5)
        mask = torch.cat([*reals, real], dim=1)
        wanted = backbone.language_model.layers[0].self_attn.q_proj.weight.dtype
        return torch.cat(parts, dim=1).to(wanted), mask, torch.zeros_like(mask, dtype=torch.int64)

    def embed_suffix(self, noisy: Tensor, time: Tensor, state: Any) -> Any:
        when = self.time_mlp_in(embedded_time(time, EXPERT_WIDTH).to(time.dtype))
        x = self.action_in_proj(noisy)
        layer = self.paligemma_with_expert.gemma_expert.model.layers[0]
        condition = F.silu(self.time_mlp_out(F.silu(when))).to(layer.input_layernorm.dense.weight.dtype)
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        steps = real.long()
        steps[:, 1:] = 0
        return x.to(layer.self_attn.q_proj.weight.dtype), real, steps, condition

    def both(self, states: Any, allowed: Tensor, positions: Tensor, cache: Any, condition: Any, *, fill: bool) -> Any:
        return self.paligemma_with_expert.forward(states, allowed, positions, cache, condition, fill=fill)


class PI05Policy(FlowPolicy):
    name = "pi05"
    side = 28

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__(config, PI05Model(config))
