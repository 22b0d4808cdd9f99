"""Episodes as JSON lines beside image files: the format for one's own robot data, described in docs/robot-data.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vlaquant.errors import CalibrationError
from vlaquant.families.data.choosing import choose_frames
from vlaquant.families.observation import Observation


def load_jsonl(path: Path, count: int, *, seed: int = 0, unnorm_key: str | None = None) -> list[Observation]:
    """``count`` observations of a file with one JSON object a line.

    Args:
        path: of the file; image paths in it are relative to its folder.
        count: chosen by :func:`~vlaquant.families.data.choosing.choose_frames`; lines without ``episode`` are one.
        seed: of the choice.
        unnorm_key: of all observations.

    Raises:
        CalibrationError: no such file, a line that is not as described, or an image that cannot be read.
    """
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    records = [
        (number, _record(f"{path}:{number}", line))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if line.strip()
    ]
    if not records:
        raise CalibrationError(f"{path}: holds no observation")
    cameras = {len(record["images"]) for _, record in records}
    if len(cameras) > 1:
        raise CalibrationError(
            f"{path}: lines have {' or '.join(map(str, sorted(cameras)))} images; give each as many as the policy has "
            "cameras, with null for one that is missing"
        )
    episodes: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for number, record in records:
        episodes.setdefault(record.get("episode", 0), []).append((number, record))
    groups = list(episodes.values())
    chosen = choose_frames([len(group) for group in groups], count, seed=seed)
    return [_observation(path, *groups[episode][frame], unnorm_key) for episode, frame in chosen]


def _record(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: must be an object with the keys {', '.join(_KEYS)}, got {line[:60]}")
    unknown = sorted(record.keys() - _KEYS.keys())
    if unknown:
        raise CalibrationError(f"{where}: unknown key {unknown[0]!r}; legal keys are {', '.join(_KEYS)}")
    record = {key: value for key, value in record.items() if value is not None}
    for key in ("images", "instruction"):
        if key not in record:
            raise CalibrationError(f"{where}: {key!r} is missing")
    for key, value in record.items():
        legal, wanted = _KEYS[key]
        if not legal(value):
            raise CalibrationError(f"{where}: {key!r} must be {wanted}, got {str(value)[:60]}")
    return record


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(item is None or isinstance(item, str) for item in value)


def _are_numbers(value: Any) -> bool:
    # Not isinstance: true and false are numbers to Python
    return isinstance(value, list) and bool(value) and all(type(item) in {int, float} for item in value)


def _is_action(value: Any) -> bool:
    if not isinstance(value, list) or not any(isinstance(row, list) for row in value):
        return _are_numbers(value)
    return all(_are_numbers(row) for row in value) and len({len(row) for row in value}) == 1


#: Key -> (whether a value is legal, what is wanted).
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "images": (_are_paths, "a list of paths"),
    "instruction": (lambda value: isinstance(value, str), "text"),
    "state": (_are_numbers, "a list of numbers"),
    "action": (_is_action, "a list of numbers, or a list of such lists of one length"),
    "episode": (lambda value: type(value) is int, "a whole number"),
    "task": (lambda value: isinstance(value, str), "text"),
}


def _observation(path: Path, number: int, record: dict[str, Any], unnorm_key: str | None) -> Observation:
    return Observation(
        images=tuple(None if name is None else _image(path, number, name) for name in record["images"]),
        instruction=record["instruction"],
        state=_numbers(record.get("state")),
        action=_numbers(record.get("action")),
        episode=record.get("episode", 0),
        task=record.get("task", ""),
        unnorm_key=unnorm_key,
    )


def _image(path: Path, number: int, name: str) -> Image.Image:
    file = path.parent / name
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}:{number}: no image {file}; paths are relative to {path.parent}") from error
    except (OSError, UnidentifiedImageError) as error:
        raise CalibrationError(f"{path}:{number}: {file} cannot be read as an image: {error}") from error


def _numbers(value: list[Any] | None) -> NDArray[np.float64] | None:
    return None if value is None else np.asarray(value, dtype=np.float64)
