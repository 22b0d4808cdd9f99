"""Recipe × model → a verdict and a reason for every weight, before any work is done."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vlaquant.errors import PlanError
from vlaquant.families import Family
from vlaquant.linear import is_replaceable
from vlaquant.recipe import Recipe, Rule
from vlaquant.scheme import Granularity, Scheme, scheme_from_dict, scheme_to_dict

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The verdict on one ``nn.Linear``.

    Attributes:
        shape: [out_features, in_features].
        scheme: how it will be quantized; None keeps it float.
        reason: why, in words.
        dead: no output depends on it, so it gets no calibration data and is rounded without.
        bytes_before: weight and bias as they are in the model.
        bytes_after: packed codes, scales, zero points and bias.
    """

    name: str
    part: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str
    dead: bool
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A parameter that belongs to no ``nn.Linear``: vlaquant leaves it as it is."""

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every weight of the model, with what becomes of it. ``str(plan)`` is a table."""

    family: str
    layers: tuple[LayerPlan, ...]
    others: tuple[OtherTensor, ...]

    @property
    def quantized(self) -> dict[str, LayerPlan]:
        """The layers that get a scheme, by name."""
        return {layer.name: layer for layer in self.layers if layer.scheme is not None}

    @property
    def bytes_before(self) -> int:
        """All weights of the model as it is."""
        return sum(layer.bytes_before for layer in self.layers) + sum(other.bytes for other in self.others)

    @property
    def bytes_after(self) -> int:
        """All weights once quantized."""
        return sum(layer.bytes_after for layer in self.layers) + sum(other.bytes for other in self.others)

    def __str__(self) -> str:
        rows = [("part", "scheme", "layers", "MiB before", "MiB after", "reason")]
        for part, scheme, reason in dict.fromkeys(_row_key(layer) for layer in self.layers):
            same = [layer for layer in self.layers if _row_key(layer) == (part, scheme, reason)]
            before, after = sum(layer.bytes_before for layer in same), sum(layer.bytes_after for layer in same)
            rows.append((part, scheme, str(len(same)), f"{before / _MIB:.2f}", f"{after / _MIB:.2f}", reason))
        for kind in dict.fromkeys(other.kind for other in self.others):
            same_kind = [other for other in self.others if other.kind == kind]
            size = f"{sum(other.bytes for other in same_kind) / _MIB:.2f}"
            rows.append(("-", "float", str(len(same_kind)), size, size, f"{kind}: not an nn.Linear"))
        before, after = self.bytes_before, self.bytes_after
        rows.append(
            ("total", "", "", f"{before / _MIB:.2f}", f"{after / _MIB:.2f}", f"{before / max(after, 1):.2f}x smaller")
        )
        return format_table(rows)

    def layer_table(self) -> str:
        """One line a layer, and one for every other tensor."""
        rows = [("name", "shape", "part", "scheme", "bytes before", "bytes after", "reason")]
        for layer in self.layers:
            scheme = "float" if layer.scheme is None else layer.scheme.name
            shape = "x".join(map(str, layer.shape))
            sizes = (f"{layer.bytes_before:,}", f"{layer.bytes_after:,}")
            rows.append((layer.name, shape, layer.part, scheme, *sizes, layer.reason))
        for other in self.others:
            sizes = (f"{other.bytes:,}", f"{other.bytes:,}")
            rows.append((other.name, "", "-", "float", *sizes, f"{other.kind}: not an nn.Linear"))
        return format_table(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "family": self.family,
            "layers": [
                {
                    field: getattr(layer, field)
                    for field in ("name", "part", "reason", "dead", "bytes_before", "bytes_after")
                }
                | {"shape": list(layer.shape), "scheme": None if layer.scheme is None else scheme_to_dict(layer.scheme)}
                for layer in self.layers
            ],
            "others": [{"name": other.name, "kind": other.kind, "bytes": other.bytes} for other in self.others],
        }


def plan_from_dict(data: dict[str, Any]) -> Plan:
    """Inverse of :meth:`Plan.to_dict`."""
    layers = []
    for layer in data["layers"]:
        scheme = None if layer["scheme"] is None else scheme_from_dict(layer["scheme"])
        layers.append(LayerPlan(**{**layer, "shape": tuple(layer["shape"]), "scheme": scheme}))
    return Plan(data["family"], tuple(layers), tuple(OtherTensor(**other) for other in data["others"]))


def format_table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of cells as aligned text; the first row is the heading."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _row_key(layer: LayerPlan) -> tuple[str, str, str]:
    return layer.part, "float" if layer.scheme is None else layer.scheme.name, layer.reason


def make_plan(model: nn.Module, family: Family, recipe: Recipe) -> Plan:
    """Decide what becomes of every weight. Works on the meta device; changes nothing.

    Raises:
        PlanError: a rule that decides nothing, or a group size that does not divide.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parts = {name: family.part_of(name) for name in linears}
    chosen = {name: _first_match(name, parts[name], recipe.rules) for name in linears}
    _check_rules(recipe.rules, chosen, parts)
    dead = family.dead(model)
    tied = _tied(model)
    layers = []
    problems: list[str] = []
    for name, module in linears.items():
        rule = chosen[name]
        obstacle = is_replaceable(model, name) or tied.get(name)
        scheme, reason = _verdict(module, rule, recipe, obstacle, dead.get(name), problems, name)
        layers.append(
            LayerPlan(
                name=name,
                part=parts[name],
                shape=(module.out_features, module.in_features),
                scheme=scheme,
                reason=reason,
                dead=name in dead,
                bytes_before=_float_bytes(module),
                bytes_after=_float_bytes(module) if scheme is None else packed_bytes(module, scheme),
            )
        )
    if problems:
        raise PlanError("\n".join(problems))
    return Plan(family.name, tuple(layers), _others(model, linears))


def _first_match(name: str, part: str, rules: tuple[Rule, ...]) -> Rule | None:
    return next((rule for rule in rules if rule.matches(name, part)), None)


def _check_rules(rules: tuple[Rule, ...], chosen: dict[str, Rule | None], parts: dict[str, str]) -> None:
    for position, rule in enumerate(rules, start=1):
        if any(match is rule for match in chosen.values()):
            continue
        taken = sum(rule.matches(name, parts[name]) for name in chosen)
        if taken:
            raise PlanError(
                f"rule {position} ({rule.target}) decides nothing: earlier rules take all {taken} layers that it "
                "matches. Move it up or delete it"
            )
        known = sorted(set(parts.values())) if rule.part is not None else list(chosen)
        near = difflib.get_close_matches(rule.target, known, n=3, cutoff=0.4) or known[:3]
        raise PlanError(
            f"rule {position} ({rule.target}) matches none of the {len(chosen)} Linear layers; "
            f"parts of this model: {', '.join(sorted(set(parts.values())))}; nearest: {', '.join(near)}"
        )


def _verdict(
    module: nn.Linear,
    rule: Rule | None,
    recipe: Recipe,
    obstacle: str | None,
    dead: str | None,
    problems: list[str],
    name: str,
) -> tuple[Scheme | None, str]:
    if rule is None:
        return None, "no rule matches"
    scheme = rule.resolve_scheme()
    if scheme is None:
        return None, f"rule '{rule.target}'"
    if obstacle is not None:
        return None, obstacle
    reason = f"rule '{rule.target}'"
    if dead is not None:
        if scheme.activation is not None and not scheme.activation.dynamic:
            return None, f"unused ({dead}), so its activation range is unknown"
        reason += f"; unused: {dead}"
    group = scheme.weight.group_size
    if group is None or module.in_features % group == 0:
        return scheme, reason
    return _indivisible(
        module.in_features, scheme, rule.on_indivisible or recipe.on_indivisible, reason, problems, name
    )


def _indivisible(
    columns: int, scheme: Scheme, choice: str, reason: str, problems: list[str], name: str
) -> tuple[Scheme | None, str]:
    group = scheme.weight.group_size
    assert group is not None
    legal = legal_groups(columns)
    note = f"{reason}; {columns} columns do not divide into groups of {group}"
    if choice == "keep":
        return None, f"{note}: kept float"
    if choice == "channel":
        return scheme.with_weight(group_size="channel"), f"{note}: one scale a row"
    smaller = [size for size in legal if size < group]
    if choice == "nearest" and smaller:
        return scheme.with_weight(group_size=smaller[-1]), f"{note}: groups of {smaller[-1]}"
    problems.append(
        f"{name}: in_features={columns} is not a multiple of group_size={group}; legal group sizes here: "
        f"{', '.join(map(str, legal)) or 'none'}. Set group_size, or on_indivisible: nearest | channel | keep"
    )
    return None, note


def legal_groups(columns: int) -> list[int]:
    """Group sizes that divide ``columns`` and that kernels can use: multiples of 16, at most 256."""
    return [size for size in range(16, min(columns, 256) + 1, 16) if columns % size == 0]


def _float_bytes(module: nn.Linear) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters(recurse=False))


def packed_bytes(module: nn.Linear, scheme: Scheme) -> int:
    """Bytes of a Linear in the packed format: codes, scales, zero points, shape and bias."""
    rows, columns = module.out_features, module.in_features
    weight, activation = scheme.weight, scheme.activation
    element = module.weight.element_size()
    groups = columns // weight.group_size if weight.group_size else 1
    scales = 1 if weight.granularity is Granularity.TENSOR else rows * groups
    total = scales * element + (0 if module.bias is None else rows * element)
    if activation is None:
        total += rows * math.ceil(columns * weight.bits / 32) * 4 + 16
        zero_rows = 1 if weight.granularity is Granularity.TENSOR else rows
        return total + (0 if weight.symmetric else math.ceil(zero_rows * weight.bits / 32) * 4 * groups)
    total += rows * columns + (0 if weight.symmetric else scales)
    return total + (0 if activation.dynamic else element + (0 if activation.symmetric else 1))


def _tied(model: nn.Module) -> dict[str, str]:
    """Linears whose weight is also another module's parameter: {Linear: reason}."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    reasons = {}
    for names in owners.values():
        for name in names:
            others = [other for other in names if other != name]
            if others:
                reasons[name] = f"its weight is shared with {', '.join(others)}"
    return reasons


def _others(model: nn.Module, linears: dict[str, nn.Linear]) -> tuple[OtherTensor, ...]:
    others = []
    for name, parameter in model.named_parameters():
        owner_name, _, _ = name.rpartition(".")
        if owner_name in linears:
            continue
        kind = type(model.get_submodule(owner_name)).__name__
        others.append(OtherTensor(name, kind, _tensor_bytes(parameter)))
    return tuple(others)


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def with_dead(plan: Plan, never_ran: Iterable[str]) -> Plan:
    """The plan after a probe run: layers that never ran are rounded without data, or kept if they would need some."""
    dead = set(never_ran)
    layers = []
    for layer in plan.layers:
        if layer.name not in dead or layer.dead or layer.scheme is None:
            layers.append(layer)
        elif layer.scheme.activation is not None and not layer.scheme.activation.dynamic:
            reason = "never ran on the probe sample, so its activation range is unknown"
            layers.append(replace(layer, scheme=None, reason=reason, dead=True, bytes_after=layer.bytes_before))
        else:
            layers.append(replace(layer, reason=f"{layer.reason}; never ran on the probe sample", dead=True))
    return replace(plan, layers=tuple(layers))


def without(plan: Plan, reasons: dict[str, str]) -> Plan:
    """The plan with some layers kept float after all: {name: reason}."""
    layers = tuple(
        replace(layer, scheme=None, reason=reasons[layer.name], bytes_after=layer.bytes_before)
        if layer.name in reasons
        else layer
        for layer in plan.layers
    )
    return replace(plan, layers=layers)
