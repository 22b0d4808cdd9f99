"""What vlaquant must know about a kind of model: names, and how to load and run it. No algorithm lives here."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from vlaquant.families.folds import Fold
from vlaquant.families.streams import Stream

#: Tensors that go into the model once, by name; what verification stores to repeat a run in another process.
Inputs = dict[str, Tensor]
#: Bytes; that of torch's own allocations.
_ALIGNMENT = 64


class TokenType(IntEnum):
    """What a token is about, as a number in what ``Family.token_types`` gives."""

    IMAGE = 0
    TEXT = 1
    STATE = 2
    ACTION = 3


def nothing_masked(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """For families without padding and dummy cameras."""
    return {}


def one_type(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """For families whose layers each read tokens of a single type."""
    return {}


def no_tensors() -> dict[str, Tensor]:
    """For directories that hold all of the model in safetensors files."""
    return {}


@dataclass(frozen=True, slots=True)
class Converted:
    """What an output directory holds in another form than its source.

    Attributes:
        config: fields that its config.json gets.
        files: of the source that are not copied, since ``config`` and the weights hold what was in them.
        tensors: reads the tensors of the model that the source holds in these files.
        numbered: the weights are in numbered files even if one would do, so that a loader that knows one name only
            does not find them.
    """

    config: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    tensors: Callable[[], dict[str, Tensor]] = no_tensors
    numbered: bool = False


def nothing_converted(directory: Path) -> Converted:
    """For families whose directories are safetensors, config and side files."""
    return Converted()


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What an action or the next words are chosen from, with gradients where they are enabled.

    Attributes:
        output: float32 [rows, n]: logits of n tokens, one row for each token to choose; or numbers that are the action,
            or lead to it.
        tokens: whether these are logits.
        bins: [n], the bin of the action that each token stands for; None for words and numbers.
    """

    output: Tensor
    tokens: bool
    bins: Tensor | None = None


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
        keep_float: (regular expression for full names of Linears, why). A rule for a part leaves these as they are; a
            rule with a pattern that matches one decides.
        act: (model, inputs) -> the action [chunk, action dimension], float, as ``run`` would lead to it on the robot.
            Noise that it needs is part of the inputs, so that two models act from the same one. None: it takes none.
        decide: (model, inputs) -> what the action is chosen from, in one pass that gradients go through, see
            :mod:`vlaquant.families.objectives`. None: there is no such pass.
        token_masks: (model, inputs) -> {part: bool}, True for what counts; [b, t] for tokens, [b] for whole images.
            Only parts with padding or dummy cameras are in it, and layers by name that read other tokens than their
            part.
        token_types: (model, inputs) -> {part: :class:`TokenType`}, integers shaped and named as in ``token_masks``;
            only parts that read tokens of several types are in it. A token whose output chooses an action is an ACTION.
        live_names: (model, names in a source's files) -> {name in a file: name in the model}, where they differ; None
            where they never do.
        converted: source directory -> what of it becomes something else in an output.
        stream: the residual stream, where it can be rotated; None if it cannot, or nobody has described it.
        loss: (model, sample) -> what training on a demonstration lowers, a scalar with gradients. None: not known here.
        velocity: regular expression for the module whose output [1, ≥ chunk, ≥ action dimension] is, in each denoising
            step, the velocity of the action. None: the policy does not denoise.
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
    keep_float: tuple[tuple[str, str], ...] = ()
    act: Callable[[Any, Inputs], Tensor] | None = None
    decide: Callable[[Any, Inputs], Decision] | None = None
    token_masks: Callable[[Any, Inputs], dict[str, Tensor]] = nothing_masked
    token_types: Callable[[Any, Inputs], dict[str, Tensor]] = one_type
    live_names: Callable[[nn.Module, Sequence[str]], dict[str, str]] | None = None
    converted: Callable[[Path], Converted] = nothing_converted
    stream: Stream | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    velocity: str | None = None

    def why_float(self, module_name: str) -> str | None:
        """Why a Linear stays as it is unless a rule names it; None if nothing speaks for that."""
        return next((reason for pattern, reason in self.keep_float if re.fullmatch(pattern, module_name)), None)

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


def ready(model: nn.Module) -> nn.Module:
    """The loaded model in evaluation mode, each tensor in memory that torch aligned.

    Loaders hand out views of a mapped file, which begin anywhere. Some matrix products take another path there, and
    differ in the last bits from those of a model that is equal.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model.eval()


def nothing_dead(model: nn.Module) -> dict[str, str]:
    """For families in which every Linear matters."""
    return {}


def nothing_to_check(model: nn.Module, inputs: Inputs) -> None:
    """For families without a way to be blind."""
