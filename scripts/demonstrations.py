"""Record demonstrations of MetaWorld's scripted experts, with perturbed motion and clean labels.

Half of the five-step segments get Gaussian noise on the executed action, so that the states cover mistakes; the stored
label is always the expert's action in the state reached (the idea of DART, Laskey et al. 2017, arXiv:1703.09327).
"""

from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, List, Value
from numpy.typing import NDArray

from vlaquant.evaluate.metaworld import INSTRUCTIONS, MetaWorldTask

_SEGMENT_STEPS = 5
_NOISE_STD = 0.4
_MAX_STEPS = 300


@dataclass(frozen=True, slots=True, eq=False)
class Demonstrations:
    """Frames of one task, all episodes one after the other.

    image uint8 [t, size, size, 3]; action float32 [t, 4]; state float32 [t, 39]; episode int32 [t].
    """

    task: str
    image: NDArray[np.uint8]
    action: NDArray[np.float32]
    state: NDArray[np.float32]
    episode: NDArray[np.int32]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        np.savez(
            directory / f"{self.task}.npz", image=self.image, action=self.action, state=self.state, episode=self.episode
        )

    @classmethod
    def load(cls, directory: Path, task: str) -> Self:
        with np.load(directory / f"{task}.npz") as data:
            return cls(task, data["image"], data["action"], data["state"], data["episode"])


def record(task: str, episodes: int, *, seed: int, image_size: int, noise: bool, tail: int) -> Demonstrations:
    """``episodes`` successful demonstrations; ``tail`` more steps after success, so that the last chunk has labels."""
    frames: dict[str, list[NDArray[np.generic]]] = {"image": [], "action": [], "state": []}
    owner: list[int] = []
    with MetaWorldTask(task, image_size) as env:
        attempt = 0
        kept = 0
        while kept < episodes:
            attempt_frames = _episode(env, seed + attempt, noise=noise, tail=tail)
            attempt += 1
            if attempt_frames is None:
                continue
            for key, values in attempt_frames.items():
                frames[key].extend(values)
            owner.extend([kept] * len(attempt_frames["action"]))
            kept += 1
    return Demonstrations(
        task,
        image=np.stack(frames["image"]).astype(np.uint8),
        action=np.stack(frames["action"]).astype(np.float32),
        state=np.stack(frames["state"]).astype(np.float32),
        episode=np.asarray(owner, dtype=np.int32),
    )


def _episode(env: MetaWorldTask, seed: int, *, noise: bool, tail: int) -> dict[str, list[NDArray[np.generic]]] | None:
    rng = np.random.default_rng(seed)
    step = env.reset(seed)
    frames: dict[str, list[NDArray[np.generic]]] = {"image": [], "action": [], "state": []}
    perturbed = False
    left = tail
    for index in range(_MAX_STEPS):
        if index % _SEGMENT_STEPS == 0:
            perturbed = noise and rng.random() < 0.5
        assert step.state is not None
        label = env.expert_action(step.state)
        frames["image"].append(env.render())
        frames["action"].append(label)
        frames["state"].append(step.state.astype(np.float32))
        executed = label + rng.normal(0.0, _NOISE_STD, size=4) if perturbed and not step.success else label
        reached = step.success
        step = env.step(executed)
        if reached or step.success:
            left -= 1
            if left < 0:
                return frames
    return None


def _record_and_save(task: str, directory: Path, episodes: int, seed: int, image_size: int, tail: int) -> str:
    demos = record(task, episodes, seed=seed, image_size=image_size, noise=True, tail=tail)
    demos.save(directory)
    return f"{task}: {episodes} episodes, {len(demos.action)} frames"


def record_all(directory: Path, episodes: int, *, seed: int, image_size: int, tail: int, workers: int) -> list[str]:
    """Record every task of ``INSTRUCTIONS``, one process a task (EGL contexts do not survive a fork)."""
    jobs = [(task, directory, episodes, seed, image_size, tail) for task in INSTRUCTIONS]
    with get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        return pool.starmap(_record_and_save, jobs, chunksize=1)


def write_held_out(directory: Path, *, episodes: int, seed: int, image_size: int, chunk: int) -> None:
    """Unperturbed demonstrations as parquet: ``episodes`` a task for calibration, and as many for evaluation.

    One row for every ``chunk`` steps, as the policy is asked: image, instruction, action [chunk, 4], episode, task.
    """
    for part, split in enumerate(("calibration", "evaluation")):
        rows: list[dict[str, object]] = []
        for task in INSTRUCTIONS:
            first = seed + part * episodes
            demos = record(task, episodes, seed=first, image_size=image_size, noise=False, tail=chunk)
            rows.extend(_rows(demos, chunk, first))
        (directory / split).mkdir(parents=True, exist_ok=True)
        features = Features(
            {
                "image": Image(),
                "instruction": Value("string"),
                "action": List(List(Value("float32"))),
                "episode": Value("int32"),
                "task": Value("string"),
            }
        )
        Dataset.from_list(rows, features=features).to_parquet(directory / split / "data.parquet")


def _rows(demos: Demonstrations, chunk: int, first_seed: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for episode in np.unique(demos.episode):
        frames = np.flatnonzero(demos.episode == episode)
        rows.extend(
            {
                "image": PIL.Image.fromarray(demos.image[start]),
                "instruction": INSTRUCTIONS[demos.task],
                "action": demos.action[start : start + chunk].tolist(),
                "episode": first_seed + int(episode),
                "task": demos.task,
            }
            for start in frames[: len(frames) - chunk + 1 : chunk]
        )
    return rows
