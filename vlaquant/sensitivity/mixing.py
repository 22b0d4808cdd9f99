"""Mixed precision: a scan and a budget → a scheme for each layer, written as rules."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from vlaquant.errors import PlanError, RecipeError
from vlaquant.families import Family
from vlaquant.plan import MIXED
from vlaquant.recipe import Budget, Recipe, Rule
from vlaquant.scheme import Granularity
from vlaquant.sensitivity.knapsack import cheapest
from vlaquant.sensitivity.scan import Method, Scan

_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Mixture:
    """A candidate for each group of a scan.

    Attributes:
        scan: what it was chosen by.
        choice: index of the candidate of each group.
        method: whose costs decided.
    """

    scan: Scan
    choice: tuple[int, ...]
    method: Method

    @property
    def cost(self) -> float:
        """The summed sensitivities."""
        costs = self.scan.costs(self.method)
        return sum(costs[g][c] for g, c in enumerate(self.choice))

    @property
    def bits(self) -> float:
        """Stored bits of a weight, on average."""
        return 8 * sum(self._taken("weight_bytes")) / sum(group.weights for group in self.scan.groups)

    @property
    def bytes(self) -> int:
        """Of all tensors of the model."""
        return self.scan.fixed_bytes + sum(self._taken("bytes"))

    def _taken(self, what: str) -> list[int]:
        names = self.scan.candidates
        groups = zip(self.scan.groups, self.choice, strict=True)
        return [getattr(group, what)[names[option]] for group, option in groups]

    def raised(self) -> "Mixture | None":
        """One step more precise: the groups that together make half of the cost take their next better candidate.

        The dearest first; None if no group has a better candidate.
        """
        costs = self.scan.costs(self.method)
        better = {g: _next_better(self, g) for g in range(len(self.choice))}
        open_groups = sorted((g for g in better if better[g] is not None), key=lambda g: -costs[g][self.choice[g]])
        if not open_groups:
            return None
        choice = list(self.choice)
        half = sum(costs[g][self.choice[g]] for g in open_groups) / 2
        for g in open_groups:
            option = better[g]
            assert option is not None
            choice[g] = option
            half -= costs[g][self.choice[g]]
            if half <= 0:
                break
        return replace(self, choice=tuple(choice))

    def __str__(self) -> str:
        counts = [f"{self.choice.count(c)} × {name}" for c, name in enumerate(self.scan.candidates)]
        return (
            f"{self.bits:.3f} bits a weight, {self.bytes / 2**20:.2f} MiB, {self.method} cost {self.cost:.4g}: "
            f"{', '.join(counts)} groups of layers"
        )


def _next_better(mixture: Mixture, g: int) -> int | None:
    """The lightest candidate of a group that takes more bytes than its own; None if it has the heaviest."""
    names, group = mixture.scan.candidates, mixture.scan.groups[g]
    own = group.bytes[names[mixture.choice[g]]]
    heavier = [c for c, name in enumerate(names) if group.bytes[name] > own]
    return min(heavier, key=lambda c: group.bytes[names[c]], default=None)


def mix(scan: Scan, budget: Budget) -> Mixture:
    """The mixture with the least summed sensitivity under a budget of bits, size or latency.

    Raises:
        PlanError: no mixture meets it; the message has the range that can be reached.
        RecipeError: the budget has no limit, or the table of latencies lacks a shape.
    """
    if tuple(budget.candidates) != scan.candidates:
        raise RecipeError(
            f"budget.candidates are {', '.join(budget.candidates)}, and the scan was made with "
            f"{', '.join(scan.candidates)}; make it again (vlaquant sensitivity)"
        )
    if budget.bits is not None:
        return _within_bits(scan, budget, budget.bits)
    if budget.size is not None:
        return _within_size(scan, budget, budget.size)
    if budget.latency is not None and budget.latency_ms is not None:
        return _within_latency(scan, budget, budget.latency, budget.latency_ms)
    raise RecipeError("budget: has no limit to share out; add bits, size, latency or max_action_l1")


def _within_bits(scan: Scan, budget: Budget, bits: float) -> Mixture:
    total = sum(group.weights for group in scan.groups)
    weights = _of(scan, "weight_bytes")
    least, most = (8 * _ends(weights)[end] / total for end in (0, 1))
    if bits < least:
        raise PlanError(_out_of_range("bits", f"{bits:g}", f"{least:.3f} to {most:.3f} bits a weight"))
    return _solved(scan, budget, weights, int(bits * total / 8 + 1e-9))


def _within_size(scan: Scan, budget: Budget, size: int) -> Mixture:
    fixed = scan.fixed_bytes + scan.header_bytes
    weights = _of(scan, "bytes")
    least, most = (fixed + end for end in _ends(weights))
    if size < least:
        raise PlanError(_out_of_range("size", f"{size:,} bytes", f"{least:,} to {most:,} bytes"))
    return _solved(scan, budget, weights, size - fixed)


def _within_latency(scan: Scan, budget: Budget, path: Path, limit_ms: float) -> Mixture:
    medians = read_latencies(path, budget.tokens)
    weights = []
    for group in scan.groups:
        row = []
        for candidate in scan.candidates:
            layers = zip(group.shapes, group.schemes[candidate], strict=True)
            keys = [(f"{n}x{k}", scheme.name) for (n, k), scheme in layers]
            missing = next((key for key in keys if key not in medians), None)
            if missing is not None:
                shapes = sorted({f"{n}x{k}" for one in scan.groups for n, k in one.shapes})
                raise RecipeError(
                    f"{path}: no median of {missing[1]} at {missing[0]} with {budget.tokens} tokens; measure all "
                    f"shapes and candidates: vlaquant bench --shapes {','.join(shapes)} --tokens {budget.tokens} "
                    f"--schemes {','.join(scan.candidates)} --json {path.name}"
                )
            row.append(max(round(sum(medians[key] for key in keys) * _NS_PER_MS), 1))
        weights.append(row)
    least, most = (end / _NS_PER_MS for end in _ends(weights))
    if limit_ms < least:
        raise PlanError(_out_of_range("latency_ms", f"{limit_ms:g}", f"{least:.3f} to {most:.3f} ms"))
    return _solved(scan, budget, weights, int(limit_ms * _NS_PER_MS))


def read_latencies(path: Path, tokens: int) -> dict[tuple[str, str], float]:
    """(``OUTxIN``, scheme) -> median of vlaquant's layer in milliseconds, from ``vlaquant bench --shapes --json``.

    Raises:
        RecipeError: no such table.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        ours = [row for row in rows if row["kind"] == "layer" and row["tokens"] == tokens]
        return {(row["shape"], row["scheme"]): float(row["median_ms"]) for row in ours}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: no table of vlaquant bench --shapes --json: {error!r}") from error


def _of(scan: Scan, what: str) -> list[list[int]]:
    return [[getattr(group, what)[candidate] for candidate in scan.candidates] for group in scan.groups]


def _ends(weights: Sequence[Sequence[int]]) -> tuple[int, int]:
    return sum(min(row) for row in weights), sum(max(row) for row in weights)


def _out_of_range(what: str, wanted: str, possible: str) -> str:
    return (
        f"budget.{what}: {wanted} cannot be reached; the candidates reach {possible}. Ask for more, or add a candidate "
        "with fewer bits"
    )


def _solved(scan: Scan, budget: Budget, weights: Sequence[Sequence[int]], limit: int) -> Mixture:
    return Mixture(scan, tuple(cheapest(scan.costs(budget.method), weights, limit)), budget.method)


def with_rules(recipe: Recipe, mixture: Mixture, model: nn.Module, family: Family) -> Recipe:
    """The recipe with one rule for each layer of the mixture, and without its budget, which they have used up.

    What is left has nothing to decide: read again, it does the same.

    Args:
        recipe: whose rules decide about all other layers; those that nothing is left for are dropped.
        mixture: says which layer gets which scheme.
        model: for the names of all Linears; may be on the meta device.
        family: for their parts.
    """
    rules = {name: _rule(mixture, g, name) for g, group in enumerate(mixture.scan.groups) for name in group.names}
    left = [
        (name, family.part_of(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in rules
    ]
    deciding = [
        next((i for i, rule in enumerate(recipe.rules) if rule.modules == "linear" and rule.matches(*one)), None)
        for one in left
    ]
    others = [rule for i, rule in enumerate(recipe.rules) if rule.modules != "linear" or i in deciding]
    return recipe.model_copy(update={"rules": (*rules.values(), *others), "budget": None, "on_miss": "fail"})


def _rule(mixture: Mixture, g: int, name: str) -> Rule:
    scan, group, chosen = mixture.scan, mixture.scan.groups[g], mixture.choice[g]
    costs = scan.costs(mixture.method)[g]
    scheme = group.schemes[scan.candidates[chosen]][group.names.index(name)]
    better = _next_better(mixture, g)
    other = "" if better is None else f", {scan.candidates[better]} {costs[better]:.3g}"
    weight = scheme.weight
    whole: Literal["tensor", "channel"] = "tensor" if weight.granularity is Granularity.TENSOR else "channel"
    return Rule(
        pattern=name,
        scheme="w4a16",
        bits=weight.bits,
        symmetric=weight.symmetric,
        group_size=weight.group_size or whole,
        why=f"{MIXED}{scheme.name} costs {costs[chosen]:.3g}{other}",
    )
