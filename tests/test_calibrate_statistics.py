"""Streaming: statistics taken call by call, in any order and in any split, equal those of all rows at once."""

import itertools
import types
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from oracles import correlated_inputs, mutant, naive_statistics
from torch import Tensor
from watched import FIELDS, assert_same

from vlaquant.calibrate import statistics as real_statistics
from vlaquant.calibrate.statistics import RunningStats, final_stats, merge, no_stats, row_keys

CPU = torch.device("cpu")


def running_of(
    batches: Sequence[Tensor],
    indices: Sequence[int] | None = None,
    *,
    sample_rows: int = 16,
    seed: int = 3,
    hessian: bool = True,
    module: types.ModuleType = real_statistics,
) -> RunningStats:
    """Sums over samples ``indices`` of ``batches``, one call each."""
    running = module.no_stats(batches[0].shape[1], hessian=hessian, sample_rows=sample_rows, device=CPU)
    for index in range(len(batches)) if indices is None else indices:
        running.add_(batches[index], module.row_keys(len(batches[index]), seed=seed, sample=index, call=0))
    return running


def uneven_batches(k: int = 6) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(t, k) * (1 + 5 * i) + i for i, t in enumerate((1, 40, 3, 7, 1, 90))]


def check_statistics(module: types.ModuleType) -> None:
    # Narrower than a strip of the triangle, and wider than two
    for k in (6, 530):
        batches = uneven_batches(k)
        stats, wanted = running_of(batches, module=module).stats(), naive_statistics(torch.cat(batches))
        assert stats.tokens == 142
        for name, value in wanted.items():
            torch.testing.assert_close(getattr(stats, name).double(), value, rtol=1e-5, atol=1e-4)
        assert stats.hessian is not None
        assert torch.equal(stats.hessian, stats.hessian.T)


def test_streamed_statistics_match_naive_ones() -> None:
    check_statistics(real_statistics)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("strip / self._total", "strip / (self._total - 1)"),
        ("start + _STRIP].T @ z[:, start:]", "start + _STRIP].T @ z[:, start:].abs()"),
        ("start = i * _STRIP", "start = 0 * _STRIP"),
        ("= upper.T", "= upper.T.abs()"),
        ("corner.triu() + corner.triu(1).T", "corner.triu()"),
        ("rows.abs().sum(dim=0)", "rows.sum(dim=0)"),
        ("torch.minimum(self.channel_low, rows.amin", "torch.minimum(self.channel_low, rows.amax"),
        ("torch.maximum(-self.channel_low, self.channel_high)", "self.channel_high"),
    ],
)
def test_naive_statistics_notice_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_statistics(mutant(real_statistics, old, new))


def check_two_chains(module: types.ModuleType) -> None:
    for k in (6, 300, 530):
        seen, floats = uneven_batches(k), [batch + 0.1 * batch.roll(1, -1) for batch in uneven_batches(k)]
        running = module.no_stats(k, hessian=True, sample_rows=16, device=CPU, paired=True)
        for index, pair in enumerate(zip(seen, floats, strict=True)):
            keys = module.row_keys(len(pair[0]), seed=3, sample=index, call=0)
            running.add_(torch.cat(pair, dim=1), keys)
        stats, one = running.stats(), running_of(seen).stats()
        x, drift = torch.cat(seen).double(), (torch.cat(floats) - torch.cat(seen)).double()
        assert (stats.tokens, stats.sample.shape) == (142, (16, k))
        for name in ("channel_low", "channel_high", "mean_abs", "sample"):
            assert torch.equal(getattr(stats, name), getattr(one, name)), name
        wanted = {"hessian": x.T @ x, "cross": drift.T @ x, "drift": drift.T @ drift}
        for name, value in wanted.items():
            torch.testing.assert_close(getattr(stats, name).double(), value / 142, rtol=1e-4, atol=1e-3)


def test_second_moments_of_two_chains_match_naive_ones() -> None:
    check_two_chains(real_statistics)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[rows, floats - rows]", "[rows, rows - floats]"),
        ("[rows, floats - rows]", "[rows, floats]"),
        ("cross=moments[k:, :k]", "cross=moments[:k, k:]"),
        ("drift=moments[k:, k:]", "drift=moments[:k, :k]"),
        ("width = 2 * features if paired else features", "width = features"),
    ],
)
def test_naive_moments_notice_a_broken_copy(old: str, new: str) -> None:
    broken = mutant(real_statistics, old, new)
    with pytest.raises((AssertionError, RuntimeError)):
        check_two_chains(broken)


def test_many_calls_stay_accurate() -> None:
    rows = torch.randn(4000, 4) + 100.0
    hessian = running_of(rows.split(2)).stats().hessian
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), naive_statistics(rows)["hessian"], rtol=2e-7, atol=0.0)


def check_any_split(module: types.ModuleType) -> None:
    """Every order, and every split over processes merged in every way, gives the same bits."""
    samples = [correlated_inputs(20 + 13 * (i % 4), 300, seed=i) * (1.0 + i) for i in range(12)]
    wanted = running_of(samples, module=module).stats()
    for seed in range(8):
        random = np.random.default_rng(seed)
        order = random.permutation(12).tolist()
        assert_same(running_of(samples, order, module=module).stats(), wanted)
        ends = [0, *sorted(random.integers(0, 13, size=seed % 4).tolist()), 12]
        parts = [running_of(samples, order[a:b], module=module) for a, b in itertools.pairwise(ends)]
        while len(parts) > 1:
            first, second = (parts.pop(int(random.integers(len(parts)))) for _ in range(2))
            parts.append(module.merge(first, second))
        assert_same(parts[0].stats(), wanted)


def test_any_order_and_any_split_of_samples_give_the_same_bits() -> None:
    check_any_split(real_statistics)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dtype=torch.float64, device=device)\n            for", "device=device)\n            for"),
        ("abs_sum=torch.zeros(features, dtype=torch.float64", "abs_sum=torch.zeros(features, dtype=torch.float32"),
        ("every.argsort()[: self", "torch.arange(len(every))[: self"),
        ("= every[kept]\n", "= every[kept].sort(descending=True).values\n"),
        ("default_rng((seed, sample, call))", "default_rng((seed, count, call))"),
        ("self.tokens += other.tokens", "pass"),
        ("strip.add_(others)", "strip.copy_(others)"),
    ],
)
def test_comparison_of_splits_notices_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_any_split(mutant(real_statistics, old, new))


def test_merging_leaves_both_parts_alone() -> None:
    batches = uneven_batches()
    a, b = running_of(batches, [0, 1]), running_of(batches, [2, 3])
    before = a.stats(), b.stats()
    merged = merge(a, b)
    merged.add_(batches[4], row_keys(1, seed=3, sample=4, call=0))
    assert merged.tokens == 52
    assert_same(a.stats(), before[0])
    assert_same(b.stats(), before[1])


def test_merging_with_nothing_changes_nothing() -> None:
    some = running_of(uneven_batches())
    nothing = no_stats(6, hessian=True, sample_rows=16, device=CPU)
    assert_same(merge(some, nothing).stats(), some.stats())
    assert_same(merge(nothing, some).stats(), some.stats())


def test_means_that_were_taken_do_not_change_with_the_sums() -> None:
    batches = uneven_batches()
    running = running_of(batches, [0, 1])
    early = running.stats()
    copies = {name: getattr(early, name).clone() for name in FIELDS}
    running.add_(batches[5], row_keys(90, seed=3, sample=5, call=0))
    assert all(torch.equal(getattr(early, name), copy) for name, copy in copies.items())
    assert not torch.equal(running.stats().mean_abs, early.mean_abs)


def test_sums_begun_in_inference_mode_grow_outside_of_it() -> None:
    batches = uneven_batches()
    with torch.inference_mode():
        running = running_of([batch.clone() for batch in batches], [0, 1, 2])
    for index in (3, 4, 5):
        running.add_(batches[index], row_keys(len(batches[index]), seed=3, sample=index, call=0))
    assert_same(running.stats(), running_of(batches).stats())


def test_final_statistics_are_shared_as_the_sums_are() -> None:
    one, other = running_of(uneven_batches()), running_of(uneven_batches(), [0])
    stats = final_stats({"q": one, "o": other, "k": one})
    assert list(stats) == ["q", "o", "k"]
    assert stats["q"] is stats["k"]
    assert stats["q"] is not stats["o"]
    assert_same(stats["o"], other.stats())


def test_no_hessian_costs_nothing() -> None:
    running = running_of(uneven_batches(), hessian=False)
    assert running.strips == []
    assert running.stats().hessian is None


def test_only_one_half_of_the_hessian_is_kept() -> None:
    running = no_stats(2048, hessian=True, sample_rows=1, device=CPU)
    values = sum(strip.numel() for strip in running.strips)
    assert values < 0.65 * 2048 * 2048


def test_sample_is_bounded_and_holds_real_tokens() -> None:
    batches = uneven_batches()
    for rows, size in ((16, 16), (500, 142), (0, 0)):
        sample = running_of(batches, sample_rows=rows).stats().sample
        assert sample.shape == (size, 6)
        tokens = {tuple(token) for token in torch.cat(batches).tolist()}
        assert len({tuple(token) for token in sample.tolist()} & tokens) == size


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_sample_is_uniform_over_time(batch: int) -> None:
    """Each of 100 tokens is in a sample of 10 with probability 0.1, whenever it came and however it was batched."""
    parts = torch.arange(100.0).unsqueeze(1).split(batch)
    counts = torch.zeros(100)
    for seed in range(150):
        sample = running_of(parts, sample_rows=10, seed=seed, hessian=False).sample
        counts[sample.flatten().long()] += 1
    assert counts.sum() == 150 * 10
    for quarter in counts.split(25):
        assert abs(float(quarter.mean()) - 15.0) < 1.5
    assert counts.max() < 35


def test_keys_depend_on_seed_sample_call_and_row() -> None:
    keys = row_keys(50, seed=1, sample=2, call=3)
    assert torch.equal(keys, row_keys(50, seed=1, sample=2, call=3))
    assert torch.equal(keys[:20], row_keys(20, seed=1, sample=2, call=3))
    others = [row_keys(50, seed=s, sample=i, call=c) for s, i, c in ((0, 2, 3), (1, 3, 2), (1, 2, 0), (2, 1, 3))]
    assert len(torch.cat([keys, *others]).unique()) == 250
