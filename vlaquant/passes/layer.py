"""One layer: working weight and statistics → codes, with a record of how well it went."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlaquant.calibrate import ActStats
from vlaquant.numerics import QuantizedWeight, qparams
from vlaquant.passes.awq import awq_clip, hessian_observer
from vlaquant.passes.gptq import gptq
from vlaquant.passes.loss import weight_loss
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.recipe import Quantizer, Rtn
from vlaquant.scheme import QuantSpec, Scheme


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What happened to one layer.

    Attributes:
        quantizer: what made the codes, ``rtn`` or ``gptq``, with its clipping.
        loss: mean squared error of the layer's output over the calibration tokens, as a share of the output's mean
            square (float activations); None for a layer without data.
        loss_rtn: the same for plain rounding of the same weight.
        notes: everything out of the ordinary: reverted, more damping, dead columns.
        seconds: time taken.
    """

    name: str
    scheme: str
    quantizer: str
    loss: float | None
    loss_rtn: float | None
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


def quantize_layer(
    name: str, weight: Tensor, scheme: Scheme, stats: ActStats | None, quantizer: Quantizer, *, scale_dtype: torch.dtype
) -> tuple[QuantizedWeight, LayerRecord]:
    """Codes for a weight [n, k]; plain rounding instead where the recipe's quantizer does worse or there is no data.

    Args:
        name: for the record.
        weight: float32.
        scheme: the plan's.
        stats: of the layer's input; None for a layer without data.
        quantizer: the recipe's.
        scale_dtype: what scales are stored in.
    """
    started = time.perf_counter()
    plain = round_to_nearest(weight, scheme.weight, scale_dtype=scale_dtype)
    if stats is None or stats.hessian is None:
        clip = quantizer.clip if quantizer.clip != "awq" else "mse"
        rounded = round_to_nearest(weight, scheme.weight, scale_dtype=scale_dtype, clip=clip)
        seconds = time.perf_counter() - started
        return rounded, LayerRecord(name, scheme.name, f"rtn {clip}", None, None, (), seconds)
    result, notes = _with_data(weight, scheme.weight, stats.hessian, quantizer, scale_dtype)
    power = weight_loss(weight, stats.hessian)
    loss = weight_loss(result.dequantize() - weight, stats.hessian)
    loss_rtn = weight_loss(plain.dequantize() - weight, stats.hessian)
    used = f"{quantizer.kind} {quantizer.clip}"
    if loss > loss_rtn:
        result, used = plain, "rtn minmax"
        notes = (*notes, f"{quantizer.kind} reverted: {loss / loss_rtn:.3f} times the error of plain rounding")
        loss = loss_rtn
    scale = 1.0 / max(power, torch.finfo(torch.float32).tiny)
    seconds = time.perf_counter() - started
    return result, LayerRecord(name, scheme.name, used, loss * scale, loss_rtn * scale, notes, seconds)


def _with_data(
    weight: Tensor, spec: QuantSpec, hessian: Tensor, quantizer: Quantizer, scale_dtype: torch.dtype
) -> tuple[QuantizedWeight, tuple[str, ...]]:
    if isinstance(quantizer, Rtn):
        if quantizer.clip == "awq":
            return awq_clip(weight, hessian, spec, scale_dtype=scale_dtype), ()
        return round_to_nearest(weight, spec, scale_dtype=scale_dtype, clip=quantizer.clip), ()
    result = gptq(
        weight,
        hessian,
        spec,
        scale_dtype=scale_dtype,
        clip=hessian_observer(hessian) if quantizer.clip == "awq" else quantizer.clip,
        damp=quantizer.damp,
        block_size=quantizer.block_size,
        act_order=quantizer.act_order,
    )
    notes = []
    if result.dead_columns:
        notes.append(f"{result.dead_columns} input channels are always 0")
    if result.fallback is not None:
        notes.append(result.fallback)
    elif result.damp != quantizer.damp:
        notes.append(f"damping raised to {result.damp:g}")
    return result.weight, tuple(notes)


def static_input(stats: ActStats, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale [1] and zero point [1] of a static activation from the range that calibration saw."""
    scale, zero = qparams(stats.low.reshape(1), stats.high.reshape(1), spec, scale_dtype)
    return scale, None if spec.symmetric else zero
