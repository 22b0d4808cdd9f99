r"""Where a scale for each channel can hide: two modules that stay one function when both are changed.

With s > 0 for each input channel of the targets, their weights become W·diag(s), and their input is divided by s at the
source. A family declares places by name; the arithmetic is in :mod:`vlaquant.passes.fold`. What becomes of the source:

- RMSNorm x̂·w (Llama, Qwen): w/s.
- RMSNorm x̂·(1 + w) (Gemma, π's experts): (1 + w)/s − 1. Which of the two a norm is, is found by trying it.
- LayerNorm x̂·w + b (ViTs): w/s and b/s.
- A norm without a weight (DiT, GR00T's ``norm3``): there is nothing to divide, and so no fold.
- ``up`` → ``down`` of a gated MLP: rows and bias of ``up`` divided by s, as act(gate)·up is linear in up.
- ``v`` → ``o`` of an attention: rows and bias of ``v`` divided by s, as attention mixes tokens, not channels. With KV
  value heads of d channels for H query heads, query head h reads value head h // (H/KV). There are KV·d scales then,
  and column h·d + j of ``o`` has scale (h // (H/KV))·d + j.
- Adaptive norm x̂·(1 + scale) + shift with [scale; shift; gate] = W·c + b (π0.5, GR00T, DiT): rows of ``scale`` become
  W/s and (1 + b)/s − 1, rows of ``shift`` W/s and b/s, all others stay. Exact whatever made the condition c.

A LayerScale y = γ·(W·x + b) is a place of its own kind, without targets: W becomes diag(γ)·W, b becomes γ·b, and γ 1.

``fc1 → GELU → fc2`` has no fold, as GELU does not commute with a scale, and neither has a norm whose output anything
but Linears reads.

Sources: SmoothQuant, arXiv:2211.10438, section 4 (norms); AWQ, arXiv:2306.00978, and its code (values, gated MLPs);
LayerScale, arXiv:2103.17239, equation 4; adaptive norms, arXiv:2212.09748, section 3.2, of which the fold is a
rearrangement.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

#: Names of chunks that a fold changes; every other name stands for rows that it leaves alone.
SCALE, SHIFT = "scale", "shift"


@dataclass(frozen=True, slots=True)
class Fold:
    r"""Where scales can hide, for all blocks of a kind.

    All names are templates in which ``{block}`` stands for what ``block`` matched.

    Attributes:
        block: regular expression for the full name of a block, such as ``model\.layers\.\d+``.
        source: a norm, or a Linear whose rows are the targets' columns, or which makes an adaptive norm's scales.
        targets: every Linear that reads the source's output, also those that will stay float; a fold needs all of them.
        absent: modules that must not exist in the block, where the same names mean something else.
        present: modules that must exist in it.
        head_dim: for values, the attribute that tells the width of a head, such as ``{block}.self_attn.head_dim``.
            Without it values fold only where every query head has its own.
        chunks: for the Linear of an adaptive norm, what its rows are, in order and of equal length: ``scale``,
            ``shift``, and any other name for rows that have nothing to do with this norm.
        gamma: the parameter that multiplies the source's output; only for a LayerScale, which has no targets.
    """

    block: str
    source: str
    targets: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    head_dim: str | None = None
    chunks: tuple[str, ...] = ()
    gamma: str | None = None


@dataclass(frozen=True, slots=True)
class FoldGroup:
    """A fold found in a model: live module names.

    Attributes:
        source: as in :class:`Fold`.
        targets: as there.
        head_dim: width of a head, where several query heads read one value head.
        chunks: as there.
        gamma: name of a parameter, as there.
    """

    source: str
    targets: tuple[str, ...]
    head_dim: int | None = None
    chunks: tuple[str, ...] = ()
    gamma: str | None = None


def find_folds(model: nn.Module, folds: Sequence[Fold]) -> list[FoldGroup]:
    """Every place in ``model`` where a template fits: all modules exist, and there is no :func:`obstacle`."""
    found: dict[str, FoldGroup] = {}
    for group in _places(model, folds):
        if obstacle(model, group) is None:
            found.setdefault(group.source, group)
    return list(found.values())


def refused_folds(model: nn.Module, folds: Sequence[Fold]) -> dict[str, str]:
    """{source: reason} of the places where all modules of a template exist but no scale can be folded."""
    reasons = {group.source: obstacle(model, group) for group in _places(model, folds)}
    found = {group.source for group in find_folds(model, folds)}
    return {source: reason for source, reason in reasons.items() if reason is not None and source not in found}


def _places(model: nn.Module, folds: Sequence[Fold]) -> Iterator[FoldGroup]:
    modules = dict(model.named_modules())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for fold in folds:
        for block in (name for name in modules if re.fullmatch(fold.block, name)):
            source, *targets = (name.format(block=block) for name in (fold.source, *fold.targets))
            present = {name.format(block=block) for name in fold.present} | {source, *targets}
            absent = {name.format(block=block) for name in fold.absent}
            gamma = None if fold.gamma is None else fold.gamma.format(block=block)
            if present <= modules.keys() and not absent & modules.keys() and (gamma is None or gamma in parameters):
                head_dim = None if fold.head_dim is None else _number(model, fold.head_dim.format(block=block))
                yield FoldGroup(source, tuple(targets), head_dim, fold.chunks, gamma)


def _number(model: nn.Module, name: str) -> int | None:
    try:
        value = attrgetter(name)(model)
    except AttributeError:
        return None
    return value if type(value) is int else None


def obstacle(model: nn.Module, group: FoldGroup) -> str | None:
    """Why no scale can be folded here, or None if one can."""
    source = model.get_submodule(group.source)
    targets = [model.get_submodule(name) for name in group.targets]
    for name, target in zip(group.targets, targets, strict=True):
        if type(target) is not nn.Linear:
            return f"{name} is a {type(target).__name__}, and only exactly nn.Linear can be scaled"
    if group.gamma is not None:
        gamma = model.get_parameter(group.gamma)
        if type(source) is not nn.Linear or gamma.shape != (source.out_features,):
            return f"{group.gamma} of shape {list(gamma.shape)} is no factor for each row of {group.source}"
        return None
    widths = {target.in_features for target in targets if isinstance(target, nn.Linear)}
    if len(widths) != 1:
        return f"its readers have different widths: {sorted(widths)}"
    if isinstance(source, nn.Linear):
        return _linear_obstacle(source, group, widths.pop())
    weight = getattr(source, "weight", None)
    if not isinstance(weight, Tensor):
        return f"{type(source).__name__} has no parameter that could be divided"
    return None if weight.shape == (*widths,) else f"a weight of shape {list(weight.shape)} for {widths.pop()} channels"


def _linear_obstacle(source: nn.Linear, group: FoldGroup, columns: int) -> str | None:
    if type(source) is not nn.Linear:
        return f"it is a {type(source).__name__}, and only exactly nn.Linear can be divided"
    rows = source.out_features
    if group.chunks:
        if rows != len(group.chunks) * columns:
            return f"{rows} rows are not {len(group.chunks)} chunks ({', '.join(group.chunks)}) of {columns}"
        return None if source.bias is not None else "without a bias the 1 of 1 + scale cannot be divided"
    if rows == columns:
        return None
    head = group.head_dim
    if head is None:
        return f"{rows} rows for {columns} columns, and the width of a head is not known"
    return None if rows % head == 0 and columns % rows == 0 else f"{rows} rows for {columns} columns in heads of {head}"


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before multiplying: 1 for Gemma's RMSNorm, x̂·(1 + w), else 0.

    Found by trying: at w = 0 the output is offset·x̂, at w = 1 it is (1 + offset)·x̂.
    """
    trial = copy.deepcopy(norm).float()
    weight = trial.weight
    assert isinstance(weight, Tensor)
    if isinstance(getattr(trial, "bias", None), Tensor):
        nn.init.zeros_(trial.bias)  # type: ignore[arg-type]
    x = torch.linspace(-2.0, 3.0, len(weight), device=weight.device).unsqueeze(0)
    weight.zero_()
    at_zero = _first(trial(x))
    weight.fill_(1.0)
    at_one = _first(trial(x))
    step = at_one - at_zero
    return round(float((at_zero * step).sum() / step.square().sum()), 3)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a norm gives; those of π's Gemmas give a gate beside it."""
    return output[0] if isinstance(output, tuple) else output


def llama_folds(block: str, *, values: bool = True) -> tuple[Fold, ...]:
    """Folds of a Llama-like decoder block (Llama, Mistral, Qwen, Gemma).

    Args:
        block: regular expression for the full name of a block.
        values: whether a block's values are read by its own ``o_proj`` only. They are not where another module attends
            to this one's cache, as the action experts of π and SmolVLA do: leave them out there, on both sides.
    """
    gemma2 = ("{block}.pre_feedforward_layernorm", "{block}.post_feedforward_layernorm")
    attention = "{block}.self_attn"
    mlp = "{block}.mlp"
    folds = (
        Fold(block, "{block}.input_layernorm", tuple(f"{attention}.{name}_proj" for name in "qkv")),
        Fold(
            block,
            f"{attention}.v_proj",
            (f"{attention}.o_proj",),
            absent=(f"{attention}.attn_sub_norm", f"{attention}.v_norm"),
            head_dim=f"{attention}.head_dim",
        ),
        Fold(block, "{block}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), absent=gemma2),
        Fold(block, "{block}.pre_feedforward_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
        # Without a gate there is an activation between them, and it does not commute with a scale
        Fold(
            block,
            f"{mlp}.up_proj",
            (f"{mlp}.down_proj",),
            absent=(f"{mlp}.ffn_sub_norm",),
            present=(f"{mlp}.gate_proj",),
        ),
    )
    return folds if values else tuple(fold for fold in folds if not fold.source.endswith("v_proj"))
