"""Closed-loop episodes in MetaWorld: the same initial states for every policy, several processes side by side."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from vlaquant.evaluate.metaworld import INSTRUCTIONS, Image, MetaWorldTask
from vlaquant.evaluate.statistics import paired_difference, success_rate
from vlaquant.export import load
from vlaquant.models.openvla import OpenVLAForActionPrediction

#: First seed of evaluation episodes. Training used 1000 upwards, held-out demonstrations 50 000 upwards.
FIRST_SEED = 91_000
#: Steps after which an episode counts as failed; the scripted experts need 33 to 90 on average.
MAX_STEPS = 200

#: What the policy sees instead of the truth; ``nothing`` is the real thing.
TAMPERINGS = ("nothing", "black image", "wrong instruction")


@dataclass(frozen=True, slots=True)
class Job:
    """Episodes of one policy in one task, one a seed."""

    policy: Path
    task: str
    seeds: tuple[int, ...]
    tampering: str = "nothing"


def run_jobs(jobs: Sequence[Job], *, workers: int, advance: Callable[[int], object]) -> dict[Job, NDArray[np.bool_]]:
    """Successes [seeds] of each job; ``advance`` is told how many episodes have just ended."""
    outcomes = {}
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


def _run(job: Job) -> NDArray[np.bool_]:
    model = _policy(job.policy)
    names = list(INSTRUCTIONS)
    wrong = INSTRUCTIONS[names[(names.index(job.task) + 1) % len(names)]]
    instruction = wrong if job.tampering == "wrong instruction" else INSTRUCTIONS[job.task]
    size = model.config.image_sizes[0]
    with MetaWorldTask(job.task, size) as env:
        return np.array([_episode(model, env, seed, instruction, job.tampering) for seed in job.seeds], dtype=bool)


@cache
def _policy(directory: Path) -> OpenVLAForActionPrediction:
    model = load(directory)
    assert isinstance(model, OpenVLAForActionPrediction)
    return model


def _episode(
    model: OpenVLAForActionPrediction, env: MetaWorldTask, seed: int, instruction: str, tampering: str
) -> bool:
    env.reset(seed)
    steps = 0
    while steps < MAX_STEPS:
        image = _seen(env.render(), tampering)
        actions = np.atleast_2d(model.predict_action(image, instruction))  # [chunk, 4]
        for action in actions:
            steps += 1
            if env.step(action).success:
                return True
    return False


def _seen(image: Image, tampering: str) -> Image:
    return np.zeros_like(image) if tampering == "black image" else image


def plan_jobs(policies: Sequence[Path], episodes: int, tampering: str = "nothing", seeds_a_job: int = 5) -> list[Job]:
    """``episodes`` a task for every policy, cut into jobs small enough to keep all workers busy."""
    jobs: list[Job] = []
    for start in range(0, episodes, seeds_a_job):
        seeds = tuple(range(FIRST_SEED + start, FIRST_SEED + min(start + seeds_a_job, episodes)))
        jobs.extend(Job(policy, task, seeds, tampering) for task in INSTRUCTIONS for policy in policies)
    return jobs


def outcomes_of(
    policy: Path, outcomes: dict[Job, NDArray[np.bool_]], tampering: str = "nothing"
) -> dict[str, NDArray[np.bool_]]:
    """Task -> successes in the order of the seeds."""
    result = {}
    for task in INSTRUCTIONS:
        mine = [job for job in outcomes if (job.policy, job.task, job.tampering) == (policy, task, tampering)]
        result[task] = np.concatenate([outcomes[job] for job in sorted(mine, key=lambda job: job.seeds)])
    return result


def summarize(candidate: dict[str, NDArray[np.bool_]], reference: dict[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """Rates with Wilson intervals, per task and overall, and the paired test."""
    everything = {who: np.concatenate(list(tasks.values())) for who, tasks in (("c", candidate), ("r", reference))}
    return {
        "first_seed": FIRST_SEED,
        "max_steps": MAX_STEPS,
        "candidate": rates(candidate),
        "reference": rates(reference),
        "paired": asdict(paired_difference(everything["r"], everything["c"])),
    }


def rates(tasks: dict[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """Success per task and overall: {task: {successes, episodes, low, high, rate}}."""
    named = {**tasks, "all": np.concatenate(list(tasks.values()))}
    results = {name: success_rate(successes) for name, successes in named.items()}
    return {name: asdict(result) | {"rate": result.rate} for name, result in results.items()}


def default_workers() -> int:
    """One process a core, but no more than four."""
    return min(4, os.cpu_count() or 1)
