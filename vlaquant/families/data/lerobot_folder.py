"""Where things lie in a LeRobotDataset of layout 2.0, 2.1 or 3.0.

2.x has a table and a video for each episode, 3.0 puts many episodes into one file and says in ``meta/episodes`` where
each of them begins. (Source: code of huggingface/lerobot, src/lerobot/datasets.)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vlaquant.errors import CalibrationError

_INFO = Path("meta") / "info.json"


@dataclass(frozen=True, slots=True)
class Episode:
    """Where one episode lies.

    Attributes:
        number: its ``episode_index``.
        length: in frames.
        place: values for the placeholders of the path of its table.
        videos: camera -> (values for the placeholders of the path, seconds at which it begins in that file).
    """

    number: int
    length: int
    place: Mapping[str, int]
    videos: Mapping[str, tuple[Mapping[str, int], float]]


class LeRobotFolder:
    """An open folder.

    Attributes:
        directory: holds ``meta/info.json``.
        features: key -> what the dataset says about it.
        cameras: keys of all cameras but depth.
        fps: frames a second.

    Raises:
        CalibrationError: not such a folder; from every method, a file that is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise CalibrationError(f"{directory}: no such folder")
        if not (directory / _INFO).is_file():
            raise CalibrationError(f"{directory}: not a LeRobotDataset (it has no {_INFO})")
        self.directory = directory
        try:
            self._info: dict[str, Any] = json.loads((directory / _INFO).read_text(encoding="utf-8"))
            version = str(self._info["codebase_version"])
            self.features: dict[str, dict[str, Any]] = self._info["features"]
            self.fps = float(self._info["fps"])
            self.cameras = [key for key, feature in self.features.items() if _is_camera(feature)]
            self._data_path = str(self._info["data_path"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{directory / _INFO}: not as LeRobot writes it: {error!r}") from error
        if not version.startswith(("v2.", "v3.")):
            raise CalibrationError(f"{directory}: has layout {version}; those that can be read are v2.0, v2.1 and v3.0")
        self._v3 = version.startswith("v3.")

    def is_video(self, camera: str) -> bool:
        """Whether the images of a camera are in video files, and not in the table."""
        return bool(self.features[camera]["dtype"] == "video")

    def tasks(self) -> dict[int, str]:
        """``task_index`` -> instruction."""
        if not self._v3:
            rows = _json_lines(self.directory / "meta" / "tasks.jsonl")
            return {int(row["task_index"]): str(row["task"]) for row in rows}
        table = _read_table(self.directory / "meta" / "tasks.parquet").to_pydict()
        # The text is the index of a data frame, whose name was not always the same
        text = next(name for name in table if name != "task_index")
        return {int(index): str(task) for index, task in zip(table["task_index"], table[text], strict=True)}

    def episodes(self, videos: Sequence[str]) -> list[Episode]:
        """All episodes, with the places of these cameras."""
        found = self._v3_episodes(videos) if self._v3 else self._v2_episodes(videos)
        if not found:
            raise CalibrationError(f"{self.directory}: holds no episode")
        return found

    def _v2_episodes(self, videos: Sequence[str]) -> list[Episode]:
        size = int(self._info.get("chunks_size", 1000))
        episodes = []
        for row in _json_lines(self.directory / "meta" / "episodes.jsonl"):
            number = int(row["episode_index"])
            place = {"episode_index": number, "episode_chunk": number // size}
            episodes.append(Episode(number, int(row["length"]), place, dict.fromkeys(videos, (place, 0.0))))
        return episodes

    def _v3_episodes(self, videos: Sequence[str]) -> list[Episode]:
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        columns += [
            f"videos/{key}/{what}" for key in videos for what in ("chunk_index", "file_index", "from_timestamp")
        ]
        found = {}
        for file in sorted((self.directory / "meta" / "episodes").glob("*/*.parquet")):
            for row in _read_table(file, columns).to_pylist():
                shown = {key: (_place(row, f"videos/{key}"), row[f"videos/{key}/from_timestamp"]) for key in videos}
                found[row["episode_index"]] = Episode(row["episode_index"], row["length"], _place(row, "data"), shown)
        return [found[number] for number in sorted(found)]

    def rows(self, episode: Episode, columns: list[str]) -> Any:
        """The frames of an episode as a pyarrow table."""
        path = self.directory / self._data_path.format(**episode.place)
        table = _read_table(path, columns, filters=[("episode_index", "=", episode.number)])
        if table.num_rows != episode.length:
            raise CalibrationError(
                f"{path}: holds {table.num_rows} frames of episode {episode.number}, meta/ says {episode.length}"
            )
        return table

    def video(self, episode: Episode, camera: str) -> tuple[Path, float]:
        """The video file of an episode, and the seconds at which the episode begins in it."""
        place, start = episode.videos[camera]
        template = self._info.get("video_path") or ""
        return self.directory / template.format(video_key=camera, **place), start


def _is_camera(feature: Mapping[str, Any]) -> bool:
    facts = {**feature, **(feature.get("info") or {}), **(feature.get("video_info") or {})}
    depth = facts.get("is_depth_map") or facts.get("video.is_depth_map")
    return feature["dtype"] in {"image", "video"} and not depth


def _place(row: Mapping[str, Any], prefix: str) -> dict[str, int]:
    return {key: row[f"{prefix}/{key}"] for key in ("chunk_index", "file_index")}


def _read_table(path: Path, columns: list[str] | None = None, **options: Any) -> Any:
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    try:
        known = pq.read_schema(path).names
        missing = [name for name in columns or () if name not in known]
        if missing:
            raise CalibrationError(f"{path}: no column {missing[0]!r}; its columns are {', '.join(known)}")
        return pq.ParquetDataset(path, **options).read(columns=columns)
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise CalibrationError(f"{path}: cannot be read: {error}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}: not JSON lines: {error}") from error
