"""Looking into a float and a quantized model for what a page draws: weights, activations, and actions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlaquant.calibrate.masks import counted_rows, takes_turns
from vlaquant.checkpoint import read_manifest
from vlaquant.engine.masking import layer_masks
from vlaquant.errors import EvaluationError
from vlaquant.evaluate.actions import ask
from vlaquant.export import load
from vlaquant.families import Family, family_of_model
from vlaquant.families.data import load_observations
from vlaquant.families.observation import Observation
from vlaquant.kernels import unpack
from vlaquant.linear import W4A16Linear, W8A8Linear
from vlaquant.numerics import QuantizedWeight, split_groups
from vlaquant.report.data import Fold, Report, make_report
from vlaquant.report.measured import Measured, Outliers, Trace, WeightHistogram

#: Transforms that scale rows or columns of a weight, so that a float weight can be compared with its codes.
_SCALING = {"awq", "smoothquant", "layerscale"}
#: Rows of a weight that are looked at, evenly spread.
_ROWS = 512
#: Bins of a histogram, as far as every step has at least one.
_BINS = 192
#: A scale that transforms can have moved into a column or row; beyond that the weight is something else.
_SMALLEST, _LARGEST = 1e-2, 1e2
_FIT_ROUNDS = 4

_Packed = W4A16Linear | W8A8Linear
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


def _silent(items: Sequence[Any], _: str) -> Iterable[Any]:
    return items


@torch.inference_mode()
def measure(
    output: Path,
    reference: Path,
    episodes: Path | None = None,
    *,
    histograms: int = 6,
    observations: int = 16,
    channel_sets: int = 64,
    traced: int = 8,
    unnorm_key: str | None = None,
    progress: Progress = _silent,
) -> Measured:
    """Compare two directories inside: weights always, and activations and actions on recorded episodes.

    Args:
        output: what vlaquant wrote.
        reference: the float checkpoint that it came from.
        episodes: recorded episodes with a split ``evaluation``; without them there are only weights.
        histograms: of so many layers, those with the largest errors.
        observations: that activations are watched on, evenly spread.
        channel_sets: into which the channels of a layer are put together.
        traced: episodes among which the one is searched in which the actions differ most.
        unnorm_key: dataset whose action statistics apply, if the policy knows several.
        progress: wraps what is worked through, with a label.

    Raises:
        CheckpointError: a directory that cannot be loaded.
        EvaluationError: the two are not of one model.
    """
    report = make_report(output.name, read_manifest(output))
    candidate, original = load(output), load(reference)
    pairs = _pairs(candidate, original)
    errors, grams = [], []
    mixed = any(fold.kind not in _SCALING for fold in report.folds) or _unknown_transforms(report)
    for name in progress(list(pairs), "weights"):
        packed, linear = pairs[name]
        found = None if mixed else weight_error(packed, linear.weight, report.folds, name)
        if found is not None:
            errors.append((name, found))
    measured = Measured(weight_errors=tuple(errors))
    for name in _most_wrong(report, measured, pairs)[:histograms]:
        grams.append(histogram(name, *pairs[name], () if mixed else report.folds, mixed=mixed))  # noqa: PERF401
    outliers = trace = None
    if episodes is not None:
        family = family_of_model(original)
        seen = load_observations(episodes, "evaluation", observations, unnorm_key)
        outliers = _outliers(candidate, original, family, list(pairs), seen, channel_sets, progress)
        if family.act is not None:
            recorded = load_observations(episodes, "evaluation", None, unnorm_key)
            trace = _trace(candidate, original, recorded, traced, progress)
    return Measured(tuple(grams), measured.weight_errors, outliers, trace)


def _unknown_transforms(report: Report) -> bool:
    asked = report.recipe.get("transforms") or ()
    return any(one.get("kind") not in _SCALING for one in asked if isinstance(one, Mapping))


def _pairs(candidate: nn.Module, original: nn.Module) -> dict[str, tuple[_Packed, nn.Linear]]:
    """Packed Linears with what they were."""
    if type(candidate) is not type(original):
        kinds = f"{type(candidate).__name__} and {type(original).__name__}"
        raise EvaluationError(f"the models are of different classes, {kinds}, so they cannot be compared inside")
    floats = dict(original.named_modules())
    pairs = {}
    for name, module in candidate.named_modules():
        if not isinstance(module, _Packed):
            continue
        other = floats.get(name)
        if type(other) is not nn.Linear or other.weight.shape != module.weight.shape:
            raise EvaluationError(f"{name}: the reference has {other} where the output has {module}")
        pairs[name] = (module, other)
    return pairs


def _most_wrong(report: Report, measured: Measured, pairs: Mapping[str, Any]) -> list[str]:
    """Damaged layers, then by the error of their output, then by that of their weights."""
    by_weight = sorted(measured.weight_errors, key=lambda one: -one[1])
    known = [name for name, _ in measured.damaged] + [layer.name for layer in report.worst]
    return [name for name in dict.fromkeys([*known, *(name for name, _ in by_weight), *pairs]) if name in pairs]


def _some_rows(packed: _Packed, weight: Tensor) -> tuple[QuantizedWeight, Tensor]:
    """Codes and float values [rows, k] of at most ``_ROWS`` rows."""
    stored = unpack(packed.stored(), packed.query())
    count = len(weight)
    chosen = torch.linspace(0, count - 1, min(count, _ROWS)).round().long()
    scale = stored.scale if len(stored.scale) == 1 else stored.scale[chosen]
    zero = stored.zero if stored.zero is None or len(stored.zero) == 1 else stored.zero[chosen]
    rows = QuantizedWeight(stored.codes[chosen], scale.float(), zero, stored.spec)
    return rows, weight.detach()[chosen].float()


def folded(weight: Tensor, rounded: Tensor, *, rows: bool, columns: bool) -> Tensor:
    """The float weight [n, k] with the scales of rows and columns that make it most like its rounded version.

    A fold changes a weight W to diag(r) W diag(c), and leaves r and c nowhere. Least squares finds them from W and its
    rounding, for rows and columns in turn.
    """
    found = weight.clone()
    for _ in range(_FIT_ROUNDS if rows and columns else 1):
        for wanted, dim in ((columns, 0), (rows, 1)):
            if wanted:
                power = found.square().sum(dim, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
                scale = (found * rounded).sum(dim, keepdim=True) / power
                found = found * scale.clamp(_SMALLEST, _LARGEST)
    return found


def _in_place(rows: QuantizedWeight, weight: Tensor, folds: Sequence[Fold], name: str) -> tuple[Tensor, Tensor]:
    """The weight with the scales that kept folds moved into it, and what its codes stand for."""
    rounded = rows.dequantize()
    kept = [fold for fold in folds if fold.kept]
    as_target = any(name in fold.targets for fold in kept)
    as_source = any(name == fold.source for fold in kept)
    return folded(weight, rounded, rows=as_source, columns=as_target), rounded


def weight_error(packed: _Packed, weight: Tensor, folds: Sequence[Fold], name: str) -> float:
    """Squared error of a packed weight as a share of its square, on at most 512 rows."""
    rows, values = _some_rows(packed, weight)
    wanted, rounded = _in_place(rows, values, folds, name)
    power = float(wanted.square().sum())
    return float((wanted - rounded).square().sum()) / power if power else 0.0


def histogram(
    name: str, packed: _Packed, linear: nn.Linear, folds: Sequence[Fold], *, mixed: bool = False
) -> WeightHistogram:
    """See :class:`~vlaquant.report.measured.WeightHistogram`; ``mixed`` if float weights cannot be compared."""
    rows, values = _some_rows(packed, linear.weight)
    spec = rows.spec
    low, high = spec.qmin, spec.qmax
    per_step = max(1, _BINS // (high - low + 1))
    counts = torch.bincount((rows.codes.long() - low).flatten(), minlength=high - low + 1)
    codes = tuple((counts / counts.sum()).tolist())
    if mixed:
        return WeightHistogram(name, packed.scheme.name, low, high, per_step, (), codes, 0.0, None)
    wanted, rounded = _in_place(rows, values, folds, name)
    steps = split_groups(wanted, spec) / rows.scale.unsqueeze(-1)
    if rows.zero is not None:
        steps = steps + rows.zero.float().unsqueeze(-1)
    bins = (high - low + 2) * per_step
    shares = torch.histc(steps.clamp(low - 1, high + 1).float(), bins, low - 1, high + 1) / steps.numel()
    clipped = float(((steps < low - 0.5) | (steps > high + 0.5)).float().mean())
    power = float(wanted.square().sum())
    error = float((wanted - rounded).square().sum()) / power if power else 0.0
    return WeightHistogram(name, packed.scheme.name, low, high, per_step, tuple(shares.tolist()), codes, clipped, error)


def channel_peaks(
    model: nn.Module, family: Family, names: Sequence[str], observations: Iterable[Observation]
) -> dict[str, Tensor]:
    """The largest |x| of each input channel [k] of the layers that ran; padding and missing cameras do not count."""
    peaks: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    turns: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x, mask = (args[0] if args else kwargs["input"]).detach(), masks.get(name)
            rows = counted_rows(name, x, mask, turn=turns.get(name, 0))
            if takes_turns(mask, x):
                turns[name] = turns.get(name, 0) + 1
            if len(rows):
                found = rows.abs().amax(dim=0).float()
                peaks[name] = found if name not in peaks else torch.maximum(peaks[name], found)

        return hook

    with ExitStack() as hooks:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for observation in observations:
            inputs = family.inputs(model, observation)
            masks, turns = layer_masks(family, family.token_masks(model, inputs), names), {}
            family.run(model, inputs)
    return peaks


def _outliers(
    candidate: nn.Module,
    original: nn.Module,
    family: Family,
    names: Sequence[str],
    seen: Sequence[Observation],
    sets: int,
    progress: Progress,
) -> Outliers:
    before = channel_peaks(original, family, names, progress(seen, "activations, float"))
    after = channel_peaks(candidate, family, names, progress(seen, "activations, quantized"))
    both = [name for name in names if name in before and name in after]
    return Outliers(
        tuple(both),
        len(seen),
        tuple(_against_mean(before[name], sets) for name in both),
        tuple(_against_mean(after[name], sets) for name in both),
        tuple(len(before[name]) for name in both),
        tuple(int(before[name].argmax()) for name in both),
    )


def _against_mean(peaks: Tensor, sets: int) -> tuple[float, ...]:
    average = max(float(peaks.mean()), torch.finfo(torch.float32).tiny)
    return tuple(float(part.max()) / average for part in peaks.tensor_split(min(sets, len(peaks))))


def _trace(
    candidate: nn.Module, original: nn.Module, observations: Sequence[Observation], count: int, progress: Progress
) -> Trace | None:
    """Of at most ``count`` episodes, evenly spread, the one with the largest mean difference; None if all are short."""
    groups: dict[tuple[str, int], list[Observation]] = {}
    for one in observations:
        groups.setdefault((one.task, one.episode), []).append(one)
    episodes = [group for group in groups.values() if len(group) > 1]
    if not episodes:
        return None
    chosen = np.linspace(0, len(episodes) - 1, min(count, len(episodes))).round().astype(int)
    followed = progress([episodes[index] for index in chosen], "episodes")
    traces = [_follow(candidate, original, episode, len(chosen)) for episode in followed]
    return max(traces, key=_difference)


def _difference(trace: Trace) -> float:
    return float(np.abs(np.asarray(trace.original) - np.asarray(trace.quantized)).mean())


def _follow(candidate: nn.Module, original: nn.Module, episode: Sequence[Observation], count: int) -> Trace:
    answers = [[_first(ask(model, one).actions[0]) for one in episode] for model in (original, candidate)]
    recorded = [_first(np.atleast_2d(one.action)) for one in episode if one.action is not None]
    first = episode[0]
    return Trace(
        first.task,
        first.episode,
        first.instruction,
        tuple(answers[0]),
        tuple(answers[1]),
        tuple(recorded) if len(recorded) == len(episode) else (),
        count,
    )


def _first(chunk: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in chunk[0])
