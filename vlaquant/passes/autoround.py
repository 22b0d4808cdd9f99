"""AutoRound: learn by signed gradient descent which way the weights of a whole block are rounded.

Source: Cheng et al. 2023, arXiv:2309.05516, equations 3 to 5 and algorithm 1. For each layer

    ŵ = S · (clamp(round(w / S + Z + V), qmin, qmax) - Z),        S = α · S₀

with V in [-1/2, 1/2] for every weight and α for every group; V and α follow the sign of their gradient, with a rate
that falls linearly to 0. What differs from the paper:

* It begins with codes that other quantizers found, and not with plain rounding: w is moved as little as it takes to be
  rounded to these codes, see :func:`start_from`, and S₀ is their scale. So V = 0 is their result.
* One factor a group: the zero point stays. (The two of the paper are one for symmetric codes.)
* The best iterate is chosen by the loss over all samples, and not by that of the batch that was drawn.

Letters: n rows, k columns, g groups a row, s columns a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vlaquant.numerics import QuantizedWeight, as_quantized, split_groups, storable
from vlaquant.scheme import QuantSpec

#: How far from the ends of its code's interval a weight is put at least, so that no first steps round all of them anew.
_EDGE = 0.25
#: Bounds of V, and of α around 1.
_REACH = 0.5
#: How often the loss over all samples is looked at in a run.
_LOOKS = 4


class Block(Protocol):
    """What is to be reproduced: a loss that depends on the rounded weights of some layers."""

    @property
    def samples(self) -> int:
        """How many there are."""

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Over all samples, for weights float32 [n, k] by layer."""

    def gradients(self, weights: Mapping[str, Tensor], batch: Sequence[int]) -> dict[str, Tensor]:
        """Of the loss over some samples with respect to each weight: float32 [n, k], up to a positive factor."""


@dataclass(slots=True, eq=False)
class Rounding:
    """How one layer is rounded at the moment.

    Attributes:
        weight: float32 [n, g, s], what is rounded.
        scale: float32 [n, g, 1], S₀.
        zero: float32 [n, g, 1], Z.
        offset: float32 [n, g, s], V.
        factor: float32 [n, g, 1], α.
        spec: of the codes.
        scale_dtype: what scales are stored in; codes always belong to a scale that can be stored.
        shape: n, k.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    offset: Tensor
    factor: Tensor
    spec: QuantSpec
    scale_dtype: torch.dtype
    shape: torch.Size

    def stored_scale(self) -> Tensor:
        """S, as it will be stored: float32 [n, g, 1]."""
        return storable(self.scale * self.factor, self.scale_dtype)

    def codes(self, scale: Tensor) -> Tensor:
        """Codes for ``scale``: float32 [n, g, s]."""
        codes = self.weight / scale
        return codes.add_(self.offset).add_(self.zero).round_().clamp_(self.spec.qmin, self.spec.qmax)

    def rounded(self) -> Tensor:
        """ŵ, float32 [n, k]."""
        scale = self.stored_scale()
        return self.codes(scale).sub_(self.zero).mul_(scale).reshape(self.shape)

    def quantized(self) -> QuantizedWeight:
        """The codes, and the scales as they are stored."""
        scale = self.stored_scale()
        codes = self.codes(scale).reshape(self.shape)
        return as_quantized(codes, scale.squeeze(-1), self.zero.squeeze(-1), self.spec, self.scale_dtype)

    def step_(self, gradient: Tensor, rate: float, *, ranges: bool) -> None:
        """One step against the sign of the gradient, given that of ŵ: float32 [n, k].

        ∂ŵ/∂V is S where the code is not clamped, and 0 where it is; ∂ŵ/∂S is q - Z, less w / S where it is not clamped.
        S can be negative, and α of it is positive.
        """
        scale = self.stored_scale()
        gradient = gradient.reshape(self.weight.shape)
        scaled = self.weight / scale
        codes = (scaled + self.offset).add_(self.zero).round_()
        inside = (codes >= self.spec.qmin) & (codes <= self.spec.qmax)
        if ranges:
            slope = codes.clamp_(self.spec.qmin, self.spec.qmax).sub_(self.zero).sub_(scaled.mul_(inside))
            slope = slope.mul_(gradient).sum(dim=-1, keepdim=True).mul_(scale)
            self.factor.sub_(slope.sign_(), alpha=rate).clamp_(1.0 - _REACH, 1.0 + _REACH)
        self.offset.sub_((gradient * scale).sign_().mul_(inside), alpha=rate).clamp_(-_REACH, _REACH)


def start_from(weight: Tensor, start: QuantizedWeight) -> Rounding:
    """Begin with codes that another quantizer made of a weight [n, k].

    A weight that was not rounded to nearest is moved into the interval of its code, to the end that is nearest to it:
    a small offset is then enough to round it the other way. All others stay as they are.
    """
    spec = start.spec
    groups = split_groups(weight.to(torch.float32), spec)
    scale = start.scale.to(torch.float32).unsqueeze(-1)
    zero = torch.zeros_like(scale) if start.zero is None else start.zero.to(torch.float32).unsqueeze(-1)
    codes = split_groups(start.codes, spec).to(torch.float32)
    # The outermost intervals have no end
    low = (codes - _REACH + _EDGE).masked_fill_(codes == spec.qmin, -torch.inf)
    high = codes.add(_REACH - _EDGE).masked_fill_(codes == spec.qmax, torch.inf)
    moved = (groups / scale + zero).clamp_(low, high).sub_(zero).mul_(scale)
    offset, factor = torch.zeros_like(moved), torch.ones_like(scale)
    return Rounding(moved, scale, zero, offset, factor, spec, start.scale.dtype, weight.shape)


@dataclass(frozen=True, slots=True, eq=False)
class AutoRoundResult:
    """The best iterate.

    Attributes:
        weights: codes by layer.
        loss: of the block with them.
        loss_start: of the block with the codes at the start.
        iteration: after how many steps; 0 is the start.
    """

    weights: dict[str, QuantizedWeight]
    loss: float
    loss_start: float
    iteration: int


@torch.no_grad()
def autoround(
    layers: Mapping[str, Rounding],
    block: Block,
    *,
    iterations: int,
    rate: float | None = None,
    batch: int = 8,
    ranges: bool = True,
    seed: int = 0,
) -> AutoRoundResult:
    """Codes for all layers of a block together, never worse for it than those at the start.

    Args:
        layers: as :func:`start_from` makes them; changed.
        block: gives loss and gradients.
        iterations: steps.
        rate: length of the first step; by default 1 / iterations, so that V can just reach its bounds.
        batch: samples a step.
        ranges: whether the ranges of groups are learnt too.
        seed: of the draw of samples.
    """
    rate = 1.0 / iterations if rate is None else rate
    draw = _batches(block.samples, min(batch, block.samples), seed)
    looks = {round(iterations * look / _LOOKS) for look in range(1, _LOOKS + 1)}
    best_weights = {name: layer.quantized() for name, layer in layers.items()}
    loss_start = best = block.loss({name: layer.rounded() for name, layer in layers.items()})
    best_iteration = 0
    for step in range(iterations):
        gradients = block.gradients({name: layer.rounded() for name, layer in layers.items()}, next(draw))
        for name, layer in layers.items():
            layer.step_(gradients[name], rate * (1.0 - step / iterations), ranges=ranges)
        if step + 1 in looks:
            loss = block.loss({name: layer.rounded() for name, layer in layers.items()})
            if loss < best:
                best, best_iteration = loss, step + 1
                best_weights = {name: layer.quantized() for name, layer in layers.items()}
    return AutoRoundResult(best_weights, best, loss_start, best_iteration)


def _batches(samples: int, size: int, seed: int) -> Iterator[Sequence[int]]:
    """Endless batches, in which every sample has its turn before any has a second."""
    random, left = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    while True:
        if len(left) < size:
            left = np.concatenate([left, random.permutation(samples)])
        yield left[:size].tolist()
        left = left[size:]
