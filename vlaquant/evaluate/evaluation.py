"""One evaluation: candidate directory against reference directory."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaquant.checkpoint import weight_files
from vlaquant.errors import EvaluationError
from vlaquant.evaluate.actions import Answers, ask, compare, episodes_of
from vlaquant.evaluate.figures import BYTES, Compared, Figure, compared
from vlaquant.evaluate.hidden import look_inside
from vlaquant.evaluate.language import compare_text
from vlaquant.evaluate.latency import Version, by_part, percentiles, policy_rate, time_parts
from vlaquant.evaluate.machine import cpu_model, versions
from vlaquant.evaluate.memory import memory
from vlaquant.evaluate.results import (
    Inside,
    LanguageEvaluation,
    Memory,
    Percentiles,
    PolicyEvaluation,
    PolicyRate,
    Rollouts,
    System,
)
from vlaquant.evaluate.rollouts import ClosedLoop, roll_out
from vlaquant.evaluate.sight import image_sensitivity
from vlaquant.evaluate.videos import spread
from vlaquant.export import load
from vlaquant.families import family_of_model
from vlaquant.families.data import load_observations
from vlaquant.families.hf_samples import text_samples
from vlaquant.families.observation import Observation
from vlaquant.terminal import bar

_PACKAGES = ("vlaquant", "torch", "transformers")
#: Observations on which hidden states are compared, and actions that are timed by part.
_INSIDE, _PART_ROUNDS = 32, 20


def evaluate_policy(
    model: Path,
    reference: Path,
    episodes: Path,
    *,
    count: int | None = None,
    unnorm_key: str | None = None,
    closed_loop: ClosedLoop | None = None,
    control_hz: float | None = None,
) -> PolicyEvaluation:
    """A quantized policy against its float original, on the ``evaluation`` split of recorded episodes.

    Args:
        model: the quantized directory.
        reference: the float one.
        episodes: recorded episodes.
        count: observations, evenly spread; None for all.
        unnorm_key: dataset whose action statistics apply, if the policy knows several.
        closed_loop: simulated episodes; None for none.
        control_hz: actions that the robot executes a second, if known.

    Raises:
        EvaluationError: not two policies of one class, or nothing to compare.
    """
    obstacle = None if closed_loop is None else _obstacle(closed_loop)
    candidate, original = load(model), load(reference)
    observations = load_observations(episodes, "evaluation", count, unnorm_key)
    answers = compare(candidate, original, observations, _progress("comparing actions"))
    inside, notes = _inside(candidate, original, observations)
    result = PolicyEvaluation(
        model=model.name,
        reference=reference.name,
        actions=answers.figures,
        inside=inside,
        system=_system_of_policies(model, reference, candidate, original, observations, answers, control_hz),
        skipped=obstacle,
        notes=notes,
    )
    if closed_loop is None or obstacle is not None:
        return result
    return replace(result, rollouts=_rollouts(model, reference, closed_loop))


def _obstacle(loop: ClosedLoop) -> str | None:
    """Why the simulator cannot run; asked before anything takes long, as are tasks and options that make no sense."""
    obstacle = loop.simulator.why_not()
    if obstacle is None and loop.max_steps is None:
        _ = loop.simulator.tasks, loop.simulator.max_steps
    return obstacle


def _inside(
    candidate: nn.Module, original: nn.Module, observations: Sequence[Observation]
) -> tuple[Inside, tuple[str, ...]]:
    """Between the parts, and what could not be measured there."""
    some = [observations[place] for place in spread(len(observations), _INSIDE)]
    bar = _progress("comparing hidden states")
    sqnr, velocity = look_inside(candidate, original, some, episodes_of(some), bar)
    try:
        sight = image_sensitivity(candidate, original, observations, _progress("turning images black"))
    except EvaluationError as error:
        return Inside(sqnr, velocity, None), (f"image sensitivity was not measured: {error}",)
    return Inside(sqnr, velocity, sight), ()


def _system_of_policies(
    model: Path,
    reference: Path,
    candidate: nn.Module,
    original: nn.Module,
    observations: Sequence[Observation],
    answers: Answers,
    control_hz: float | None,
) -> System:
    policies = {"reference": original, "candidate": candidate}

    def act(policy: nn.Module) -> Callable[[int], Any]:
        return lambda number: ask(policy, observations[number % len(observations)])

    acting = {who: Version(policy, act(policy)) for who, policy in policies.items()}
    with torch.inference_mode():
        clocks = time_parts(acting, min(_PART_ROUNDS, len(observations)))
        inputs = family_of_model(original).inputs(original, observations[0])
    whole = percentiles(answers.reference.seconds, answers.candidate.seconds)
    return _system(
        model,
        reference,
        whole,
        by_part(clocks["reference"], clocks["candidate"]),
        policy_rate(answers.figures.chunk, whole, control_hz),
        memory(reference, model, family_of_model(original), inputs),
    )


def _system(
    model: Path,
    reference: Path,
    latency: Percentiles,
    parts: dict[str, Percentiles],
    rate: PolicyRate | None,
    held: Memory,
) -> System:
    return System(
        disk=disk(reference, model),
        memory=held,
        latency=latency,
        parts=parts,
        rate=rate,
        threads=torch.get_num_threads(),
        cpu=cpu_model(),
        versions=versions(_PACKAGES),
    )


def disk(reference: Path, candidate: Path) -> Compared:
    """Bytes of the weight files of both directories."""
    sizes = [[path.stat().st_size for path in weight_files(one)] for one in (reference, candidate)]
    before, after = (Figure(float(sum(files)), BYTES, len(files), "files") for files in sizes)
    return compared(before, after)


def evaluate_language(model: Path, reference: Path, text: Path, *, count: int, length: int) -> LanguageEvaluation:
    """Perplexity and divergence on ``count`` windows of ``length`` tokens of a text file.

    Raises:
        EvaluationError: no text.
    """
    candidate, original = load(model), load(reference)
    windows = text_samples(reference, text, count, length)
    figures, seconds = compare_text(candidate, original, windows, _progress("comparing text"))
    family = family_of_model(original)
    whole = percentiles(seconds["reference"], seconds["candidate"], of="windows")
    held = memory(reference, model, family, family.inputs(original, windows[0]))
    return LanguageEvaluation(
        model=model.name,
        reference=reference.name,
        language=figures,
        system=_system(model, reference, whole, {}, None, held),
    )


def _progress(label: str) -> Callable[[Sequence[Any]], Sequence[Any]]:
    return lambda items: bar(items, label)  # type: ignore[return-value]


def _rollouts(model: Path, reference: Path, loop: ClosedLoop) -> Rollouts:
    total = 2 * loop.episodes * len(loop.simulator.tasks)
    with bar(label="closed-loop episodes", total=total) as shown:
        return roll_out(model, reference, loop, shown.update)
