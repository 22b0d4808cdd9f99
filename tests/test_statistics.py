"""Intervals and tests against other people's code, against counting by hand, and over all counts."""

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from vlaquant.evaluate.figures import Groups, compared_means, mean
from vlaquant.evaluate.statistics import bootstrap, divided, mcnemar, paired_rates, quantile_interval, wilson

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
DISCORDANT = st.tuples(st.integers(0, 60), st.integers(0, 60))


@given(COUNTS)
def test_wilson_is_that_of_scipy(counts: tuple[int, int]) -> None:
    theirs = binomtest(*counts).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(*counts) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(COUNTS)
def test_wilson_is_that_of_statsmodels(counts: tuple[int, int]) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    theirs = proportion.proportion_confint(*counts, alpha=0.05, method="wilson")
    assert wilson(*counts) == pytest.approx(theirs, abs=1e-9)


@given(DISCORDANT)
def test_mcnemar_is_that_of_statsmodels(counts: tuple[int, int]) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    lost, won = counts
    if lost + won == 0:
        assert mcnemar(lost, won) == 1.0
        return
    theirs = tables.mcnemar([[10, lost], [won, 20]], exact=True).pvalue
    assert mcnemar(lost, won) == pytest.approx(theirs, abs=1e-9)


@given(DISCORDANT)
def test_mcnemar_by_counting(counts: tuple[int, int]) -> None:
    """Twice the tail of a fair coin's throws, at most 1."""
    lost, won = counts
    total, fewer = lost + won, min(counts)
    tail = sum(comb(total, heads) for heads in range(fewer + 1)) / 2**total
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail), abs=1e-9)
    assert mcnemar(lost, won) == mcnemar(won, lost)


@given(COUNTS)
def test_wilson_holds_the_rate_and_stays_in_range(counts: tuple[int, int]) -> None:
    successes, trials = counts
    low, high = wilson(successes, trials)
    assert 0.0 <= low <= successes / trials <= high <= 1.0
    assert (low, high) == pytest.approx(tuple(1 - end for end in reversed(wilson(trials - successes, trials))))


def test_wilson_of_a_textbook_case() -> None:
    assert wilson(45, 50) == pytest.approx((0.786, 0.957), abs=1e-3)


def test_no_differing_pair_is_no_certainty() -> None:
    low, high = paired_rates(0, 0, 100)
    assert low == -high
    assert 0.02 < high < 0.04
    assert paired_rates(10, 2, 20)[0] < -0.4 < paired_rates(10, 2, 20)[1]
    assert paired_rates(20, 0, 20)[0] >= -1.0


@pytest.mark.parametrize(("lose", "win"), [(0.05, 0.05), (0.2, 0.05), (0.02, 0.0), (0.3, 0.3)])
def test_the_paired_interval_covers_what_it_says(lose: float, win: float) -> None:
    """The chance that the interval holds the true difference, over all outcomes of 30 pairs."""
    pairs, covered = 30, 0.0
    for lost, won in product(range(pairs + 1), repeat=2):
        if lost + won > pairs:
            continue
        ways = comb(pairs, lost) * comb(pairs - lost, won)
        chance = ways * lose**lost * win**won * (1 - lose - win) ** (pairs - lost - won)
        low, high = paired_rates(lost, won, pairs)
        covered += chance * (low <= win - lose <= high)
    assert 0.93 < covered <= 1.0


def test_the_bootstrap_covers_the_mean_of_episodes() -> None:
    """Episodes differ more than the observations in one: intervals over observations would be far too narrow."""
    rng = np.random.default_rng(0)
    held = naive = 0
    for _ in range(200):
        values = (rng.normal(size=(20, 1)) + 0.1 * rng.normal(size=(20, 15))).reshape(-1)
        figure = mean(values, Groups.of(np.repeat(np.arange(20), 15).tolist()), "action", "observations")
        assert figure.low is not None
        assert figure.high is not None
        held += figure.low <= 0.0 <= figure.high
        naive += abs(values.mean()) <= 1.96 * values.std() / np.sqrt(len(values))
    assert 0.88 <= held / 200 <= 0.99
    assert naive / 200 < 0.6


def test_the_bootstrap_of_two_episodes_by_hand() -> None:
    """Both twice, or each once: the mean is 0, 1 or 2."""
    found = bootstrap(np.array([[0.0, 1.0], [2.0, 1.0]]), lambda sums: sums[:, 0] / sums[:, 1])
    assert found == (0.0, 2.0)
    assert bootstrap(np.array([[1.0, 1.0]]), lambda sums: sums[:, 0]) is None


def test_equal_models_have_exact_figures() -> None:
    values = np.random.default_rng(0).random(40)
    found = compared_means(values, values, Groups.of([i // 4 for i in range(40)]), "action", "observations")
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == (1.0, 1.0, 1.0)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.0, 0.0, 0.0)


def test_pairs_are_drawn_together() -> None:
    """The difference is the same in every episode, however much the episodes differ: it has no uncertainty."""
    values = np.random.default_rng(0).normal(size=40)
    found = compared_means(values, values + 1.0, Groups.of(list(range(40))), "action", "observations")
    assert (found.difference.low, found.difference.high) == pytest.approx((1.0, 1.0))
    assert found.reference.high is not None
    assert found.reference.low is not None
    assert found.reference.high - found.reference.low > 0.3


@settings(max_examples=20)
@given(st.integers(1, 500), st.sampled_from([0.5, 0.95, 0.99]))
def test_the_interval_of_a_quantile_covers_it(count: int, share: float) -> None:
    """By the exact chance that so many of the values are below the quantile."""
    low, high = quantile_interval(np.arange(1, count + 1, dtype=float), share)
    first = 0 if low is None else int(low)
    last = count if high is None else int(high) - 1
    chances = [comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(first, last + 1)]
    assert sum(chances) > 0.9499


def test_a_quantile_that_few_values_cannot_bound() -> None:
    low, high = quantile_interval([1.0, 2.0, 3.0], 0.99)
    assert high is None
    assert low is not None
    assert quantile_interval(np.arange(1000.0), 0.99)[1] is not None


def test_quotients_with_nothing_below() -> None:
    assert divided([0.0, 1.0, 6.0], [0.0, 0.0, 2.0]).tolist() == [1.0, np.inf, 3.0]
    assert np.isnan(divided(np.nan, 0.0))
