"""The two vision towers of OpenVLA, with timm's parameter names and without timm.

Features are the output of the second-to-last block, before the final norm, patches only; so the last block, ``norm``
and the pooling head hold weights that never reach an action. They exist because checkpoints contain them.
"""

from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.errors import CheckpointError
from vlaquant.models.openvla.configuration import TowerConfig

_LAYER_NORM_EPS = 1e-6


class QuickGELU(nn.Module):
    """x · σ(1.702 x), OpenAI CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, unchanged."""
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.scale_factor = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width], unchanged shape."""
        return x * self.scale_factor


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, width] -> [b, t, width]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [b, h, t, d]
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = _ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, tower: TowerConfig) -> None:
        super().__init__()
        scale = tower.layer_scale
        self.norm1 = nn.LayerNorm(tower.width, eps=_LAYER_NORM_EPS)
        self.attn = Attention(tower.width, tower.heads)
        self.ls1 = nn.Identity() if scale is None else LayerScale(tower.width, scale)
        self.norm2 = nn.LayerNorm(tower.width, eps=_LAYER_NORM_EPS)
        self.mlp = Mlp(tower.width, tower.mlp, tower.activation)
        self.ls2 = nn.Identity() if scale is None else LayerScale(tower.width, scale)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, width] -> [b, t, width]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [b, 3, h, w] -> [b, n, width]."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """Rows of patches one after the other."""
        out: Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return out


class AttentionPool(nn.Module):
    """Holds the weights of SigLIP's pooling head. OpenVLA reads patch features, so it has no forward."""

    def __init__(self, tower: TowerConfig) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, tower.width))
        self.q = nn.Linear(tower.width, tower.width)
        self.kv = nn.Linear(tower.width, 2 * tower.width)
        self.proj = nn.Linear(tower.width, tower.width)
        self.norm = nn.LayerNorm(tower.width, eps=_LAYER_NORM_EPS)
        self.mlp = Mlp(tower.width, tower.mlp, tower.activation)


class VisionTower(nn.Module):
    """One vision transformer: [b, 3, size, size] -> patch features [b, n, width]."""

    def __init__(self, tower: TowerConfig, image_size: int) -> None:
        super().__init__()
        patches = (image_size // tower.patch) ** 2
        self.prefix_tokens = tower.registers + int(tower.class_token)
        self.patch_embed = PatchEmbed(tower.width, tower.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, tower.width))  # patches only: no_embed_class in timm
        self.cls_token = nn.Parameter(torch.zeros(1, 1, tower.width)) if tower.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, tower.registers, tower.width)) if tower.registers else None
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.depth))
        self.norm = nn.LayerNorm(tower.width, eps=_LAYER_NORM_EPS)
        self.attn_pool = AttentionPool(tower) if tower.attention_pool else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Runs all blocks but the last and drops class and register tokens."""
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1)
        for block in islice(self.blocks, len(self.blocks) - 1):
            x = block(x)
        patches: Tensor = x[:, self.prefix_tokens :]
        return patches


class VisionBackbone(nn.Module):
    """One tower, or two whose features are concatenated; patches of several images follow each other.

    [b, images · (3 or 6), size, size] -> [b, images · n, width].
    """

    def __init__(self, towers: tuple[TowerConfig, ...], image_sizes: list[int], images: int = 1) -> None:
        super().__init__()
        self.width = sum(tower.width for tower in towers)
        self.image_size = image_sizes[0]
        self.images = images
        self.featurizer = VisionTower(towers[0], image_sizes[0])
        self.fused_featurizer = VisionTower(towers[1], image_sizes[1]) if len(towers) == 2 else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of both towers side by side; every image is a row of the towers' batch.

        Raises:
            CheckpointError: the images have another size or number of channels than the towers.
        """
        channels = 3 if self.fused_featurizer is None else 6
        wanted = (self.images * channels, self.image_size, self.image_size)
        if tuple(pixels.shape[1:]) != wanted:
            raise CheckpointError(
                f"pixel_values has shape {list(pixels.shape)}, wanted [b, {wanted[0]}, {wanted[1]}, {wanted[2]}]: "
                f"{self.images} images for each prompt, from the image processor (preprocessor_config.json) that "
                "belongs to this model (config.json)"
            )
        pixels = pixels.to(self.featurizer.pos_embed.dtype).unflatten(1, (self.images, channels)).flatten(0, 1)
        features: Tensor = self.featurizer(pixels[:, :3])
        if self.fused_featurizer is not None:
            features = torch.cat([features, self.fused_featurizer(pixels[:, 3:])], dim=2)
        together: Tensor = features.unflatten(0, (-1, self.images)).flatten(1, 2)
        return together


class Projector(nn.Module):
    """Vision features to the language model's width: three layers for two towers, two layers for one."""

    def __init__(self, vision_width: int, text_width: int, *, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision_width if fused else text_width
        self.fc1 = nn.Linear(vision_width, hidden)
        self.fc2 = nn.Linear(hidden, text_width)
        self.fc3 = nn.Linear(text_width, text_width) if fused else None

    def forward(self, features: Tensor) -> Tensor:
        """[b, n, vision width] -> [b, n, text width]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(features)))
        return out if self.fc3 is None else self.fc3(F.gelu(out))
