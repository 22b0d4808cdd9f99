"""A small transformer with every place into which a scale can be folded, and the folds that hold there."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.families.folds import Fold

WIDTH, HEADS, KV, HEAD_DIM = 32, 4, 2, 8
BLOCK = r"blocks\.\d+"


class GemmaNorm(nn.Module):
    """x̂·(1 + w)."""

    offset = 1.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (self.offset + self.weight)


class LlamaNorm(GemmaNorm):
    """x̂·w."""

    offset = 0.0


class Attention(nn.Module):
    """``heads`` of queries, ``kv`` of values; ``leak`` reads the input without a Linear."""

    def __init__(self, width: int, heads: int, kv: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv, self.head_dim = heads, kv, head_dim
        self.q_proj = nn.Linear(width, heads * head_dim)
        self.k_proj, self.v_proj = (nn.Linear(width, kv * head_dim) for _ in range(2))
        self.o_proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (each.repeat_interleave(self.heads // self.kv, dim=1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Gemma norm, grouped-query attention with a LayerScale, adaptive norm, gated MLP, LayerNorm, plain MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = GemmaNorm(WIDTH)
        self.attn = Attention(WIDTH, HEADS, KV, HEAD_DIM)
        self.gamma = nn.Parameter(0.5 + torch.rand(WIDTH))
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.norm3 = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm3.weight, 1.0, 0.3)
        nn.init.normal_(self.norm3.bias)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attn(self.norm1(x))
        scale, shift, gate = self.modulation(F.silu(x.mean(dim=1, keepdim=True))).chunk(3, dim=-1)
        y = F.layer_norm(x, x.shape[-1:]) * (1.0 + scale) + shift
        x = x + (1.0 + gate) * self.down(F.silu(self.gate(y)) * self.up(y))
        return x + self.fc2(F.gelu(self.fc1(self.norm3(x))))


class Leaking(Block):
    """The residual stream begins at the norm's output, as in models that norm afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        return x + 0.01 * self.attn(x)


class Remembering(Block):
    """Leaves its values for the next block, as a cache that an action expert attends to."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:  # type: ignore[override]
        values = self.attn.v_proj(self.norm1(x))
        y = super().forward(x)
        if cache:
            y = y + F.pad(cache[-1], (0, WIDTH - KV * HEAD_DIM))
        cache.append(values)
        return y


class Model(nn.Module):
    blocks: Any

    def __init__(self, block: type[Block] = Block, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        cache: list[Tensor] = []
        for block in self.blocks:
            x = block(x, cache) if isinstance(block, Remembering) else block(x)
        return self.head(x)


NORM = Fold(BLOCK, "{block}.norm1", tuple(f"{{block}}.attn.{name}_proj" for name in "qkv"))
VALUES = Fold(BLOCK, "{block}.attn.v_proj", ("{block}.attn.o_proj",), head_dim="{block}.attn.head_dim")
LAYER_SCALE = Fold(BLOCK, "{block}.attn.o_proj", gamma="{block}.gamma")
ADAPTIVE = Fold(BLOCK, "{block}.modulation", ("{block}.gate", "{block}.up"), chunks=("scale", "shift", "gate"))
GATED = Fold(BLOCK, "{block}.up", ("{block}.down",))
LAYER_NORM = Fold(BLOCK, "{block}.norm3", ("{block}.fc1",))
FOLDS = (NORM, VALUES, LAYER_SCALE, ADAPTIVE, GATED, LAYER_NORM)


def model(block: type[Block] = Block, dtype: torch.dtype = torch.float32, depth: int = 2) -> Model:
    """The same each time; some of the channels that each norm gives are much larger than others."""
    torch.manual_seed(0)
    made = Model(block, depth)
    for each in made.blocks:
        for weight in (each.norm1.weight, each.norm3.weight):
            weight.data[::7] += 5.0
        each.modulation.weight.data[:WIDTH:5] *= 4.0
        each.attn.v_proj.weight.data[::5] *= 4.0
        each.up.weight.data[::5] *= 4.0
    return made.to(dtype).eval()


def samples(count: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 24 + index, WIDTH, generator=generator).to(dtype) for index in range(count)]
