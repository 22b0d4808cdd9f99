"""The affine map between floats and codes, and how its range is chosen. Tensors in, tensors out.

    q = clamp(round(x / S + Z), qmin, qmax)        x̂ = S · (q - Z)

Letters: n rows (output features), k columns (input features), g groups a row, s = k / g columns a group, t tokens.
All arithmetic is float32. A scale is rounded to the dtype it is stored in *before* codes are chosen, so that the error
that is measured is the error that is shipped.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlaquant.scheme import Granularity, QuantSpec

#: How a range is chosen: groups [n, g, s] -> (scale, zero), each [n, g, 1].
Observer = Callable[[Tensor, QuantSpec, torch.dtype], tuple[Tensor, Tensor]]

_MSE_SHRINK_STEPS = 80
_MSE_SMALLEST = 0.2

#: Weights are rounded in blocks of rows of so many values, whose intermediate results stay in a CPU's cache.
_BLOCK = 1 << 18
_BLOCK_OF_DEVICE = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight as codes, not yet packed.

    Attributes:
        codes: int8 [n, k], each in [spec.qmin, spec.qmax].
        scale: [n, g], in the dtype it will be stored in; g = 1 per channel, and [1, 1] per tensor.
        zero: int8, shaped as ``scale``; None if symmetric.
        spec: how to read them.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [n, k] that these codes stand for, computed in float32, or in float64 if that is wanted."""
        wide = torch.promote_types(dtype, torch.float32)
        groups = split_groups(self.codes, self.spec).to(wide)
        if self.zero is not None:
            groups -= self.zero.to(wide).unsqueeze(-1)
        groups *= self.scale.to(wide).unsqueeze(-1)
        return groups.reshape(self.codes.shape).to(dtype)

    def rows(self, rows: slice) -> "QuantizedWeight":
        """Some rows of the weight, as views."""
        if self.spec.granularity is Granularity.TENSOR:
            return replace(self, codes=self.codes[rows])
        zero = None if self.zero is None else self.zero[rows]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=zero)


def split_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View of [n, k] as [n, g, s], or [1, 1, n·k] per tensor. Needs k divisible by the group size."""
    if spec.granularity is Granularity.TENSOR:
        return weight.reshape(1, 1, -1)
    if spec.granularity is Granularity.CHANNEL:
        return weight.unsqueeze(1)
    assert spec.group_size is not None
    return weight.reshape(weight.shape[0], -1, spec.group_size)


def min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value along the last dimension, which stays; several times faster than ``aminmax``."""
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)


def qparams(low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point for values in [low, high]; the range is widened to contain 0.

    Symmetric: S = max(|low|, |high|) / ((qmax - qmin) / 2), Z = 0. Asymmetric: S = (high - low) / (qmax - qmin),
    Z = round(qmin - low / S). Both are float32 tensors shaped as ``low``; S has a value that ``dtype`` can hold and is
    never 0, so that an empty range dequantizes to 0 and not to NaN.
    """
    low = low.to(torch.float32).clamp(max=0.0)
    high = high.to(torch.float32).clamp(min=0.0)
    steps = spec.qmax - spec.qmin
    if spec.symmetric:
        scale = storable(torch.maximum(-low, high) / (steps / 2), dtype)
        return scale, torch.zeros_like(scale)
    scale = storable((high - low) / steps, dtype)
    return scale, (spec.qmin - low / scale).round().clamp(spec.qmin, spec.qmax)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as ``dtype`` would hold it, in float32, with its sign.

    Zero (an all-zero range, or an underflow) becomes the smallest positive number.

    Small scales are not rare in float16, whose normal numbers end at 6e-5 (a row of 8 bits with values below 0.008), so
    its subnormals are used. Those of bfloat16 and float32 are not: a CPU that flushes them would divide by zero.
    """
    limits = torch.finfo(dtype)
    smallest = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    size = scale.abs().clamp(min=smallest, max=limits.max).to(dtype).to(torch.float32)
    return torch.where(scale < 0, -size, size)


def to_codes(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """clamp(round(x / S + Z)), float32, half to even; ``scale`` and ``zero`` broadcast against ``x``."""
    codes = x.to(torch.float32) / scale
    round_to_codes_(codes, zero, spec)
    return codes


def round_to_codes_(scaled: Tensor, zero: Tensor, spec: QuantSpec) -> None:
    """The second half of :func:`to_codes`, in place: ``scaled`` is x / S."""
    if not spec.symmetric:
        scaled.add_(zero)
    scaled.round_().clamp_(spec.qmin, spec.qmax)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """S · (q - Z), the inverse of :func:`to_codes` up to rounding and clamping."""
    return (codes - zero) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``x`` after a round trip through its codes, float32."""
    codes = to_codes(x, scale, zero, spec)
    if not spec.symmetric:
        codes -= zero
    return codes.mul_(scale)


def full_range(low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point for weights in [low, high]; unlike :func:`qparams` it may turn the codes around.

    Symmetric codes reach one further down than up: with 2 bits from -2·S to S. So the value of the largest magnitude
    gets the code qmin, S = max|w| / qmin with its sign, which makes S smaller by 2^-b and negative where that value is
    positive (as in llama.cpp's Q4_0 and auto-round's full range). Values on the other side beyond qmax·S are clipped.
    With 8 bits there is no such side.
    """
    scale, zero = qparams(low, high, spec, dtype)
    if not _turns(spec):
        return scale, zero
    scale = storable(torch.maximum(-low, high).to(torch.float32) / -spec.qmin, dtype)
    return torch.where(high > -low, -scale, scale), zero


def _turns(spec: QuantSpec) -> bool:
    return spec.symmetric and spec.qmin + spec.qmax < 0


def minmax_observer(groups: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The full range, of :func:`full_range`."""
    low, high = min_max(groups)
    return full_range(low, high, spec, dtype)


def mse_observer(groups: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The shrunken range with the least squared error, of 80 between 100 % and 20 % of the full one."""
    groups = groups.to(torch.float32)
    ratios = [1.0 - (1.0 - _MSE_SMALLEST) * step / _MSE_SHRINK_STEPS for step in range(_MSE_SHRINK_STEPS)]
    return best_range(
        shrunken_ranges(*min_max(groups), spec, dtype, ratios),
        lambda scale, zero: fake_quantize(groups, scale, zero, spec).sub_(groups).square_().sum(dim=-1, keepdim=True),
    )


def shrunken_ranges(
    low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype, ratios: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scale and zero point for the full range, and then for shares of [low, high], in both directions of the codes."""
    yield full_range(low, high, spec, dtype)
    for ratio in ratios:
        scale, zero = qparams(low * ratio, high * ratio, spec, dtype)
        yield scale, zero
        if _turns(spec):
            yield -scale, zero


def best_range(
    candidates: Iterable[tuple[Tensor, Tensor]], error: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of pairs (scale, zero) the one with the least ``error``, group by group; the first of equally good ones."""
    rest = iter(candidates)
    best_scale, best_zero = next(rest)
    best = error(best_scale, best_zero)
    for scale, zero in rest:
        found = error(scale, zero)
        better = found < best
        best = torch.where(better, found, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def percentile_observer(quantile: float) -> Observer:
    """An observer whose range is the ``quantile`` (in (0.5, 1]) of the values from either side."""

    def observe(groups: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        groups = groups.to(torch.float32)
        return qparams(_quantile(groups, 1.0 - quantile), _quantile(groups, quantile), spec, dtype)

    return observe


def _quantile(groups: Tensor, quantile: float) -> Tensor:
    """``torch.quantile`` over the last dimension, without its limit of 2^24 values (a whole weight can have more)."""
    last = groups.shape[-1] - 1
    position = quantile * last
    below = min(int(position), last)
    lower = groups.kthvalue(below + 1, dim=-1, keepdim=True).values
    upper = groups.kthvalue(min(below + 1, last) + 1, dim=-1, keepdim=True).values
    return torch.lerp(lower, upper, position - below)


#: Observers that a recipe can name.
OBSERVERS: dict[str, Observer] = {
    "minmax": minmax_observer,
    "mse": mse_observer,
    "p99.9": percentile_observer(0.999),
}


def row_blocks(weight: Tensor, spec: QuantSpec, values: int | None = None) -> list[slice]:
    """Blocks of the rows of [n, k] that can be rounded one by one; a single one if all rows share a scale."""
    n, k = weight.shape
    if values is None:
        values = _BLOCK if weight.device.type == "cpu" else _BLOCK_OF_DEVICE
    rows = max(values // max(k, 1), 1)
    if spec.granularity is Granularity.TENSOR or n <= rows:
        return [slice(0, n)]
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def fit_groups(weight: Tensor, spec: QuantSpec, observer: Observer, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group of a weight [n, k]: float32 [n, g] each, or [1, 1] per tensor."""
    fitted = [
        observer(split_groups(weight[rows].to(torch.float32), spec), spec, scale_dtype)
        for rows in row_blocks(weight, spec)
    ]
    scale, zero = (torch.cat(parts).squeeze(-1) for parts in zip(*fitted, strict=True))
    return scale, zero


def round_weight(weight: Tensor, spec: QuantSpec, *, scale_dtype: torch.dtype) -> Tensor:
    """What :func:`quantize_weight` would make of a weight [n, k], dequantized again: float32, and no codes."""
    groups = split_groups(weight.to(torch.float32), spec)
    scale, zero = minmax_observer(groups, spec, scale_dtype)
    return fake_quantize(groups, scale, zero, spec).reshape(weight.shape)


def quantize_weight(
    weight: Tensor, spec: QuantSpec, *, scale_dtype: torch.dtype, observer: Observer = minmax_observer
) -> QuantizedWeight:
    """Round a weight [n, k] to the nearest codes, with one scale for each group that ``spec`` makes."""
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    fitted = []
    for rows in row_blocks(weight, spec):
        groups = split_groups(weight[rows].to(torch.float32), spec)
        scale, zero = observer(groups, spec, scale_dtype)
        codes[rows] = to_codes(groups, scale, zero, spec).reshape(codes[rows].shape)
        fitted.append((scale.squeeze(-1), zero.squeeze(-1)))
    scale, zero = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return as_quantized(codes, scale, zero, spec, scale_dtype)


def as_quantized(
    codes: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Pack float32 codes [n, k], scale [n, g] and zero [n, g] into their stored dtypes."""
    return QuantizedWeight(
        codes=codes.to(torch.int8),
        scale=scale.to(scale_dtype),
        zero=None if spec.symmetric else zero.to(torch.int8),
        spec=spec,
    )


def quantize_tokens(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic activation quantization: codes int8 [t, k], scale [t, 1] and zero [t, 1] (float32), one range a token."""
    low, high = min_max(x)
    scale, zero = qparams(low, high, spec, torch.float32)
    return to_codes(x, scale, zero, spec).to(torch.int8), scale, zero


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite. One pass without a copy, as long as that is so and no sum overflows."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10·log10(Σx² / Σ(x - x̂)²); infinite if equal, NaN for NaN."""
    reference = reference.to(torch.float32)
    noise = (reference - approximation.to(torch.float32)).square().sum()
    return float("inf") if noise == 0 else float(10.0 * torch.log10(reference.square().sum() / noise))
