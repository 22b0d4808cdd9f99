"""One scan: what each candidate would do to the action in each group of layers."""

import copy
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import spearmanr
from torch import nn

from vlaquant.calibrate import Flow
from vlaquant.engine.opening import Run
from vlaquant.engine.prediction import available_memory
from vlaquant.engine.run import QuantizationRun, RunOptions
from vlaquant.errors import CalibrationError, RecipeError
from vlaquant.plan import Plan, make_plan
from vlaquant.recipe import Budget, Recipe, load_recipe
from vlaquant.sensitivity.effects import Policy, policy_of, spread
from vlaquant.sensitivity.estimated import estimate
from vlaquant.sensitivity.groups import Group, candidate_plans, find_groups
from vlaquant.sensitivity.measured import Effects, measure
from vlaquant.sensitivity.rounding import Codes, round_groups
from vlaquant.terminal import bar, format_table

Method = Literal["estimated", "measured"]
#: Bytes that the header of a file spends on a tensor beside the name of its module, at most.
_HEADER = 150
#: Tensors of a packed Linear beside its bias: codes, scales, zero points, shape.
_TENSORS = 4
_EVERY: tuple[Method, ...] = ("estimated", "measured")


@dataclass(frozen=True, slots=True)
class Scan:
    """The sensitivity of every group to every candidate. ``str(scan)`` is a table.

    Attributes:
        candidates: names of schemes, as the budget lists them.
        groups: of layers, in the order of the model.
        measured: effect by name -> [groups][candidates]; the first one is what budgets add up. None if not measured.
        estimated: [groups][candidates], in units of the first measured effect; None if not estimated.
        fixed_bytes: of all tensors that are in no group.
        header_bytes: that the headers of the written files take, at most.
        samples: how many observations were looked at.
        seconds: what each step took.
        dtype: that the model computed in.
        recipe: resolved, without its model and output.
    """

    candidates: tuple[str, ...]
    groups: tuple[Group, ...]
    measured: Effects | None
    estimated: list[list[float]] | None
    fixed_bytes: int
    header_bytes: int
    samples: int
    seconds: dict[str, float]
    dtype: str
    recipe: dict[str, Any]

    def costs(self, method: Method) -> list[list[float]]:
        """What a budget adds up, [groups][candidates].

        Raises:
            RecipeError: the scan was not made by this method.
        """
        measured = None if self.measured is None else next(iter(self.measured.values()))
        found = measured if method == "measured" else self.estimated
        if found is None:
            raise RecipeError(f"the scan holds no {method} sensitivities; make one with --{method}")
        return found

    def rank_correlation(self) -> dict[str, float] | None:
        """Spearman's ρ of measured and estimated over the groups, for each candidate, and over all pairs (``all``)."""
        if self.measured is None or self.estimated is None:
            return None
        measured, estimated = (np.asarray(self.costs(method)) for method in ("measured", "estimated"))
        pairs = {name: (measured[:, c], estimated[:, c]) for c, name in enumerate(self.candidates)}
        pairs["all"] = measured.ravel(), estimated.ravel()
        return {name: float(spearmanr(*pair).statistic) for name, pair in pairs.items() if len(pair[0]) > 1}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": "sensitivity",
            "candidates": list(self.candidates),
            "groups": [group.to_dict() for group in self.groups],
            "measured": self.measured,
            "estimated": self.estimated,
            "rank_correlation": self.rank_correlation(),
            "fixed_bytes": self.fixed_bytes,
            "header_bytes": self.header_bytes,
            "samples": self.samples,
            "seconds": self.seconds,
            "dtype": self.dtype,
            "recipe": self.recipe,
        }

    @classmethod
    def read(cls, path: Path) -> "Scan":
        """Inverse of :meth:`to_dict`, from a file.

        Raises:
            RecipeError: no such file, or another kind of content.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                tuple(values["candidates"]),
                tuple(Group.from_dict(group) for group in values["groups"]),
                values["measured"],
                values["estimated"],
                values["fixed_bytes"],
                values["header_bytes"],
                values["samples"],
                values["seconds"],
                values["dtype"],
                values["recipe"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path}: no scan of vlaquant sensitivity --json: {error!r}") from error

    def __str__(self) -> str:
        lines: list[str] = []
        for name, values in self._columns().items():
            rows = [("layers", "part", "weights", *self.candidates)]
            for group, costs in zip(self.groups, values, strict=True):
                rows.append((group.label, group.part, f"{group.weights:,}", *(f"{cost:.3g}" for cost in costs)))
            lines += [name, format_table(rows), ""]
        lines.append(f"{self.samples} samples; {self._effects()}")
        correlation = self.rank_correlation()
        if correlation is not None:
            each = ", ".join(f"{name} {value:.3f}" for name, value in correlation.items())
            lines.append(f"Spearman's ρ of measured and estimated: {each}")
        lines.append("; ".join(f"{step}: {seconds:.1f} s" for step, seconds in self.seconds.items()))
        return "\n".join(lines)

    def _columns(self) -> dict[str, list[list[float]]]:
        """Heading -> figures [groups][candidates]: the estimate, and all measured effects."""
        estimated = {} if self.estimated is None else {"estimated": self.estimated}
        return estimated | (self.measured or {})

    def _effects(self) -> str:
        names = list(self.measured or {})
        return f"measured: {', '.join(names)}" if names else "estimated"


def sensitivity(
    model_or_path: nn.Module | str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    samples: Sequence[Any] | None = None,
    run: Run | None = None,
    *,
    methods: Collection[Method] = _EVERY,
    options: RunOptions | None = None,
    progress: bool = False,
) -> Scan:
    """What each candidate of ``recipe.budget`` would do to the action in each group of layers, all others being float.

    The model is held in memory as a whole, in float32 if that fits. A model that is passed in is copied.

    Args:
        model_or_path: a float checkpoint directory, or a loaded model.
        recipe: says which layers, candidates, quantizer and data; without a budget the default candidates are taken.
        samples: calibration data, in place of what the recipe names.
        run: as for :func:`vlaquant.quantize`; it has to return the tensor that is the model's answer.
        methods: ``estimated``, ``measured`` or both.
        options: memory limit and device.
        progress: show progress bars on standard error.

    Raises:
        VlaquantError: the recipe, the model or the data. See :mod:`vlaquant.errors`.
    """
    recipe = load_recipe(recipe)
    budget = recipe.budget or Budget()
    if isinstance(model_or_path, nn.Module):
        model_or_path = copy.deepcopy(model_or_path)
    options = options or RunOptions()
    with QuantizationRun(model_or_path, recipe, None, options, show=False) as job:
        model, family = job.opened.model.to(options.device), job.opened.family
        data, made = job.observe(make_plan(model, family, recipe), samples, run)
        if data is None:
            raise CalibrationError("sensitivity is found on data: add a `calibration:` section, or pass samples=")
        plans = candidate_plans(model, family, recipe, budget)
        groups = find_groups(model, made, plans, data.shared, budget)
        fixed = made.bytes_after - sum(made.quantized[name].bytes_after for group in groups for name in group.names)
        started = time.perf_counter()
        codes = round_groups(model, family, data, groups, plans, recipe)
        seconds = {"rounding": time.perf_counter() - started}
        dtype = _widen_(model)
        policy = policy_of(model, family, run)
        positions = spread(budget.samples, len(data.samples))
        common = (model, policy, data.samples, positions, groups, codes)
        found = _scan(common, methods, recipe.seed, data.flow, show=progress)
    return Scan(
        budget.candidates,
        groups,
        found.get("measured"),
        found.get("estimated"),
        fixed,
        _header_bytes(model, made),
        len(positions),
        seconds | found["seconds"],
        dtype,
        recorded(recipe),
    )


def recorded(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a scan keeps it: what it depends on."""
    return {name: value for name, value in recipe.resolved().items() if name not in {"model", "output"}}


def _header_bytes(model: nn.Module, plan: Plan) -> int:
    """An upper bound: names, and what is said about each tensor; packed layers and tables hold more than one."""
    names = [*model.state_dict(), *(one.name for one in plan.covered for _ in range(_TENSORS))]
    return _HEADER + sum(len(name) + _HEADER for name in names)


def _widen_(model: nn.Module) -> str:
    """Float32 where it fits the memory, as the noise of bfloat16 hides small effects; no gradients of weights."""
    model.requires_grad_(False)  # noqa: FBT003
    needed = sum(4 * parameter.numel() for parameter in model.parameters())
    if needed < (available_memory() or 0) / 2:
        model.float()
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _scan(
    common: tuple[nn.Module, Policy, Sequence[Any], Sequence[int], Sequence[Group], Codes],
    methods: Collection[Method],
    seed: int,
    flow: Flow,
    *,
    show: bool,
) -> dict[str, Any]:
    count = len(common[3])

    def watched(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        return lambda items: bar(items, label, total=count, show=show)

    found: dict[str, Any] = {"seconds": {}}
    for method in (one for one in _EVERY if one in methods):
        started = time.perf_counter()
        if method == "estimated":
            found[method] = estimate(*common, watched("estimating"), seed=seed)
        else:
            found[method] = measure(*common, watched("measuring"), flow)
        found["seconds"][method] = time.perf_counter() - started
    return found


def write_scan(path: Path, values: Mapping[str, Any]) -> None:
    """Write a scan's plain values as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
