"""Statistics of the input of one Linear that stream: O(k) for ranges and means, O(k²) for a Hessian.

Letters: k input features, t tokens of one call, r rows of the sample. Where a layer is watched in two chains, x̂ is what
it reads in the quantized chain, of which all statistics are, and x what it reads in the float chain for the same token.

What is kept while they stream are sums, not means, and the big ones in float64: the same samples give the same
statistics in whatever order they come and however they are split over processes. (A float64 sum in another order may
differ in its last bit. Rounded to float32 that is seen in one of some 10⁸ entries, and then by one unit in the last
place.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

#: The upper triangle of Σx·xᵀ is kept in strips of so many rows: half of the arithmetic and memory of the whole.
_STRIP = 512
_HAS_AMX = torch.cpu._is_amx_tile_supported()  # noqa: SLF001  there is no public way to ask


@dataclass(frozen=True, slots=True, eq=False)
class ActStats:
    """What a Linear read during calibration, in float32.

    Attributes:
        channel_low: [k], smallest value of each input channel.
        channel_high: [k], largest value of each input channel.
        mean_abs: [k], mean of |x|.
        hessian: [k, k], mean over the tokens of x·xᵀ, exactly symmetric; None where it was not asked for.
        sample: [≤ r, k], tokens drawn uniformly from all that were seen.
        sample_weights: [≤ r], what each of them weighs; None if all weigh the same.
        tokens: how many tokens were seen.
        cross: [k, k], mean of (x − x̂)·x̂ᵀ, which is not symmetric; None for a layer that was watched in one chain.
        drift: [k, k], mean of (x − x̂)·(x − x̂)ᵀ, likewise.

    Means are weighted where tokens have weights; ranges and the draw are not.
    """

    channel_low: Tensor
    channel_high: Tensor
    mean_abs: Tensor
    hessian: Tensor | None
    sample: Tensor
    tokens: int
    sample_weights: Tensor | None = None
    cross: Tensor | None = None
    drift: Tensor | None = None

    @property
    def absmax(self) -> Tensor:
        """[k], largest |x| of each input channel."""
        return torch.maximum(-self.channel_low, self.channel_high)

    @property
    def low(self) -> Tensor:
        """Scalar, the smallest value of all: one end of a static per-tensor range."""
        return self.channel_low.min()

    @property
    def high(self) -> Tensor:
        """Scalar, the largest value of all."""
        return self.channel_high.max()


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Matrix products of float32 tensors that hold ``dtype`` values, by the fastest instructions that lose nothing.

    The product of two bfloat16 values fits float32, in which AMX sums it up; that is some three times as fast.
    """
    exact = dtype is torch.bfloat16 and _HAS_AMX
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if exact:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


#: Sums are normal tensors wherever the model runs: those of inference mode could not be changed after it.
_normal_tensors = torch.inference_mode(mode=False)


@dataclass(slots=True, eq=False)
class RunningStats:
    """Sums so far. Grows in place, because a Hessian in float64 is too large to have twice.

    Attributes:
        channel_low: [k], float32.
        channel_high: [k], float32.
        abs_sum: [k], float64, Σω|x|, where a token's weight ω is 1 unless it is given.
        strips: float64, the upper triangle of Σω·x·xᵀ: strip i holds rows 512·i up to 512·(i + 1) and the columns from
            512·i on. Empty where no Hessian was asked for. In two chains z·zᵀ takes the place of x·xᵀ, with z [2k] =
            [x̂, x − x̂]: these are all second moments.
        keys: int64 [≤ r] on the CPU, ascending: the smallest of all tokens' :func:`row_keys`.
        sample: [≤ r, k], float32, the tokens with these keys. That is a uniform draw without replacement whatever the
            number of tokens to come, and does not depend on their order.
        sample_weights: [≤ r], float32, the weights of these tokens.
        tokens: how many.
        weight: float64 [], Σω.
        weighted: whether any token came with a weight.
        sample_rows: r.
    """

    channel_low: Tensor
    channel_high: Tensor
    abs_sum: Tensor
    strips: list[Tensor]
    keys: Tensor
    sample: Tensor
    sample_weights: Tensor
    tokens: int
    weight: Tensor
    weighted: bool
    sample_rows: int

    @property
    def paired(self) -> bool:
        """Whether these are sums of two chains."""
        return bool(self.strips) and self.strips[0].shape[1] == 2 * len(self.abs_sum)

    @_normal_tensors
    def add_(self, rows: Tensor, keys: Tensor, weights: Tensor | None = None) -> None:
        """Take in the tokens ``rows`` [t, k], t ≥ 1, any float dtype, whose keys [t] are :func:`row_keys`.

        ``weights`` [t] ≥ 0 is what each token counts for; None: 1. For two chains ``rows`` is [t, 2k]: x̂ and x beside
        each other.
        """
        made_of = rows.dtype
        rows = z = rows.to(device=self.abs_sum.device, dtype=torch.float32)
        if self.paired:
            rows, floats = rows.chunk(2, dim=-1)
            # Differences of bfloat16 values are none
            z, made_of = torch.cat([rows, floats - rows], dim=-1), torch.float32
        self.tokens += rows.shape[0]
        self.channel_low = torch.minimum(self.channel_low, rows.amin(dim=0))
        self.channel_high = torch.maximum(self.channel_high, rows.amax(dim=0))
        if weights is None:
            weights = rows.new_ones(len(rows))
            self.abs_sum += rows.abs().sum(dim=0)
        else:
            made_of, self.weighted = torch.float32, True
            weights = weights.to(rows)
            z = z * weights.sqrt().unsqueeze(-1)
            self.abs_sum += weights @ rows.abs()
        self.weight += weights.sum(dtype=torch.float64)
        with _products_of(made_of):
            for i, strip in enumerate(self.strips):
                start = i * _STRIP
                strip.add_(z[:, start : start + _STRIP].T @ z[:, start:])
        self._keep_(rows, keys, weights)

    @_normal_tensors
    def merge_(self, other: "RunningStats") -> None:
        """Take in all that ``other`` saw: other samples, of the same layer."""
        self.tokens += other.tokens
        self.weight += other.weight
        self.weighted |= other.weighted
        self.abs_sum += other.abs_sum
        self.channel_low = torch.minimum(self.channel_low, other.channel_low)
        self.channel_high = torch.maximum(self.channel_high, other.channel_high)
        for strip, others in zip(self.strips, other.strips, strict=True):
            strip.add_(others)
        self._keep_(other.sample, other.keys, other.sample_weights)

    def _keep_(self, rows: Tensor, keys: Tensor, weights: Tensor) -> None:
        """Put those of ``rows`` into the sample whose keys are among the smallest."""
        if self.sample_rows and len(self.keys) == self.sample_rows:
            better = keys < self.keys[-1]
            if not better.any():
                return
            chosen = better.to(rows.device)
            rows, keys, weights = rows[chosen], keys[better], weights[chosen]
        every = torch.cat([self.keys, keys])
        kept = every.argsort()[: self.sample_rows]
        self.keys = every[kept]
        kept = kept.to(rows.device)
        self.sample = torch.cat([self.sample, rows])[kept]
        self.sample_weights = torch.cat([self.sample_weights, weights])[kept]

    @_normal_tensors
    def copy(self) -> "RunningStats":
        """The same sums in memory of their own."""
        strips = [strip.clone() for strip in self.strips]
        return replace(self, abs_sum=self.abs_sum.clone(), weight=self.weight.clone(), strips=strips)

    @_normal_tensors
    def stats(self) -> ActStats:
        """Means, in float32."""
        k, moments = len(self.abs_sum), self._mean_moments() if self.strips else None
        return ActStats(
            channel_low=self.channel_low,
            channel_high=self.channel_high,
            mean_abs=(self.abs_sum / self._total).to(torch.float32),
            hessian=moments[:k, :k] if moments is not None else None,
            sample=self.sample,
            tokens=self.tokens,
            sample_weights=self.sample_weights if self.weighted else None,
            cross=moments[k:, :k] if moments is not None and self.paired else None,
            drift=moments[k:, k:] if moments is not None and self.paired else None,
        )

    @property
    def _total(self) -> Tensor:
        """What all tokens weigh; where all of them weigh nothing the sums are 0, and so are the means."""
        return self.weight.clamp(min=torch.finfo(torch.float64).tiny)

    def _mean_moments(self) -> Tensor:
        """[k, k], or [2k, 2k] for two chains."""
        width = self.strips[0].shape[1]
        moments = torch.empty(width, width, device=self.abs_sum.device)
        for i, strip in enumerate(self.strips):
            rows = slice(i * _STRIP, i * _STRIP + len(strip))
            upper = (strip / self._total).to(torch.float32)
            moments[rows.start :, rows] = upper.T
            # Of the corner both halves were summed, maybe in different orders
            corner = upper[:, : len(strip)]
            moments[rows, rows.start :] = upper
            moments[rows, rows] = corner.triu() + corner.triu(1).T
        return moments


@_normal_tensors
def no_stats(
    features: int, *, hessian: bool, sample_rows: int, device: torch.device, paired: bool = False
) -> RunningStats:
    """Statistics of no token at all; ``paired`` for two chains."""
    width = 2 * features if paired else features
    starts = range(0, width, _STRIP) if hessian else ()
    return RunningStats(
        channel_low=torch.full((features,), torch.inf, device=device),
        channel_high=torch.full((features,), -torch.inf, device=device),
        abs_sum=torch.zeros(features, dtype=torch.float64, device=device),
        strips=[
            torch.zeros(min(_STRIP, width - start), width - start, dtype=torch.float64, device=device)
            for start in starts
        ],
        keys=torch.zeros(0, dtype=torch.int64),
        sample=torch.zeros(0, features, device=device),
        sample_weights=torch.zeros(0, device=device),
        tokens=0,
        weight=torch.zeros((), dtype=torch.float64, device=device),
        weighted=False,
        sample_rows=sample_rows,
    )


def row_keys(count: int, *, seed: int, sample: int, call: int) -> Tensor:
    """int64 [count], a random number for each row of one call; they decide which rows a sample of all rows keeps.

    They depend on no layer, so that layers that read the same rows sample the same rows, and on nothing that came
    before, so that any process can take any sample.

    Args:
        count: how many rows; the first ones do not depend on it.
        seed: of the draw, ≥ 0.
        sample: index of the sample among all.
        call: how many calls of the layer came before in this sample.
    """
    generator = np.random.default_rng((seed, sample, call))
    return torch.from_numpy(generator.integers(np.iinfo(np.int64).max, size=count))


def merge(a: RunningStats, b: RunningStats) -> RunningStats:
    """Statistics of all that ``a`` and ``b`` saw; both are left as they are."""
    merged = a.copy()
    merged.merge_(b)
    return merged


def final_stats(running: Mapping[str, RunningStats]) -> dict[str, ActStats]:
    """Means of every layer; layers with one object of sums share one object of means."""
    made = {id(sums): sums.stats() for sums in running.values()}
    return {name: made[id(sums)] for name, sums in running.items()}
