"""Observations of a LeRobotDataset, without LeRobot."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlaquant.errors import CalibrationError
from vlaquant.families.data.choosing import choose_frames
from vlaquant.families.data.lerobot_folder import Episode, LeRobotFolder
from vlaquant.families.data.video import read_frames
from vlaquant.families.observation import Observation


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What of each frame is read."""

    cameras: tuple[str | None, ...]
    state: str | None
    action: str | None
    chunk: int | None
    unnorm_key: str | None


def load_lerobot(
    directory: Path,
    count: int,
    *,
    seed: int = 0,
    cameras: Sequence[str | None] | None = None,
    state: str | None = None,
    action: str | None = None,
    chunk: int | None = None,
    unnorm_key: str | None = None,
) -> list[Observation]:
    """``count`` observations of a LeRobotDataset of layout 2.0, 2.1 or 3.0.

    Args:
        directory: holds ``meta/info.json``.
        count: chosen by :func:`~vlaquant.families.data.choosing.choose_frames`.
        seed: of the choice.
        cameras: keys such as ``observation.images.top`` in the order of the policy's cameras, None for one that is
            missing; by default all cameras of the dataset but depth, in its order.
        state: key of the state, if it is not ``observation.state``.
        action: key of the action, if it is not ``action``.
        chunk: give the actions of so many frames from each one on; the last is repeated past the end of an episode.
        unnorm_key: of all observations.

    Raises:
        CalibrationError: not such a folder, a key that it does not have, a file that is missing or damaged, or PyAV is
            missing and needed.
    """
    folder = LeRobotFolder(directory)
    state, action = _key(folder, state, "observation.state"), _key(folder, action, "action")
    wanted = _Wanted(_cameras(folder, cameras), state, action, chunk, unnorm_key)
    tasks = folder.tasks()
    episodes = folder.episodes([key for key in wanted.cameras if key is not None and folder.is_video(key)])
    chosen: dict[int, list[int]] = {}
    for index, frame in choose_frames([episode.length for episode in episodes], count, seed=seed):
        chosen.setdefault(index, []).append(frame)
    found: list[Observation] = []
    for index, frames in chosen.items():
        found += _observations(folder, episodes[index], frames, wanted, tasks)
    return found


def _cameras(folder: LeRobotFolder, cameras: Sequence[str | None] | None) -> tuple[str | None, ...]:
    if not folder.cameras:
        raise CalibrationError(f"{folder.directory}: has no camera; its features are {', '.join(folder.features)}")
    for camera in cameras or ():
        if camera is not None and camera not in folder.cameras:
            raise CalibrationError(f"{folder.directory}: no camera {camera!r}; it has {', '.join(folder.cameras)}")
    return tuple(folder.cameras if cameras is None else cameras)


def _key(folder: LeRobotFolder, name: str | None, default: str) -> str | None:
    if name is None:
        return default if default in folder.features else None
    if name not in folder.features:
        raise CalibrationError(f"{folder.directory}: no feature {name!r}; it has {', '.join(folder.features)}")
    return name


def _observations(
    folder: LeRobotFolder, episode: Episode, frames: Sequence[int], wanted: _Wanted, tasks: Mapping[int, str]
) -> list[Observation]:
    cameras = [key for key in dict.fromkeys(wanted.cameras) if key is not None]
    embedded = [key for key in cameras if not folder.is_video(key)]
    columns = [*filter(None, (wanted.state, wanted.action)), *embedded, "task_index"]
    rows = folder.rows(episode, list(dict.fromkeys(columns)))
    images = {key: _embedded_images(folder, key, rows, frames) for key in embedded}
    for key in cameras:
        if key not in images:
            path, start = folder.video(episode, key)
            times = [start + frame / folder.fps for frame in frames]
            images[key] = read_frames(path, times, tolerance=0.5 / folder.fps)
    found = []
    for position, frame in enumerate(frames):
        task = int(np.ravel(rows["task_index"][frame].as_py())[0])
        if task not in tasks:
            raise CalibrationError(f"{folder.directory}: episode {episode.number} has task {task}, which meta/ lacks")
        found.append(
            Observation(
                images=tuple(None if key is None else images[key][position] for key in wanted.cameras),
                instruction=tasks[task],
                state=None if wanted.state is None else _numbers(rows[wanted.state][frame]),
                action=None if wanted.action is None else _action(rows[wanted.action], frame, wanted.chunk),
                episode=episode.number,
                task=tasks[task],
                unnorm_key=wanted.unnorm_key,
            )
        )
    return found


def _embedded_images(folder: LeRobotFolder, camera: str, rows: Any, frames: Sequence[int]) -> list[Image.Image]:
    """From the bytes in the table, or from the files that it names."""
    images = []
    for frame in frames:
        value = rows[camera][frame].as_py()
        file = io.BytesIO(value["bytes"]) if value["bytes"] else folder.directory / value["path"]
        try:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        except OSError as error:
            raise CalibrationError(f"{folder.directory}: an image of {camera} cannot be read: {error}") from error
    return images


def _numbers(value: Any) -> NDArray[np.float64]:
    return np.asarray(value.as_py(), dtype=np.float64).reshape(-1)


def _action(rows: Any, frame: int, chunk: int | None) -> NDArray[np.float64]:
    if chunk is None:
        return _numbers(rows[frame])
    return np.stack([_numbers(rows[min(frame + step, len(rows) - 1)]) for step in range(chunk)])
