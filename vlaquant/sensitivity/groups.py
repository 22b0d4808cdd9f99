"""Which layers are given one scheme together, and what each candidate would make of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vlaquant.errors import PlanError
from vlaquant.families import Family
from vlaquant.linear import empty_linear
from vlaquant.plan import Plan, make_plan
from vlaquant.recipe import Budget, Recipe, pattern_matches
from vlaquant.scheme import Scheme, scheme_from_dict, scheme_to_dict

#: Leaves of a packed Linear that are not stored bits of its weight.
_NOT_WEIGHT = ("bias", "weight_shape")


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that read the same tensor (q/k/v, gate/up), or a single one.

    Attributes:
        names: of the layers.
        part: of the model.
        shapes: [out_features, in_features] of each.
        weights: numbers in all their weights.
        bytes: candidate -> bytes of these layers in the file.
        weight_bytes: candidate -> bytes of codes, scales and zero points alone.
        schemes: candidate -> the scheme of each layer; they differ where groups do not divide its columns.
    """

    names: tuple[str, ...]
    part: str
    shapes: tuple[tuple[int, int], ...]
    weights: int
    bytes: dict[str, int]
    weight_bytes: dict[str, int]
    schemes: dict[str, tuple[Scheme, ...]]

    @property
    def label(self) -> str:
        """Its name, or the names of several in short: ``layers.3.self_attn.(q_proj|k_proj)``."""
        owner = self.names[0].rpartition(".")[0]
        if len(self.names) == 1 or any(name.rpartition(".")[0] != owner for name in self.names):
            return self.names[0] if len(self.names) == 1 else " + ".join(self.names)
        return f"{owner}.({'|'.join(name.rpartition('.')[2] for name in self.names)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        schemes = {name: [scheme_to_dict(one) for one in found] for name, found in self.schemes.items()}
        return asdict(self) | {"schemes": schemes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Group":
        """Inverse of :meth:`to_dict`, also after a way through JSON."""
        return cls(
            names=tuple(values["names"]),
            part=values["part"],
            shapes=tuple((n, k) for n, k in values["shapes"]),
            weights=values["weights"],
            bytes=dict(values["bytes"]),
            weight_bytes=dict(values["weight_bytes"]),
            schemes={name: tuple(map(scheme_from_dict, found)) for name, found in values["schemes"].items()},
        )


def candidate_plans(model: nn.Module, family: Family, recipe: Recipe, budget: Budget) -> dict[str, Plan]:
    """Candidate -> the plan in which it stands in every rule that quantizes Linears."""
    plans = {}
    for candidate in budget.candidates:
        rules = []
        for rule in recipe.rules:
            if rule.modules == "linear" and rule.resolve_scheme() is not None:
                size = rule.group_size if budget.group_size is None else budget.group_size
                rule = rule.model_copy(update={"scheme": candidate, "bits": None, "group_size": size})  # noqa: PLW2901
            rules.append(rule)
        plans[candidate] = make_plan(model, family, recipe.model_copy(update={"rules": tuple(rules)}))
    return plans


def find_groups(
    model: nn.Module,
    plan: Plan,
    plans: Mapping[str, Plan],
    shared: Sequence[tuple[str, ...]],
    budget: Budget,
) -> tuple[Group, ...]:
    """The live layers that the budget is about, in the order of the model.

    Args:
        model: for the sizes.
        plan: as the rules have it; layers that it keeps float, and dead ones, are in no group.
        plans: of the candidates.
        shared: sets of layers that read the very same tensors.
        budget: says which layers.

    Raises:
        PlanError: no layer is left.
    """
    free = [
        name
        for name, layer in plan.quantized.items()
        if not layer.dead
        and layer.scheme is not None
        and layer.scheme.activation is None
        and all(name in other.quantized for other in plans.values())
        and (budget.layers is None or pattern_matches(budget.layers, name))
    ]
    if not free:
        raise PlanError(
            "no layer is left to share precision out to: those that no rule quantizes, that round activations or that "
            "nothing reads are left as they are"
        )
    readers = {name: names for names in shared for name in names}
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in free:
        sets.setdefault(readers.get(name, (name,)), []).append(name)
    return tuple(_group(model, names, plan, plans) for names in sets.values())


def _group(model: nn.Module, names: Sequence[str], plan: Plan, plans: Mapping[str, Plan]) -> Group:
    layers = [plan.quantized[name] for name in names]
    chosen = {candidate: [other.quantized[name] for name in names] for candidate, other in plans.items()}
    return Group(
        names=tuple(names),
        part=layers[0].part,
        shapes=tuple(layer.shape for layer in layers),
        weights=sum(n * k for n, k in (layer.shape for layer in layers)),
        bytes={candidate: sum(layer.bytes_after for layer in found) for candidate, found in chosen.items()},
        weight_bytes={
            candidate: sum(weight_bytes(model, layer.name, layer.scheme) for layer in found if layer.scheme)
            for candidate, found in chosen.items()
        },
        schemes={
            candidate: tuple(layer.scheme for layer in found if layer.scheme) for candidate, found in chosen.items()
        },
    )


def weight_bytes(model: nn.Module, name: str, scheme: Scheme) -> int:
    """Bytes of codes, scales and zero points of a Linear in a scheme."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    with torch.device("meta"):
        empty = empty_linear(module.in_features, module.out_features, scheme, bias=False, dtype=module.weight.dtype)
    return sum(tensor.nbytes for leaf, tensor in empty.state_dict().items() if leaf not in _NOT_WEIGHT)
