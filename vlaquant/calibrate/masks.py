"""Which tokens of a layer's input count, and how much: padding and the images of missing cameras do not."""

import math

import torch
from torch import Tensor

from vlaquant.errors import CalibrationError


def takes_turns(mask: Tensor | None, x: Tensor) -> bool:
    """Whether a layer reads the images that ``mask`` is about one at a time, one in each call."""
    return mask is not None and mask.ndim == 1 and len(mask) > 1 and x.ndim > 2 and x.shape[0] == 1


def counted_rows(layer: str, x: Tensor, mask: Tensor | None, *, turn: int = 0) -> Tensor:
    """The tokens of ``x`` that count, [rows, k].

    Args:
        layer: its name, for errors.
        x: what it reads, [..., k].
        mask: bool, True for what counts: [b, t] for tokens, to an input [b, t, k] or [b·t, k]; [b] for images, to an
            input [b, ..., k] or [b·t, k]. None if all counts.
        turn: which image of a mask [b] it is, for a layer that reads them one at a time as [1, ..., k].

    Raises:
        CalibrationError: the mask is not bool, or leaves something out and does not fit.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    if mask.dtype is not torch.bool:
        raise CalibrationError(
            f"{layer}: the token mask has dtype {mask.dtype}; use bool, True for the tokens that count"
        )
    if bool(mask.all()):
        return rows
    counts = _fitted(mask, x, turn)
    if counts is None:
        raise CalibrationError(
            f"{layer}: its input has the shape {tuple(x.shape)}, and the mask of its part, {tuple(mask.shape)}, which "
            "leaves tokens out, does not fit that; the family's token_masks must be as its layers read them"
        )
    return rows[counts.to(x.device)]


def counted_weights(
    layer: str, x: Tensor, mask: Tensor | None, weights: Tensor | None, *, turn: int = 0
) -> Tensor | None:
    """What the rows that :func:`counted_rows` gives weigh, [rows] float32; None if all weigh 1.

    Args:
        layer: as there.
        x: as there.
        mask: as there.
        weights: float, ≥ 0, of the shape that a mask has.
        turn: as there.

    Raises:
        CalibrationError: weights that are negative, not finite, or of another shape.
    """
    if weights is None:
        return None
    fitted = _fitted(weights, x, turn)
    if fitted is None:
        raise CalibrationError(
            f"{layer}: its input has the shape {tuple(x.shape)}, and the token weights, {tuple(weights.shape)}, do not "
            "fit that; the family's token_types must be as its layers read them"
        )
    fitted = fitted.to(device=x.device, dtype=torch.float32)
    if not bool((fitted >= 0).all() and fitted.isfinite().all()):
        raise CalibrationError(f"{layer}: token weights must be 0 or more and finite, got {float(fitted.min())} …")
    return counted_rows(layer, fitted.reshape(*x.shape[:-1], 1), mask, turn=turn).squeeze(-1)


def _fitted(mask: Tensor, x: Tensor, turn: int) -> Tensor | None:
    """``mask`` for each row of ``x``; None if it does not fit."""
    shape = x.shape[:-1]
    count = math.prod(shape)
    if mask.shape == shape or (mask.ndim == 2 and shape == (mask.numel(),)):
        return mask.reshape(-1)
    if mask.ndim != 1 or not shape:
        return None
    if takes_turns(mask, x):
        return mask[turn % len(mask)].expand(count)
    if shape[0] == len(mask) or (len(shape) == 1 and count % len(mask) == 0):
        return mask.repeat_interleave(count // len(mask))
    return None
