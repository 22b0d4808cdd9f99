"""Banks: Linears with one weight for each robot embodiment, of which a policy uses one at a time.

GR00T's ``CategorySpecificLinear`` holds ``W`` [c, k, n] and ``b`` [c, n] as plain Parameters, and picks a category for
each sample of a batch. It is known by its structure, so that no package of theirs is needed.

A bank can keep 8-bit codes, one category only, or both. What is written has another shape than theirs under the same
name ``W``, so that a loader that does not know of this stops at a size mismatch instead of running with noise.
"""

from typing import cast

import torch
from torch import Tensor, nn

from vlaquant.numerics import QuantizedWeight
from vlaquant.scheme import Scheme


def is_bank(module: nn.Module) -> bool:
    """Whether a module is a ``CategorySpecificLinear`` with ``W`` [c, k, n], ``b`` [c, n] and c categories."""
    if type(module).__name__ != "CategorySpecificLinear":
        return False
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != {"W", "b"} or own["W"].ndim != 3:
        return False
    categories, _, n = own["W"].shape
    return own["b"].shape == (categories, n) and getattr(module, "num_categories", None) == categories


class CategoryBank(nn.Module):
    """What takes the place of a ``CategorySpecificLinear``.

    Tensors: ``W``: with a scheme a buffer of codes int8 [c·n, k], row i·n + j for output j of category i, and
    ``W_scale`` [c·n, 1]; without one a float parameter [c, k, n]. ``b``: [c, n]. With ``kept`` c is 1. They are
    allocated but not filled, on the default device.

    Args:
        num_categories: of the original.
        in_features: k.
        out_features: n.
        scheme: 8 bits a value, one scale a category and output; None keeps the weights float.
        kept: the only category that is left, or None for all.
        dtype: of the scales and the float tensors.
    """

    b: Tensor

    def __init__(
        self,
        num_categories: int,
        in_features: int,
        out_features: int,
        *,
        scheme: Scheme | None,
        kept: int | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.kept = kept
        held = num_categories if kept is None else 1
        if scheme is None:
            empty = torch.empty(held, in_features, out_features, dtype=dtype)
            self.register_parameter("W", nn.Parameter(empty, requires_grad=False))
        else:
            self.register_buffer("W", torch.empty(held * out_features, in_features, dtype=torch.int8))
            self.register_buffer("W_scale", torch.empty(held * out_features, 1, dtype=dtype))
        self.b = nn.Parameter(torch.empty(held, out_features, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, cat_ids: Tensor) -> Tensor:
        """``x[i] @ W[cat_ids[i]] + b[cat_ids[i]]`` for x [b, t, k] and cat_ids [b]; the result is [b, t, n].

        Raises:
            ValueError: a category that is no longer here.
        """
        held = cat_ids.reshape(-1)
        if self.kept is not None:
            if not torch.compiler.is_compiling() and bool((held != self.kept).any()):
                raise ValueError(
                    f"this checkpoint holds the weights of embodiment {self.kept} only, and was asked for "
                    f"{held.tolist()}; quantize again with 'embodiment' of the robot that is used, or without it"
                )
            # In a compiled graph, where nothing can be asked, every other index is out of range
            held = held - self.kept
        return torch.bmm(x, self._weights(held, x.dtype)) + self.b.index_select(0, held).unsqueeze(1)

    def dequantize(self) -> Tensor:
        """The float weights [c, k, n] of the categories that are held, in the dtype of the biases."""
        return self._weights(torch.arange(len(self.b), device=self.b.device), self.b.dtype)

    def extra_repr(self) -> str:
        """Sizes, what it is stored as, and which category is left."""
        stored = "float" if self.scheme is None else self.scheme.name
        kept = "all" if self.kept is None else str(self.kept)
        return f"{self.num_categories}, {self.in_features}, {self.out_features}, stored={stored}, kept={kept}"

    def _weights(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """[b, k, n] for places [b] among the categories that are held."""
        if self.scheme is None:
            return self.get_parameter("W").index_select(0, held)
        by_category = (len(self.b), self.out_features, -1)
        codes = cast("Tensor", self._buffers["W"]).view(by_category).index_select(0, held)
        scale = cast("Tensor", self._buffers["W_scale"]).view(by_category).index_select(0, held)
        rows = (codes.to(torch.float32) * scale.to(torch.float32)).to(scale.dtype)
        return rows.to(dtype).transpose(1, 2)


def empty_bank(module: nn.Module, scheme: Scheme | None, kept: int | None) -> CategoryBank:
    """A bank without values, on the meta device, for the place of a ``CategorySpecificLinear``."""
    weight = module.get_parameter("W")
    with torch.device("meta"):
        return CategoryBank(*weight.shape, scheme=scheme, kept=kept, dtype=weight.dtype)


def bank_rows(weight: Tensor, kept: int | None) -> Tensor:
    """``W`` [c, k, n] as one row [k] a category and output, [c·n, k]; of one category only if ``kept`` says so."""
    weight = weight if kept is None else weight[kept : kept + 1]
    return weight.transpose(1, 2).reshape(-1, weight.shape[1])


def bank_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """What a bank of these codes [c·n, k] holds beside its biases, under the names of its buffers."""
    return {"W": weight.codes, "W_scale": weight.scale}
