"""Recipe × model → a verdict and a reason for every weight, before any work is done."""

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlaquant.errors import PlanError
from vlaquant.families import Family
from vlaquant.linear import empty_linear, empty_table, is_replaceable, table_kind, table_objection
from vlaquant.plan.verdicts import LayerPlan, OtherTensor, Plan, TablePlan
from vlaquant.recipe import Recipe, Rotation, Rule
from vlaquant.recipe.words import did_you_mean
from vlaquant.scheme import Scheme


def make_plan(model: nn.Module, family: Family, recipe: Recipe) -> Plan:
    """Decide what becomes of every weight. Works on the meta device; changes nothing.

    Raises:
        PlanError: a rule that decides nothing, a group size that does not divide, or an embodiment that is not there.
    """
    kinds = {name: _kind(module) for name, module in model.named_modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parts = {name: family.part_of(name) for name, kind in kinds.items() if kind is not None}
    chosen = {name: _first_match(name, part, kinds[name], recipe.rules) for name, part in parts.items()}
    _check_rules(recipe.rules, chosen, parts, kinds)
    dead = family.dead(model)
    tied = _tied(model)
    # Of a tensor with two names, the first one's owner has the bytes
    sizes = {name: _tensor_bytes(parameter) for name, parameter in model.named_parameters()}
    layers = []
    problems: list[str] = []
    for name, module in linears.items():
        rule = chosen[name]
        obstacle = is_replaceable(model, name) or tied.get(name)
        if rule is not None and rule.pattern is None:
            obstacle = obstacle or family.why_float(name)
        scheme, reason = _verdict(module, rule, recipe, obstacle, dead.get(name), problems, name)
        before = sum(sizes.get(f"{name}.{leaf}", 0) for leaf, _ in module.named_parameters(recurse=False))
        layers.append(
            LayerPlan(
                name=name,
                part=parts[name],
                shape=(module.out_features, module.in_features),
                scheme=scheme,
                reason=reason,
                dead=name in dead,
                bytes_before=before,
                bytes_after=before if scheme is None else packed_bytes(module, scheme),
            )
        )
    problems += _unknown_parts(recipe, {layer.part for layer in layers if layer.scheme is not None})
    if problems:
        raise PlanError("\n".join(problems))
    tables = _tables(model, parts, chosen, tied, sizes)
    known = {*linears, *(table.name for table in tables)}
    return Plan(family.name, tuple(layers), _others(model, known), tables)


def _kind(module: nn.Module) -> str | None:
    return "linear" if isinstance(module, nn.Linear) else table_kind(module)


def _tables(
    model: nn.Module,
    parts: Mapping[str, str],
    chosen: Mapping[str, Rule | None],
    tied: Mapping[str, str],
    sizes: Mapping[str, int],
) -> tuple[TablePlan, ...]:
    """Verdicts on the embeddings and banks that some rule is about."""
    tables = []
    for name, rule in chosen.items():
        module = model.get_submodule(name)
        kind = table_kind(module)
        if kind is None or rule is None:
            continue
        scheme, kept, reason = rule.resolve_scheme(), rule.embodiment, f"rule '{rule.target}'"
        shape = tuple(module.get_parameter("weight" if kind == "embedding" else "W").shape)
        obstacle = table_objection(module) or tied.get(name)
        if obstacle is not None:
            scheme, kept, reason = None, None, obstacle
        if kept is not None and kept >= shape[0]:
            raise PlanError(
                f"{name}: rule '{rule.target}' keeps embodiment {kept}, and the bank has the numbers 0 to "
                f"{shape[0] - 1}; see embodiment_id.json"
            )
        before = sum(sizes.get(f"{name}.{leaf}", 0) for leaf, _ in module.named_parameters(recurse=False))
        after = before
        if scheme is not None or kept is not None:
            after = sum(_tensor_bytes(one) for one in empty_table(module, scheme, kept).state_dict().values())
        tables.append(TablePlan(name, kind, parts[name], shape, scheme, kept, reason, before, after))
    return tuple(tables)


def _first_match(name: str, part: str, kind: str | None, rules: tuple[Rule, ...]) -> Rule | None:
    return next((rule for rule in rules if rule.modules == kind and rule.matches(name, part)), None)


def _check_rules(
    rules: tuple[Rule, ...],
    chosen: Mapping[str, Rule | None],
    parts: Mapping[str, str],
    kinds: Mapping[str, str | None],
) -> None:
    for position, rule in enumerate(rules, start=1):
        if any(match is rule for match in chosen.values()):
            continue
        matched = [name for name in chosen if rule.matches(name, parts[name])]
        alike = [name for name in chosen if kinds[name] == rule.modules]
        taken = len(set(matched) & set(alike))
        if taken:
            raise PlanError(
                f"rule {position} ({rule.target}) decides nothing: earlier rules take all {taken} layers that it "
                "matches. Move it up or delete it"
            )
        here = sorted({parts[name] for name in alike})
        known = here if rule.part is not None else alike
        near = difflib.get_close_matches(rule.target, known, n=3, cutoff=0.4) or known[:3]
        what = "Linear layers" if rule.modules == "linear" else f"modules of kind {rule.modules}"
        hint = f"; it matches {matched[0]}, for which it needs 'modules: {kinds[matched[0]]}'" if matched else ""
        raise PlanError(
            f"rule {position} ({rule.target}) matches none of the {len(alike)} {what}; "
            f"parts of this model: {', '.join(here)}; nearest: {', '.join(near)}{hint}"
        )


def _unknown_parts(recipe: Recipe, quantized: set[str]) -> list[str]:
    """Complaints about transforms for parts in which there is nothing to do."""
    return [
        f"transforms[{position}] ({transform.kind}): no layer of part {part!r} is quantized; parts with quantized "
        f"layers: {', '.join(sorted(quantized)) or 'none'}{did_you_mean(part, quantized)}"
        for position, transform in enumerate(recipe.transforms)
        if not isinstance(transform, Rotation)
        for part in transform.parts or ()
        if part not in quantized
    ]


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
    reason = rule.why or f"rule '{rule.target}'"
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


def packed_bytes(module: nn.Linear, scheme: Scheme) -> int:
    """Bytes of a Linear in the file: codes, scales, zero points, shape and bias."""
    rows, columns = module.out_features, module.in_features
    with torch.device("meta"):
        empty = empty_linear(columns, rows, scheme, bias=module.bias is not None, dtype=module.weight.dtype)
    return sum(_tensor_bytes(tensor) for tensor in empty.state_dict().values())


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


def _others(model: nn.Module, known: set[str]) -> tuple[OtherTensor, ...]:
    """Parameters of all modules but the ``known`` ones."""
    others = []
    for name, parameter in model.named_parameters():
        owner_name, _, _ = name.rpartition(".")
        if owner_name in known:
            continue
        kind = type(model.get_submodule(owner_name)).__name__
        others.append(OtherTensor(name, kind, _tensor_bytes(parameter), parameter.numel()))
    return tuple(others)


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
