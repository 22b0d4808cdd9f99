"""Lookup tables in 8 bits: one scale a row, and only the rows that are looked up become float.

The file holds them as ``int-quantized``, one code a byte, so that transformers with compressed-tensors opens them too.
(It cannot open an embedding in ``pack-quantized``: transformers 5.23 looks for the float weight while it loads.)
"""

from typing import cast

import torch
from torch import Tensor, nn

from vlaquant.linear.weight import PackedWeight, WeightFacts
from vlaquant.numerics import QuantizedWeight
from vlaquant.scheme import Scheme


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is a lookup table of a known kind: ``nn.Embedding``, or one of Gemma's, which scale the rows."""
    if type(module) is nn.Embedding:
        return True
    return type(module).__name__.endswith("ScaledWordEmbedding") and _factor(module) is not None


def embedding_objection(module: nn.Module) -> str | None:
    """Why a lookup table cannot be stored in 8 bits, or None if it can."""
    if getattr(module, "max_norm", None) is not None:
        return "changes its rows when they are looked up (max_norm)"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "computes its weight (by weight normalization or alike) instead of holding it"
    return None


class QuantEmbedding(nn.Module):
    """A lookup table of n rows [k], one 8-bit code a value and one scale a row.

    Buffers: ``weight`` int8 [n, k]; ``weight_scale`` [n, 1]. They are allocated but not filled, on the default device.

    Args:
        num_embeddings: n.
        embedding_dim: k.
        scheme: 8 bits a value, one scale a row.
        dtype: of the scales, and of what is looked up.
        padding_idx: kept for those who ask.
        factor: what rows are multiplied with once they are looked up, or None.
    """

    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert scheme.weight.bits == 8, scheme
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.scheme = scheme
        # register_buffer refuses the name, because the class has a property of that name
        self._buffers["weight"] = torch.empty(num_embeddings, embedding_dim, dtype=torch.int8)
        self.register_buffer("weight_scale", torch.empty(num_embeddings, 1, dtype=dtype))
        self.register_buffer("embed_scale", factor, persistent=False)

    @property
    def weight(self) -> PackedWeight:
        """Answers for dtype, device and shape as the float table would; cannot be computed with."""
        scale, shape = self.weight_scale, torch.Size((self.num_embeddings, self.embedding_dim))
        if torch.compiler.is_compiling():
            return cast("PackedWeight", WeightFacts(scale.dtype, scale.device, shape))
        return PackedWeight(shape, scale.dtype, scale.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., k] for ids [...], in the dtype of the scales.

        Raises:
            IndexError: an id that is negative, or has no row.
        """
        flat = ids.reshape(-1)
        codes = self._codes.index_select(0, flat)
        scale = self.weight_scale.index_select(0, flat)
        rows = (codes.to(torch.float32) * scale.to(torch.float32)).to(scale.dtype)
        rows = rows.reshape(*ids.shape, self.embedding_dim)
        factor = self._buffers["embed_scale"]
        return rows if factor is None else rows * factor.to(rows.dtype)

    def dequantize(self) -> Tensor:
        """The float table [n, k], before any factor, in the dtype of the scales."""
        weight = QuantizedWeight(codes=self._codes, scale=self.weight_scale, zero=None, spec=self.scheme.weight)
        return weight.dequantize(self.weight_scale.dtype)

    @property
    def _codes(self) -> Tensor:
        return cast("Tensor", self._buffers["weight"])

    def extra_repr(self) -> str:
        """As of ``nn.Embedding``, with the scheme."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"


def empty_embedding(module: nn.Module, scheme: Scheme) -> QuantEmbedding:
    """A packed table without values, on the meta device, for the place of a float one."""
    weight = module.get_parameter("weight")
    padding = getattr(module, "padding_idx", None)
    n, k = weight.shape
    with torch.device("meta"):
        return QuantEmbedding(n, k, scheme, dtype=weight.dtype, padding_idx=padding, factor=_factor(module))


def embedding_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """What a table of these codes [n, k] holds, under the names of its buffers."""
    return {"weight": weight.codes, "weight_scale": weight.scale}


def _factor(module: nn.Module) -> Tensor | None:
    factor = module._buffers.get("embed_scale")  # noqa: SLF001  get_buffer raises where there is none
    return factor if factor is not None and factor.numel() == 1 else None
