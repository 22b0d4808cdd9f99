"""What vlaquant must know about a kind of model: names, and how to load and run it. No algorithm lives here."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

#: Tensors that go into the model once, by name; what verification stores to repeat a run in another process.
Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Fold:
    r"""Where a scale per channel can hide: ``source``'s output is divided by s, the ``targets``' columns multiplied.

    ``source`` and ``targets`` are templates in which ``{block}`` stands for what ``block`` matched.

    Attributes:
        block: regular expression for the full name of a block, such as ``model\.layers\.\d+``.
        source: a norm, or a Linear whose rows are the targets' columns.
        targets: every Linear that reads the source's output; a fold needs all of them.
        absent: modules that must not exist in the block, where the same names mean something else.
        present: modules that must exist in it.
    """

    block: str
    source: str
    targets: tuple[str, ...]
    absent: tuple[str, ...] = ()
    present: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoldGroup:
    """A fold found in a model: live module names."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of model.

    Attributes:
        name: as in ``family:`` of a recipe.
        parts: (part name, regular expression for full module names); the first match names a module's part.
        folds: scaling opportunities for SmoothQuant and AWQ.
        owns: whether a live model belongs to this family.
        owns_config: whether a directory with this ``config.json`` does.
        load: directory -> model with its weights, in evaluation mode.
        build: directory -> the same model without weights (parameters on the meta device, buffers real).
        dead: model -> {Linear name: why no action depends on it}.
        inputs: (model, sample) -> tensors for one run.
        run: (model, inputs) -> output tensor; the policy's real path.
        example: model -> inputs of a made-up sample, for comparing outputs where there is no data.
        check: (model, inputs) -> None; raises CalibrationError on a model that must not be calibrated.
        episode_samples: (directory, split, count, dataset name) -> recorded observations; None where there are none.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    folds: tuple[Fold, ...]
    owns: Callable[[nn.Module], bool]
    owns_config: Callable[[dict[str, Any]], bool]
    load: Callable[[Path], nn.Module]
    build: Callable[[Path], nn.Module]
    dead: Callable[[nn.Module], dict[str, str]]
    inputs: Callable[[Any, Any], Inputs]
    run: Callable[[Any, Inputs], Tensor]
    example: Callable[[Any], Inputs]
    check: Callable[[Any, Inputs], None]
    episode_samples: Callable[[Path, str, int, str | None], Sequence[Any]] | None = None

    def part_of(self, module_name: str) -> str:
        """The part that a module belongs to; ``other`` if no pattern matches."""
        for part, pattern in self.parts:
            if re.fullmatch(pattern, module_name):
                return part
        return "other"


@contextmanager
def empty_weights(dtype: str | torch.dtype | None) -> Iterator[None]:
    """Modules made inside have parameters of ``dtype`` on the meta device; their buffers are real."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype or before)
    try:
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        torch.set_default_dtype(before)


def find_folds(model: nn.Module, folds: Sequence[Fold]) -> list[FoldGroup]:
    """Every place in ``model`` where a template fits: all modules exist and the widths agree.

    A pair of Linears fits only if the rows of the source are the columns of each target, which leaves out
    ``v_proj → o_proj`` under grouped-query attention.
    """
    modules = dict(model.named_modules())
    found = []
    for fold in folds:
        for block in (name for name in modules if re.fullmatch(fold.block, name)):
            group = FoldGroup(
                source=fold.source.format(block=block),
                targets=tuple(target.format(block=block) for target in fold.targets),
            )
            present = {name.format(block=block) for name in fold.present} | {group.source, *group.targets}
            absent = {name.format(block=block) for name in fold.absent}
            if present <= modules.keys() and not absent & modules.keys() and _fits(modules, group):
                found.append(group)
    return found


def _fits(modules: dict[str, nn.Module], group: FoldGroup) -> bool:
    source = modules[group.source]
    targets = [modules[name] for name in group.targets]
    if not all(type(target) is nn.Linear for target in targets):
        return False
    if type(source) is nn.Linear:
        return all(source.out_features == target.in_features for target in targets)
    weight = getattr(source, "weight", None)
    return isinstance(weight, Tensor) and all(len(weight) == target.in_features for target in targets)


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
    at_zero = trial(x)
    weight.fill_(1.0)
    at_one = trial(x)
    step = at_one - at_zero
    return round(float((at_zero * step).sum() / step.square().sum()), 3)


def nothing_dead(model: nn.Module) -> dict[str, str]:
    """For families in which every Linear matters."""
    return {}


def nothing_to_check(model: nn.Module, inputs: Inputs) -> None:
    """For families without a way to be blind."""


def llama_folds(block: str) -> tuple[Fold, ...]:
    """Folds of a Llama-like decoder block (Llama, Mistral, Qwen, Gemma 1)."""
    gemma2 = ("{block}.pre_feedforward_layernorm", "{block}.post_feedforward_layernorm")
    attention = "{block}.self_attn"
    mlp = "{block}.mlp"
    return (
        Fold(block, "{block}.input_layernorm", tuple(f"{attention}.{name}_proj" for name in "qkv")),
        Fold(block, f"{attention}.v_proj", (f"{attention}.o_proj",), absent=(f"{attention}.attn_sub_norm",)),
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
