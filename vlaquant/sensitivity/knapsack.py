"""One option for each group, the cheapest within a limit: the multiple-choice knapsack problem, solved exactly."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from vlaquant.errors import PlanError

#: The solver stops within 1e-6 of the best sum; costs are scaled so that the best known sum is this.
_SCALE = 1e3
_ROUNDS = 8


def cheapest(costs: ArrayLike, weights: ArrayLike, limit: int) -> list[int]:
    """The option of each group with the least Σ costs among all choices with Σ weights ≤ limit.

    Solved by HiGHS through ``scipy.optimize.milp``. Costs may differ by many orders of magnitude, and the solver's
    tolerance is absolute: a solution is used as a bound that rules out dearer options and scales the next solution,
    until it gets no better.

    Args:
        costs: ≥ 0, [groups, options].
        weights: whole numbers > 0, [groups, options].
        limit: for the sum of weights.

    Returns:
        The option of each group; of equally cheap ones the lightest.

    Raises:
        PlanError: even the lightest options together are too heavy, or the solver failed.
    """
    cost, weight = np.asarray(costs, dtype=np.float64), np.asarray(weights, dtype=np.int64)
    chosen = np.array([np.lexsort((cost[g], weight[g]))[0] for g in range(len(cost))])
    if _sum(weight, chosen) > limit:
        raise PlanError(f"no choice fits: the least weight is {_sum(weight, chosen):.0f}, the limit {limit}")
    useful = _undominated(cost, weight)
    for _ in range(_ROUNDS):
        bound = _sum(cost, chosen)
        if bound == 0.0:
            break
        found = _solve(cost * (_SCALE / bound), weight, limit, useful & (cost <= bound))
        if found is None or _sum(weight, found) > limit:
            raise PlanError("the solver found no choice where there is one; use another limit")
        if not _sum(cost, found) < bound:
            break
        chosen = found
    return [int(option) for option in chosen]


def _sum(values: NDArray[np.generic], chosen: NDArray[np.int64]) -> float:
    return float(values[np.arange(len(values)), chosen].sum())


def _undominated(cost: NDArray[np.float64], weight: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Options to which no other of the group is preferable: lighter and not dearer, or cheaper and not heavier."""
    better = (weight[:, None, :] <= weight[:, :, None]) & (cost[:, None, :] <= cost[:, :, None])
    strictly = (weight[:, None, :] < weight[:, :, None]) | (cost[:, None, :] < cost[:, :, None])
    dominated: NDArray[np.bool_] = np.any(better & strictly, axis=2)
    return ~dominated


def _solve(
    cost: NDArray[np.float64], weight: NDArray[np.int64], limit: int, allowed: NDArray[np.bool_]
) -> NDArray[np.int64] | None:
    groups, options = cost.shape
    one_each = np.kron(np.eye(groups), np.ones(options))
    unit = int(np.gcd.reduce(weight.ravel()))
    result = milp(
        np.where(allowed, cost, 0.0).ravel(),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((weight // unit).reshape(1, -1), -np.inf, limit // unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    return None if result.x is None else result.x.reshape(groups, options).argmax(axis=1)
