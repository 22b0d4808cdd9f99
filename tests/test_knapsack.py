"""The choice under a budget against trying everything."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaquant.errors import PlanError
from vlaquant.sensitivity import knapsack
from vlaquant.sensitivity.knapsack import cheapest


def total(values: Any, choice: Any) -> float:
    return float(sum(row[option] for row, option in zip(values, choice, strict=True)))


def by_trying_everything(costs: Any, weights: Any, limit: int) -> float:
    """The least cost of all choices that fit."""
    options = [range(len(row)) for row in costs]
    fitting = [choice for choice in itertools.product(*options) if total(weights, choice) <= limit]
    return min(total(costs, choice) for choice in fitting)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], int]:
    groups, options = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    exponents = st.floats(-9.0, 3.0)
    costs = [[draw(st.sampled_from([0.0, 10 ** draw(exponents)])) for _ in range(options)] for _ in range(groups)]
    weights = [[draw(st.integers(1, 50)) * 16 for _ in range(options)] for _ in range(groups)]
    least, most = (sum(end(row) for row in weights) for end in (min, max))
    return costs, weights, draw(st.integers(least, most))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_as_cheap_as_the_best_of_all_choices(problem: tuple[list[list[float]], list[list[int]], int]) -> None:
    costs, weights, limit = problem
    choice = cheapest(costs, weights, limit)
    assert total(weights, choice) <= limit
    assert total(costs, choice) == pytest.approx(by_trying_everything(costs, weights, limit), rel=1e-6, abs=0.0)


#: Taking the best gain per byte first ends with cost 9; the best choice costs 1.
GREED_LOSES = ([[10.0, 1.0], [10.0, 0.0]], [[1, 10], [1, 11]], 12)


def test_greed_would_not_pass() -> None:
    costs = [[6.0, 0.0], [5.0, 0.0], [5.0, 0.0]]
    weights = [[1, 7], [1, 6], [1, 6]]
    limit = 13
    gains = sorted(range(3), key=lambda g: -(costs[g][0] - costs[g][1]) / (weights[g][1] - weights[g][0]))
    choice = [0, 0, 0]
    for g in gains:
        if total(weights, [*choice[:g], 1, *choice[g + 1 :]]) <= limit:
            choice[g] = 1
    assert total(costs, choice) > by_trying_everything(costs, weights, limit)
    assert total(costs, cheapest(costs, weights, limit)) == by_trying_everything(costs, weights, limit)


def test_the_oracle_notices_a_solver_that_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_ROUNDS", 0)
    costs, weights, limit = GREED_LOSES
    assert total(costs, cheapest(costs, weights, limit)) != by_trying_everything(costs, weights, limit)


def test_costs_of_very_different_sizes() -> None:
    """One group is hopeless at every option that fits, and the choice among the others must still be exact."""
    rng = np.random.default_rng(0)
    costs = [[1e6, 1e5], *(sorted(10 ** rng.uniform(-8, -3, 3), reverse=True)[:2] for _ in range(9))]
    weights = [[4, 8], *([int(w), int(w) * 2] for w in rng.integers(3, 9, 9))]
    limit = sum(row[0] for row in weights) + 15
    choice = cheapest(costs, weights, limit)
    assert total(costs, choice) == pytest.approx(by_trying_everything(costs, weights, limit), rel=1e-13)


def test_equally_cheap_options_take_the_lightest() -> None:
    assert cheapest([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]], [[9, 4, 6], [3, 2, 1]], 100) == [1, 0]


def test_nothing_fits() -> None:
    with pytest.raises(PlanError, match="least weight is 30, the limit 29"):
        cheapest([[1.0, 2.0]] * 3, [[10, 20]] * 3, 29)
