"""OpenVLA-OFT's action written out from the published description: plain tensors, no class of ours, one prompt.

After Kim et al. 2024 (arXiv:2406.09246), Kim et al. 2025 (arXiv:2502.19645) and what their code does: the language
model sees [first token, patches of every image, state, rest of the prompt, zeros for chunk × dimension numbers, stop
token] with no mask at all, and the head reads the hidden states one position before those of the numbers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    depth: int
    vision_heads: int
    patch: int
    layers: int
    heads: int
    blocks: int
    chunk: int
    dimension: int
    stop: int = 2


def action(weights: Weights, sizes: Sizes, ids: list[int], images: list[Tensor], state: Tensor | None) -> Tensor:
    """Normalised [chunk, dimension]; ``images`` are [6, h, w] each, ``state`` is [state dimension]."""
    table = weights["language_model.model.embed_tokens.weight"]
    rows = [table[ids[0]]]
    for image in images:
        both = [
            tower(weights, "vision_backbone.featurizer.", image[:3], sizes),
            tower(weights, "vision_backbone.fused_featurizer.", image[3:], sizes),
        ]
        rows += list(projector(weights, torch.cat(both, dim=1)))
    if state is not None:
        rows.append(linear(weights, "proprio_projector.fc2", gelu(linear(weights, "proprio_projector.fc1", state))))
    rows += [table[token] for token in ids[1:]]
    first = len(rows) - 1
    rows += [torch.zeros_like(table[0])] * (sizes.chunk * sizes.dimension)
    rows.append(table[sizes.stop])
    hidden = language(weights, torch.stack(rows), sizes)
    chunk = []
    for step in range(sizes.chunk):
        begin = first + step * sizes.dimension
        chunk.append(head(weights, hidden[begin : begin + sizes.dimension].reshape(-1), sizes))
    return torch.stack(chunk)


def head(weights: Weights, x: Tensor, sizes: Sizes) -> Tensor:
    where = "action_head.model."
    x = torch.clamp(linear(weights, f"{where}fc1", layer_norm(weights, f"{where}layer_norm1", x, 1e-5)), min=0.0)
    for block in range(sizes.blocks):
        inner = f"{where}mlp_resnet_blocks.{block}.ffn."
        x = x + torch.clamp(linear(weights, f"{inner}1", layer_norm(weights, f"{inner}0", x, 1e-5)), min=0.0)
    return linear(weights, f"{where}fc2", layer_norm(weights, f"{where}layer_norm2", x, 1e-5))


def projector(weights: Weights, x: Tensor) -> Tensor:
    x = gelu(linear(weights, "projector.fc1", x))
    x = gelu(linear(weights, "projector.fc2", x))
    return linear(weights, "projector.fc3", x)


def tower(weights: Weights, where: str, image: Tensor, sizes: Sizes) -> Tensor:
    """Patches after the second-to-last block."""
    filters = weights[f"{where}patch_embed.proj.weight"]
    rows = []
    for top in range(0, image.shape[1], sizes.patch):
        for left in range(0, image.shape[2], sizes.patch):
            piece = image[:, top : top + sizes.patch, left : left + sizes.patch]
            rows.append((filters * piece).sum(dim=(1, 2, 3)) + weights[f"{where}patch_embed.proj.bias"])
    x = torch.stack(rows) + weights[f"{where}pos_embed"][0]
    extra = [weights[f"{where}{name}"][0] for name in ("cls_token", "reg_token") if f"{where}{name}" in weights]
    x = torch.cat([*extra, x])
    for index in range(sizes.depth - 1):
        block = f"{where}blocks.{index}."
        qkv = linear(weights, f"{block}attn.qkv", layer_norm(weights, f"{block}norm1", x, 1e-6))
        q, k, v = qkv.chunk(3, dim=1)
        mixed = attention(q, k, v, sizes.vision_heads)
        x = x + scaled(weights, f"{block}ls1", linear(weights, f"{block}attn.proj", mixed))
        inner = gelu(linear(weights, f"{block}mlp.fc1", layer_norm(weights, f"{block}norm2", x, 1e-6)))
        x = x + scaled(weights, f"{block}ls2", linear(weights, f"{block}mlp.fc2", inner))
    return x[len(x) - len(rows) :]


def language(weights: Weights, x: Tensor, sizes: Sizes) -> Tensor:
    """Llama without a mask."""
    for index in range(sizes.layers):
        block = f"language_model.model.layers.{index}."
        normed = rms_norm(weights, f"{block}input_layernorm", x)
        q, k, v = (linear(weights, f"{block}self_attn.{name}_proj", normed) for name in "qkv")
        mixed = attention(rotated(q, sizes.heads), rotated(k, sizes.heads), v, sizes.heads)
        x = x + linear(weights, f"{block}self_attn.o_proj", mixed)
        normed = rms_norm(weights, f"{block}post_attention_layernorm", x)
        gate, up = (linear(weights, f"{block}mlp.{name}_proj", normed) for name in ("gate", "up"))
        x = x + linear(weights, f"{block}mlp.down_proj", gate * torch.sigmoid(gate) * up)
    return rms_norm(weights, "language_model.model.norm", x)


def rotated(x: Tensor, heads: int) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) with Llama's pairs: value j with value j + half."""
    width = x.shape[1] // heads
    out = torch.empty_like(x)
    for position in range(len(x)):
        for j in range(width // 2):
            angle = position * 10000.0 ** (-2.0 * j / width)
            for start in range(0, x.shape[1], width):
                a, b = x[position, start + j], x[position, start + j + width // 2]
                out[position, start + j] = a * math.cos(angle) - b * math.sin(angle)
                out[position, start + j + width // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[t, width] each; every row sees every row."""
    parts = []
    for a, b, c in zip(q.chunk(heads, dim=1), k.chunk(heads, dim=1), v.chunk(heads, dim=1), strict=True):
        parts.append(torch.softmax(a @ b.T / math.sqrt(a.shape[1]), dim=1) @ c)
    return torch.cat(parts, dim=1)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    unit = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]


def scaled(weights: Weights, name: str, x: Tensor) -> Tensor:
    factor = weights.get(f"{name}.scale_factor")
    return x if factor is None else x * factor


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
