"""Closed-loop episodes: the same starts for every policy, several processes side by side."""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from vlaquant.evaluate.actions import ask
from vlaquant.evaluate.environment import Environment
from vlaquant.evaluate.figures import EPISODES, SHARE, Compared, Figure, compared, counted
from vlaquant.evaluate.metaworld import INSTRUCTIONS, MAX_STEPS
from vlaquant.evaluate.results import Outcome, Pair, Rollouts
from vlaquant.evaluate.simulators import METAWORLD, Simulator
from vlaquant.evaluate.statistics import mcnemar, paired_rates, wilson
from vlaquant.evaluate.videos import SUFFIX, Recording
from vlaquant.export import load
from vlaquant.families.observation import Observation

#: First seed of evaluation episodes. Training used 1000 upwards, held-out demonstrations 50 000 upwards.
FIRST_SEED = 91_000

#: What the policy sees instead of the truth; ``nothing`` is the real thing.
TAMPERINGS = ("nothing", "black image", "wrong instruction")
#: Of images, where a policy does not say what it was trained on.
_IMAGE_SIZE = 224
_EVERY_VIDEO = "all"


@dataclass(frozen=True, slots=True)
class Job:
    """Episodes of one policy in one task, one a seed.

    Attributes:
        policy: its directory.
        task: of the simulator.
        seeds: of the episodes.
        tampering: one of :data:`TAMPERINGS`.
        simulator: where it drives.
        max_steps: after which an episode has failed.
        unnorm_key: dataset whose action statistics apply, if the policy knows several.
        videos: folder that a video of every episode is written to; None for none.
    """

    policy: Path
    task: str
    seeds: tuple[int, ...]
    tampering: str = "nothing"
    simulator: Simulator = METAWORLD
    max_steps: int = MAX_STEPS
    unnorm_key: str | None = None
    videos: Path | None = None


def run_jobs(jobs: Sequence[Job], *, workers: int, advance: Callable[[int], object]) -> dict[Job, tuple[Outcome, ...]]:
    """How the episodes of each job ended, in the order of its seeds.

    Args:
        jobs: in any order.
        workers: processes; 0 for this one.
        advance: is told how many episodes have just ended.
    """
    outcomes = {}
    if workers == 0:
        for job in jobs:
            outcomes[job] = _run(job)
            advance(len(job.seeds))
        return outcomes
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker) as pool:
        pending = {pool.submit(_run, job): job for job in jobs}
        for future in as_completed(pending):
            outcomes[pending[future]] = future.result()
            advance(len(pending[future].seeds))
    return outcomes


def _prepare_worker() -> None:
    """One thread a process, as there are as many processes as cores; and no progress bars of their own."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def _run(job: Job) -> tuple[Outcome, ...]:
    model = _policy(job.policy)
    sizes = getattr(model.config, "image_sizes", None) or [_IMAGE_SIZE]
    env = job.simulator.make(job.task, int(sizes[0]))
    try:
        return tuple(drive(model, env, job, seed) for seed in job.seeds)
    finally:
        env.close()


@cache
def _policy(directory: Path) -> Any:
    return load(directory)


def drive(model: nn.Module, env: Environment, job: Job, seed: int) -> Outcome:
    """One episode: the policy is asked, its whole chunk is done, and again."""
    env.reset(seed)
    steps, outcome = 0, None
    recording = Recording()
    while outcome is None:
        seen = replace(env.observe(), unnorm_key=job.unnorm_key)
        if job.videos is not None:
            recording.frames.append(np.asarray(seen.image.convert("RGB")))
        for action in ask(model, _tampered(seen, job)).actions[0]:  # [chunk, dimension]
            steps += 1
            step = env.step(action)
            if step.success or step.done or steps >= job.max_steps:
                outcome = Outcome(step.success, steps)
                break
    if job.videos is None:
        return outcome
    recording.frames.append(env.render())
    name = f"{_file_name(job.task)}-{seed}-{_file_name(str(job.policy))}{SUFFIX}"
    recording.write(job.videos / name)
    return replace(outcome, video=name)


def _tampered(seen: Observation, job: Job) -> Observation:
    if job.tampering == "wrong instruction":
        names = list(INSTRUCTIONS)
        return replace(seen, instruction=INSTRUCTIONS[names[(names.index(job.task) + 1) % len(names)]])
    if job.tampering == "black image":
        images = tuple(None if image is None else PIL.Image.new(image.mode, image.size) for image in seen.images)
        return replace(seen, images=images)
    return seen


def _file_name(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def plan_jobs(policies: Sequence[Path], episodes: int, like: Job | None = None, seeds_a_job: int = 5) -> list[Job]:
    """``episodes`` a task for every policy, cut into jobs small enough to keep all workers busy.

    Args:
        policies: directories.
        episodes: a task.
        like: what else the jobs are to be; by default MetaWorld's tasks.
        seeds_a_job: at most.
    """
    like = like or Job(Path(), "", ())
    jobs: list[Job] = []
    for start in range(0, episodes, seeds_a_job):
        seeds = tuple(range(FIRST_SEED + start, FIRST_SEED + min(start + seeds_a_job, episodes)))
        jobs.extend(
            replace(like, policy=policy, task=task, seeds=seeds) for task in like.simulator.tasks for policy in policies
        )
    return jobs


def outcomes_of(
    policy: Path, outcomes: Mapping[Job, Sequence[Outcome]], tampering: str = "nothing"
) -> dict[str, list[tuple[int, Outcome]]]:
    """Task -> (seed, outcome), in the order of the seeds."""
    result: dict[str, list[tuple[int, Outcome]]] = {}
    for job in sorted(outcomes, key=lambda job: job.seeds):
        if (job.policy, job.tampering) == (policy, tampering):
            result.setdefault(job.task, []).extend(zip(job.seeds, outcomes[job], strict=True))
    order = next(iter(outcomes)).simulator.tasks if outcomes else ()
    return {task: result[task] for task in order if task in result}


def success(outcomes: Sequence[Outcome]) -> Figure:
    """The rate of success with its Wilson interval."""
    solved = sum(outcome.success for outcome in outcomes)
    return counted(solved / len(outcomes), SHARE, len(outcomes), EPISODES, wilson(solved, len(outcomes)))


def paired(pairs: Sequence[Pair]) -> Compared:
    """Both rates of success, and their difference with the interval of paired rates."""
    lost, won = _discordant(pairs)
    both = (success([pair.reference for pair in pairs]), success([pair.candidate for pair in pairs]))
    # From the counts: a difference of rates would round
    apart = counted((won - lost) / len(pairs), SHARE, len(pairs), EPISODES, paired_rates(lost, won, len(pairs)))
    return replace(compared(*both), difference=apart)


def _discordant(pairs: Sequence[Pair]) -> tuple[int, int]:
    lost = sum(pair.reference.success and not pair.candidate.success for pair in pairs)
    return lost, sum(pair.candidate.success and not pair.reference.success for pair in pairs)


def summarize(
    candidate: Mapping[str, Sequence[tuple[int, Outcome]]],
    reference: Mapping[str, Sequence[tuple[int, Outcome]]],
    like: Job | None = None,
) -> Rollouts:
    """Rates with intervals, per task and overall, and the paired test.

    Args:
        candidate: task -> (seed, outcome) of the quantized policy.
        reference: the same of the float one, with the same seeds.
        like: what the jobs were.
    """
    like = like or Job(Path(), "", ())
    pairs = []
    for task, outcomes in reference.items():
        for (seed, before), (other, after) in zip(outcomes, candidate[task], strict=True):
            assert seed == other
            pairs.append(Pair(task, seed, before, after))
    lost, won = _discordant(pairs)
    return Rollouts(
        environment=str(like.simulator),
        max_steps=like.max_steps,
        success=paired(pairs),
        tasks={task: paired([pair for pair in pairs if pair.task == task]) for task in reference},
        only_reference=lost,
        only_candidate=won,
        p_value=Figure(mcnemar(lost, won), "p", lost + won, "pairs that differ"),
        episodes=tuple(pairs),
    )


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """What is driven, and how.

    Attributes:
        episodes: a task.
        simulator: where.
        max_steps: after which an episode has failed; None for what the simulator says.
        workers: processes; 0 for this one.
        unnorm_key: dataset whose action statistics apply, if the policy knows several.
        videos: folder for videos of episodes that ended differently; None for none.
    """

    episodes: int
    simulator: Simulator = METAWORLD
    max_steps: int | None = None
    workers: int = 0
    unnorm_key: str | None = None
    videos: Path | None = None


def roll_out(candidate: Path, reference: Path, loop: ClosedLoop, advance: Callable[[int], object]) -> Rollouts:
    """Drive both policies from the same starts."""
    kept = None if loop.videos is None else loop.videos / _EVERY_VIDEO
    like = Job(
        *(Path(), "", ()),
        simulator=loop.simulator,
        max_steps=loop.max_steps or loop.simulator.max_steps,
        unnorm_key=loop.unnorm_key,
        videos=kept,
    )
    try:
        outcomes = run_jobs(
            plan_jobs([candidate, reference], loop.episodes, like), workers=loop.workers, advance=advance
        )
        found = summarize(outcomes_of(candidate, outcomes), outcomes_of(reference, outcomes), like)
        return found if loop.videos is None else _with_videos(found, loop.videos)
    finally:
        if kept is not None:
            shutil.rmtree(kept, ignore_errors=True)


def _with_videos(found: Rollouts, folder: Path) -> Rollouts:
    """Keep the videos of pairs that ended differently, under names that say what they are."""

    def kept(pair: Pair, who: str, outcome: Outcome) -> Outcome:
        if not pair.differs or outcome.video is None:
            return replace(outcome, video=None)
        ending = "solved" if outcome.success else "failed"
        name = f"{_file_name(pair.task)}-{pair.seed}-{who}-{ending}{SUFFIX}"
        shutil.move(folder / _EVERY_VIDEO / outcome.video, folder / name)
        return replace(outcome, video=name)

    pairs = tuple(
        replace(pair, reference=kept(pair, "float", pair.reference), candidate=kept(pair, "quantized", pair.candidate))
        for pair in found.episodes
    )
    return replace(found, episodes=pairs, videos=str(folder))


def default_workers() -> int:
    """One process a core, but no more than four."""
    return min(4, os.cpu_count() or 1)
