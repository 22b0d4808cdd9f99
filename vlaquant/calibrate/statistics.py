"""Statistics of the input of one Linear that stream: O(k) for ranges and means, O(k²) for a Hessian.

Letters: k input features, t tokens of one call, r rows of the sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ActStats:
    """What a Linear read during calibration, in float32.

    Attributes:
        channel_low: [k], smallest value of each input channel.
        channel_high: [k], largest value of each input channel.
        mean_abs: [k], mean of |x|.
        hessian: [k, k], mean over the tokens of x·xᵀ; None where it was not asked for.
        sample: [≤ r, k], tokens drawn uniformly from all that were seen.
        tokens: how many tokens were seen.
    """

    channel_low: Tensor
    channel_high: Tensor
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


@dataclass(frozen=True, slots=True, eq=False)
class RunningStats:
    """Statistics so far. A value: adding rows makes a new one, so that two layers can share it until they part.

    Attributes:
        stats: of all rows that were added.
        keys: float64 on the CPU, one random number for each row of ``stats.sample``. The sample is made of the rows
            with the smallest keys, which is a uniform draw without replacement whatever the number of rows to come.
    """

    stats: ActStats
    keys: Tensor

    def add(self, rows: Tensor, *, sample_rows: int, seed: int) -> "RunningStats":
        """These statistics with the tokens ``rows`` [t, k], t ≥ 1, taken in."""
        rows = rows.to(device=self.stats.mean_abs.device, dtype=torch.float32)
        before, added = self.stats, rows.shape[0]
        tokens = before.tokens + added
        old_share, new_share = before.tokens / tokens, 1.0 / tokens
        hessian = before.hessian
        if hessian is not None:
            hessian = torch.addmm(hessian, rows.T, rows, beta=old_share, alpha=new_share)
        kept_old, kept_new, keys = self._draw(added, sample_rows, seed)
        stats = ActStats(
            channel_low=torch.minimum(before.channel_low, rows.amin(dim=0)),
            channel_high=torch.maximum(before.channel_high, rows.amax(dim=0)),
            mean_abs=before.mean_abs * old_share + rows.abs().sum(dim=0) * new_share,
            hessian=hessian,
            sample=torch.cat([before.sample[kept_old], rows[kept_new]]),
            tokens=tokens,
        )
        return RunningStats(stats, keys)

    def _draw(self, added: int, sample_rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which of the sampled rows and which of ``added`` new ones stay, and their keys.

        The keys depend on the seed and on how many tokens came before, not on the layer: layers that read the same rows
        sample the same rows.
        """
        generator = torch.Generator().manual_seed(seed + self.stats.tokens)
        keys = torch.cat([self.keys, torch.rand(added, generator=generator, dtype=torch.float64)])
        kept = keys.topk(min(sample_rows, keys.numel()), largest=False).indices
        is_old = kept < self.keys.numel()
        kept_old, kept_new = kept[is_old], kept[~is_old]
        return kept_old, kept_new - self.keys.numel(), keys[torch.cat([kept_old, kept_new])]


def no_stats(features: int, *, hessian: bool, device: torch.device) -> RunningStats:
    """Statistics of no token at all."""
    zeros = torch.zeros(features, device=device)
    stats = ActStats(
        channel_low=torch.full_like(zeros, torch.inf),
        channel_high=torch.full_like(zeros, -torch.inf),
        mean_abs=zeros,
        hessian=torch.zeros(features, features, device=device) if hessian else None,
        sample=torch.zeros(0, features, device=device),
        tokens=0,
    )
    return RunningStats(stats, torch.zeros(0, dtype=torch.float64))
