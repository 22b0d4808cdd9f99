"""Statistics of the input of one Linear that stream: O(k) for ranges and means, O(k²) for a Hessian.

Letters: k input features, t tokens of one call, r rows of the sample.

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
        mean: [k], mean of x.
        mean_abs: [k], mean of |x|.
        hessian: [k, k], mean over the tokens of x·xᵀ, exactly symmetric; None where it was not asked for.
        sample: [≤ r, k], tokens drawn uniformly from all that were seen.
        tokens: how many tokens were seen.
    """

    channel_low: Tensor
    channel_high: Tensor
    mean: Tensor
    mean_abs: Tensor
    hessian: Tensor | None
    sample: Tensor
    tokens: int

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
        sum: [k], float64, Σx.
        abs_sum: [k], float64, Σ|x|.
        strips: float64, the upper triangle of Σx·xᵀ: strip i holds rows 512·i up to 512·(i + 1) and the columns from
            512·i on. Empty where no Hessian was asked for.
        keys: int64 [≤ r] on the CPU, ascending: the smallest of all tokens' :func:`row_keys`.
        sample: [≤ r, k], float32, the tokens with these keys. That is a uniform draw without replacement whatever the
            number of tokens to come, and does not depend on their order.
        tokens: how many.
        sample_rows: r.
    """

    channel_low: Tensor
    channel_high: Tensor
    sum: Tensor
    abs_sum: Tensor
    strips: list[Tensor]
    keys: Tensor
    sample: Tensor
    tokens: int
    sample_rows: int

    @_normal_tensors
    def add_(self, rows: Tensor, keys: Tensor) -> None:
        """Take in the tokens ``rows`` [t, k], t ≥ 1, any float dtype, whose keys [t] are :func:`row_keys`."""
        made_of = rows.dtype
        rows = rows.to(device=self.abs_sum.device, dtype=torch.float32)
        self.tokens += rows.shape[0]
        self.sum += rows.sum(dim=0)
        self.abs_sum += rows.abs().sum(dim=0)
        self.channel_low = torch.minimum(self.channel_low, rows.amin(dim=0))
        self.channel_high = torch.maximum(self.channel_high, rows.amax(dim=0))
        with _products_of(made_of):
            for i, strip in enumerate(self.strips):
                start = i * _STRIP
                strip.add_(rows[:, start : start + _STRIP].T @ rows[:, start:])
        self._keep_(rows, keys)

    @_normal_tensors
    def merge_(self, other: "RunningStats") -> None:
        """Take in all that ``other`` saw: other samples, of the same layer."""
        self.tokens += other.tokens
        self.sum += other.sum
        self.abs_sum += other.abs_sum
        self.channel_low = torch.minimum(self.channel_low, other.channel_low)
        self.channel_high = torch.maximum(self.channel_high, other.channel_high)
        for strip, others in zip(self.strips, other.strips, strict=True):
            strip.add_(others)
        self._keep_(other.sample, other.keys)

    def _keep_(self, rows: Tensor, keys: Tensor) -> None:
        """Put those of ``rows`` into the sample whose keys are among the smallest."""
        if self.sample_rows and len(self.keys) == self.sample_rows:
            better = keys < self.keys[-1]
            if not better.any():
                return
            rows, keys = rows[better.to(rows.device)], keys[better]
        every = torch.cat([self.keys, keys])
        kept = every.argsort()[: self.sample_rows]
        self.keys = every[kept]
        self.sample = torch.cat([self.sample, rows])[kept.to(rows.device)]

    @_normal_tensors
    def copy(self) -> "RunningStats":
        """The same sums in memory of their own."""
        return replace(
            self, sum=self.sum.clone(), abs_sum=self.abs_sum.clone(), strips=[strip.clone() for strip in self.strips]
        )

    @_normal_tensors
    def stats(self) -> ActStats:
        """Means, in float32."""
        return ActStats(
            channel_low=self.channel_low,
            channel_high=self.channel_high,
            mean=(self.sum / self.tokens).to(torch.float32),
            mean_abs=(self.abs_sum / self.tokens).to(torch.float32),
            hessian=self._mean_hessian() if self.strips else None,
            sample=self.sample,
            tokens=self.tokens,
        )

    def _mean_hessian(self) -> Tensor:
        k = len(self.abs_sum)
        hessian = torch.empty(k, k, device=self.abs_sum.device)
        for i, strip in enumerate(self.strips):
            rows = slice(i * _STRIP, i * _STRIP + len(strip))
            upper = (strip / self.tokens).to(torch.float32)
            hessian[rows.start :, rows] = upper.T
            # Of the corner both halves were summed, maybe in different orders
            corner = upper[:, : len(strip)]
            hessian[rows, rows.start :] = upper
            hessian[rows, rows] = corner.triu() + corner.triu(1).T
        return hessian


@_normal_tensors
def no_stats(features: int, *, hessian: bool, sample_rows: int, device: torch.device) -> RunningStats:
    """Statistics of no token at all."""
    starts = range(0, features, _STRIP) if hessian else ()
    return RunningStats(
        channel_low=torch.full((features,), torch.inf, device=device),
        channel_high=torch.full((features,), -torch.inf, device=device),
        sum=torch.zeros(features, dtype=torch.float64, device=device),
        abs_sum=torch.zeros(features, dtype=torch.float64, device=device),
        strips=[
            torch.zeros(min(_STRIP, features - start), features - start, dtype=torch.float64, device=device)
            for start in starts
        ],
        keys=torch.zeros(0, dtype=torch.int64),
        sample=torch.zeros(0, features, device=device),
        tokens=0,
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
