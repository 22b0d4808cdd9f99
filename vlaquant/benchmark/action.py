"""One whole action of a checkpoint directory: how long it takes and where, against a reference."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaquant.errors import EvaluationError, RecipeError, VlaquantError
from vlaquant.evaluate.actions import ask
from vlaquant.evaluate.latency import WARM_UP, Version, part_turn, whole_turn
from vlaquant.evaluate.machine import machine
from vlaquant.evaluate.memory import resident_bytes
from vlaquant.evaluate.parts import DECODE, PartClock
from vlaquant.evaluate.timing import interleave, summary_ms, threads
from vlaquant.export import load
from vlaquant.families import family_of_model
from vlaquant.families.data import load_observations
from vlaquant.families.observation import Observation

#: ``stored`` leaves a model as it is in its directory.
DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
_REFERENCE_DTYPES = ("float32", "bfloat16")
_SPLIT = "evaluation"


@dataclass(frozen=True, slots=True)
class ActionSettings:
    """What is measured.

    Attributes:
        model: directory of the candidate.
        reference: directory that it is compared with; None for none.
        episodes: recorded episodes with a split ``evaluation``; None for the family's made-up sample.
        unnorm_key: dataset whose statistics apply, if the policy knows several.
        dtypes: of the reference, keys of :data:`DTYPES`.
        model_dtypes: of the candidate.
        rounds: that count; each shows every version the same observation.
        threads: of torch; None for as many as it has.
        clock: ``wall``, or ``cpu`` for the time that this process was computing.
        device: ``cpu`` or ``cuda``.
    """

    model: Path
    reference: Path | None = None
    episodes: Path | None = None
    unnorm_key: str | None = None
    dtypes: tuple[str, ...] = _REFERENCE_DTYPES
    model_dtypes: tuple[str, ...] = ("stored",)
    rounds: int = 20
    threads: int | None = None
    clock: str = "wall"
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.dtypes, *self.model_dtypes) if name not in DTYPES]
        if unknown:
            raise RecipeError(f"unknown dtype {unknown[0]!r}; use {', '.join(DTYPES)}")
        if self.reference is None and self.dtypes != _REFERENCE_DTYPES:
            raise RecipeError("--dtypes are those of the reference; give --reference, or use --model-dtypes")


def bench_action(settings: ActionSettings) -> dict[str, Any]:
    """Measure; returns plain values for JSON and :func:`~vlaquant.benchmark.tables.action_table`.

    Raises:
        CheckpointError: a directory that cannot be loaded.
        EvaluationError: a policy that takes no actions, cannot act in a dtype, or two of different classes.
    """
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise EvaluationError(f"device {settings.device!r}: this torch sees no CUDA device")
    observations = None
    with threads(settings.threads) as count, torch.inference_mode():
        facts, models = machine(), _models(settings)
        if settings.episodes is not None:
            observations = load_observations(settings.episodes, _SPLIT, settings.rounds, settings.unnorm_key)
        versions = {name: Version(model, _action(model, observations)) for name, model in models.items()}
        for name, version in versions.items():
            _check_acts(name, version)
        measured = _measure(versions, settings)
    families = {name: family_of_model(model).name for name, model in models.items()}
    what = (
        "the family's example inputs (no pre-processing)" if observations is None else f"{len(observations)} recorded"
    )
    return {
        "kind": "action",
        "machine": facts,
        "settings": {
            "model": settings.model.name,
            "reference": None if settings.reference is None else settings.reference.name,
            "family": next(iter(families.values())),
            "observed": f"observations: {what}",
            "rounds": settings.rounds,
            "threads": count,
            "clock": settings.clock,
            "device": settings.device,
        },
        "versions": measured,
        "ratios": _ratios(measured),
    }


def _models(settings: ActionSettings) -> dict[str, nn.Module]:
    """The candidate and the reference in all their dtypes."""
    models = _in_dtypes(settings.model, "model", settings.model_dtypes, settings.device)
    if settings.reference is not None:
        models |= _in_dtypes(settings.reference, "reference", settings.dtypes, settings.device)
    kinds = {type(model).__name__ for model in models.values()}
    if len(kinds) > 1:
        raise EvaluationError(
            f"the policies are of different classes, {' and '.join(sorted(kinds))}; compare like with like"
        )
    (kind,) = kinds
    if family_of_model(next(iter(models.values()))).act is None:
        raise EvaluationError(f"{kind} takes no actions, so there is no action to time; use --shapes for its kernels")
    return models


def _in_dtypes(directory: Path, who: str, dtypes: Sequence[str], device: str) -> dict[str, nn.Module]:
    stored = load(directory)
    found = {}
    for name in dtypes:
        dtype = DTYPES[name]
        own = stored if name == dtypes[-1] else copy.deepcopy(stored)
        found[f"{who} {name}"] = _cast(own, dtype).to(device).eval()
    return found


def _cast(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model with its stored tensors in ``dtype``; computed ones, as of rotary embeddings, stay as they are."""
    if dtype is None:
        return model
    stored = model.state_dict().keys()
    computed = [(name, tensor) for name, tensor in model.named_buffers() if name not in stored]
    model.to(dtype)
    for name, tensor in computed:
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, tensor)
    return model


def _action(model: nn.Module, observations: Sequence[Observation] | None) -> Callable[[int], Any]:
    """One action: from an observation as the policy is asked on the robot, or from the family's example inputs."""
    if observations is not None:
        return lambda number: ask(model, observations[number % len(observations)])
    family = family_of_model(model)
    act = family.act
    assert act is not None
    inputs = family.example(model)
    return lambda number: act(model, inputs)


def _check_acts(name: str, version: Version) -> None:
    """The first action; its errors are of the model's dtype or its inputs, and not of the measurement."""
    try:
        version.act(0)
    except VlaquantError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{name}: cannot act: {type(error).__name__}: {error}; try other --dtypes, such as stored"
        ) from error


def _measure(versions: dict[str, Version], settings: ActionSettings) -> dict[str, Any]:
    """Name -> medians of the whole action and, from actions of their own, of its parts; and memory."""
    parts: dict[str, list[PartClock]] = {name: [] for name in versions}
    how = (settings.device, settings.clock)
    turns = {name: whole_turn(version, *how) for name, version in versions.items()}
    turns |= {f"{name} by part": part_turn(version, parts[name], *how) for name, version in versions.items()}
    seconds = interleave(turns, settings.rounds, warm_up=WARM_UP)
    return {
        name: {
            **summary_ms(seconds[name]),
            "parts": _part_summary(parts[name][WARM_UP:]),
            "sum_of_parts_ms": summary_ms(seconds[f"{name} by part"])["median_ms"],
            "resident_bytes": resident_bytes(version.model),
        }
        for name, version in versions.items()
    }


def _part_summary(clocks: Sequence[PartClock]) -> dict[str, dict[str, float]]:
    """Part -> medians over the actions; ``decode`` also for one token."""
    found: dict[str, dict[str, float]] = {}
    for part in dict.fromkeys(part for clock in clocks for part in clock.seconds):
        calls = float(max(clock.calls(part) for clock in clocks))
        found[part] = summary_ms([clock.seconds.get(part, 0.0) for clock in clocks]) | {"calls": calls}
        if part == DECODE:
            per_token = {name: found[part][name] / calls for name in ("median_ms", "p95_ms", "min_ms")}
            found[f"{DECODE}, per token"] = per_token | {"calls": 1.0}
    return found


def _ratios(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times faster each candidate is than each reference."""
    candidates = [name for name in measured if name.startswith("model ")]
    references = [name for name in measured if name.startswith("reference ")]
    return [
        {"of": one, "against": other, "times": measured[other]["median_ms"] / measured[one]["median_ms"]}
        for one in candidates
        for other in references
    ]
