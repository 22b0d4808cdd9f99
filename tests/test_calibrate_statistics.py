"""Streaming: statistics taken call by call equal those of all rows at once."""

import types
from collections.abc import Sequence

import pytest
import torch
from oracles import mutant, naive_statistics
from torch import Tensor

from vlaquant.calibrate import ActStats
from vlaquant.calibrate import statistics as real_statistics
from vlaquant.calibrate.statistics import no_stats


def streamed(module: types.ModuleType, batches: Sequence[Tensor], sample_rows: int = 16) -> ActStats:
    running = module.no_stats(batches[0].shape[1], hessian=True, device=batches[0].device)
    for rows in batches:
        running = running.add(rows, sample_rows=sample_rows, seed=3)
    return running.stats


def uneven_batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(t, 6) * (1 + 5 * i) + i for i, t in enumerate((1, 40, 3, 7, 1, 90))]


def check_statistics(module: types.ModuleType) -> None:
    batches = uneven_batches()
    stats, wanted = streamed(module, batches), naive_statistics(torch.cat(batches))
    assert stats.tokens == 142
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(stats, name).double(), value, rtol=1e-5, atol=1e-6)


def test_streamed_statistics_match_naive_ones() -> None:
    check_statistics(real_statistics)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("before.tokens / tokens, 1.0 / tokens", "0.5, 0.5 / added"),
        ("addmm(hessian, rows.T, rows", "addmm(hessian, rows.T, rows.abs()"),
        ("rows.abs().sum(dim=0)", "rows.sum(dim=0)"),
        ("torch.minimum(before.channel_low, rows.amin", "torch.minimum(before.channel_low, rows.amax"),
        ("torch.maximum(-self.channel_low, self.channel_high)", "self.channel_high"),
    ],
)
def test_naive_statistics_notice_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_statistics(mutant(real_statistics, old, new))


def test_running_mean_stays_accurate_over_many_calls() -> None:
    rows = torch.randn(4000, 4) + 100.0
    stats = streamed(real_statistics, rows.split(2))
    wanted = naive_statistics(rows)["hessian"]
    assert stats.hessian is not None
    torch.testing.assert_close(stats.hessian.double(), wanted, rtol=1e-5, atol=0.0)


def test_adding_leaves_earlier_statistics_alone() -> None:
    before = no_stats(6, hessian=True, device=torch.device("cpu")).add(torch.ones(2, 6), sample_rows=4, seed=0)
    hessian, sample = (t.clone() for t in (before.stats.hessian, before.stats.sample) if t is not None)
    before.add(torch.full((3, 6), 9.0), sample_rows=4, seed=0)
    assert before.stats.hessian is not None
    assert torch.equal(before.stats.hessian, hessian)
    assert torch.equal(before.stats.sample, sample)


def test_sample_is_bounded_and_holds_real_tokens() -> None:
    batches = uneven_batches()
    for rows, size in ((16, 16), (500, 142), (0, 0)):
        sample = streamed(real_statistics, batches, sample_rows=rows).sample
        assert sample.shape == (size, 6)
        tokens = {tuple(token) for token in torch.cat(batches).tolist()}
        assert len({tuple(token) for token in sample.tolist()} & tokens) == size


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_sample_is_uniform_over_time(batch: int) -> None:
    """Each of 100 tokens is in a sample of 10 with probability 0.1, whenever it came and however it was batched."""
    rows = torch.arange(100.0).unsqueeze(1)
    counts = torch.zeros(100)
    for seed in range(150):
        running = no_stats(1, hessian=False, device=rows.device)
        for part in rows.split(batch):
            running = running.add(part, sample_rows=10, seed=1000 * seed)
        counts[running.stats.sample.flatten().long()] += 1
    assert counts.sum() == 150 * 10
    for quarter in counts.split(25):
        assert abs(float(quarter.mean()) - 15.0) < 1.5
    assert counts.max() < 35


def test_sample_depends_on_the_seed_only() -> None:
    rows = torch.randn(100, 3)

    def sample(seed: int) -> Tensor:
        start = no_stats(3, hessian=False, device=rows.device)
        return start.add(rows[:60], sample_rows=8, seed=seed).add(rows[60:], sample_rows=8, seed=seed).stats.sample

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
