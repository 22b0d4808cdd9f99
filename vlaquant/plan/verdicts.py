"""A verdict and a reason for every weight, as plain values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlaquant.scheme import Scheme, scheme_from_dict, scheme_to_dict
from vlaquant.terminal import format_table

_MIB = 2**20
#: How the reasons begin that a budget gives, each layer one of its own.
MIXED = "mixed: "


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
class TablePlan:
    """The verdict on an embedding or a bank that some rule is about.

    Attributes:
        kind: ``embedding`` or ``bank``.
        shape: of its weight: [rows, columns], or [categories, inputs, outputs].
        scheme: how it will be stored; None leaves its values float.
        kept: of a bank, the only category that will be left; None keeps all.
        reason: why, in words.
        bytes_before: all its parameters as they are in the model.
        bytes_after: all its tensors in the file.
    """

    name: str
    kind: str
    part: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    kept: int | None
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def replaced(self) -> bool:
        """Whether another module takes its place."""
        return self.scheme is not None or self.kept is not None

    @property
    def stored(self) -> str:
        """The scheme, and what is left of a bank."""
        scheme = "float" if self.scheme is None else self.scheme.name
        return scheme if self.kept is None else f"{scheme}, 1 of {self.shape[0]}"


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A parameter that no rule is about, or can be: vlaquant leaves it as it is.

    Attributes:
        kind: class of the module that holds it.
        parameters: how many numbers it has.
    """

    name: str
    kind: str
    bytes: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every weight of the model, with what becomes of it. ``str(plan)`` is a table."""

    family: str
    layers: tuple[LayerPlan, ...]
    others: tuple[OtherTensor, ...]
    tables: tuple[TablePlan, ...] = ()

    @property
    def covered(self) -> tuple["LayerPlan | TablePlan", ...]:
        """All that rules are about."""
        return (*self.layers, *self.tables)

    @property
    def quantized(self) -> dict[str, LayerPlan]:
        """The layers that get a scheme, by name."""
        return {layer.name: layer for layer in self.layers if layer.scheme is not None}

    @property
    def replaced_tables(self) -> dict[str, TablePlan]:
        """The embeddings and banks that another module takes the place of, by name."""
        return {table.name: table for table in self.tables if table.replaced}

    @property
    def bytes_before(self) -> int:
        """All weights of the model as it is."""
        return sum(one.bytes_before for one in self.covered) + sum(one.bytes for one in self.others)

    @property
    def bytes_after(self) -> int:
        """All weights once quantized."""
        return sum(one.bytes_after for one in self.covered) + sum(one.bytes for one in self.others)

    def __str__(self) -> str:
        rows = [("part", "scheme", "layers", "MiB before", "MiB after", "reason")]
        rows_of: dict[tuple[str, str, str], list[LayerPlan | TablePlan]] = {}
        for one in self.covered:
            rows_of.setdefault(_row_key(one), []).append(one)
        for (part, scheme, reason), same in rows_of.items():
            before, after = sum(one.bytes_before for one in same), sum(one.bytes_after for one in same)
            rows.append((part, scheme, str(len(same)), f"{before / _MIB:.2f}", f"{after / _MIB:.2f}", reason))
        for kind, found in self.not_covered.items():
            size = f"{sum(other.bytes for other in found) / _MIB:.2f}"
            numbers = sum(other.parameters for other in found)
            rows.append(("-", "float", str(len(found)), size, size, f"not covered: {kind}, {numbers:,} parameters"))
        before, after = self.bytes_before, self.bytes_after
        rows.append(
            ("total", "", "", f"{before / _MIB:.2f}", f"{after / _MIB:.2f}", f"{before / max(after, 1):.2f}x smaller")
        )
        return format_table(rows)

    @property
    def not_covered(self) -> dict[str, list[OtherTensor]]:
        """Tensors that no rule is about, by the class of the module that holds them; the largest class first."""
        kinds: dict[str, list[OtherTensor]] = {}
        for other in self.others:
            kinds.setdefault(other.kind, []).append(other)
        return dict(sorted(kinds.items(), key=lambda item: -sum(other.bytes for other in item[1])))

    def layer_table(self) -> str:
        """One line a layer, and one for every other tensor; above them their part and the reason that they share."""
        rows: list[tuple[str, ...]] = [("name", "shape", "scheme", "bytes before", "bytes after")]
        above = ""
        for one in self.covered:
            _, scheme, _ = _row_key(one)
            kind = f"{one.kind}: " if isinstance(one, TablePlan) else ""
            heading = f"{one.part}: {kind}{one.reason}"
            if heading != above:
                rows.append((heading,))
                above = heading
            sizes = (f"{one.bytes_before:,}", f"{one.bytes_after:,}")
            rows.append((f"  {one.name}", "x".join(map(str, one.shape)), scheme, *sizes))
        for kind, found in self.not_covered.items():
            rows.append((f"not covered: {kind}",))
            rows += [(f"  {other.name}", "", "float", *2 * (f"{other.bytes:,}",)) for other in found]
        return format_table(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "family": self.family,
            "layers": [_fields(layer, "name", "part", "reason", "dead") for layer in self.layers],
            "tables": [_fields(table, "name", "kind", "part", "kept", "reason") for table in self.tables],
            "others": [
                {"name": one.name, "kind": one.kind, "bytes": one.bytes, "parameters": one.parameters}
                for one in self.others
            ],
        }


def _fields(one: LayerPlan | TablePlan, *names: str) -> dict[str, Any]:
    scheme = None if one.scheme is None else scheme_to_dict(one.scheme)
    plain = {name: getattr(one, name) for name in (*names, "bytes_before", "bytes_after")}
    return plain | {"shape": list(one.shape), "scheme": scheme}


def plan_from_dict(data: dict[str, Any]) -> Plan:
    """Inverse of :meth:`Plan.to_dict`."""
    return Plan(
        data["family"],
        tuple(LayerPlan(**_values(layer)) for layer in data["layers"]),
        tuple(OtherTensor(**other) for other in data["others"]),
        tuple(TablePlan(**_values(table)) for table in data["tables"]),
    )


def _values(data: Mapping[str, Any]) -> dict[str, Any]:
    scheme = None if data["scheme"] is None else scheme_from_dict(data["scheme"])
    return {**data, "shape": tuple(data["shape"]), "scheme": scheme}


def _row_key(one: LayerPlan | TablePlan) -> tuple[str, str, str]:
    if isinstance(one, TablePlan):
        return one.part, one.stored, f"{one.kind}: {one.reason}"
    reason = "mixed precision" if one.reason.startswith(MIXED) else one.reason
    return one.part, "float" if one.scheme is None else one.scheme.name, reason


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
