"""Small LeRobotDataset folders in both layouts: the colour of an image says of what episode, frame and camera it is."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
LENGTHS = (12, 7, 9)
TASKS = ("push the button", "open the window")
TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZE = (48, 32)


def colour(camera: str, episode: int, frame: int) -> tuple[int, int, int]:
    """Distances are more than twice the error of a video."""
    return (40 + 12 * frame, 60 + 50 * episode, 80 if camera == TOP else 160)


def save_lerobot(directory: Path, version: str, *, video: bool = True) -> Path:
    """Three episodes; state [episode, frame], action [frame, −frame, 1]."""
    (directory / "meta").mkdir(parents=True)
    kind = "video" if video else "image"
    v3 = version.startswith("v3")
    number = "{chunk_index:03d}/file-{file_index:03d}" if v3 else ""
    info = {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 2,
        "data_path": f"data/chunk-{number}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": f"videos/{{video_key}}/chunk-{number}.mp4"
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            TOP: {"dtype": kind, "shape": [32, 48, 3]},
            WRIST: {"dtype": kind, "shape": [32, 48, 3]},
            "observation.images.depth": {"dtype": "video", "shape": [32, 48, 1], "info": {"is_depth_map": True}},
            "observation.state": {"dtype": "float32", "shape": [2]},
            "action": {"dtype": "float32", "shape": [3]},
            "task_index": {"dtype": "int64", "shape": [1]},
        },
    }
    (directory / "meta" / "info.json").write_text(json.dumps(info), encoding="utf-8")
    (_save_v3 if v3 else _save_v2)(directory, video=video)
    return directory


def _save_v2(directory: Path, *, video: bool) -> None:
    lines = [json.dumps({"task_index": index, "task": task}) for index, task in enumerate(TASKS)]
    (directory / "meta" / "tasks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps({"episode_index": index, "length": length}) for index, length in enumerate(LENGTHS)]
    (directory / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for episode in range(len(LENGTHS)):
        name = f"chunk-{episode // 2:03d}"
        _write(directory / "data" / name / f"episode_{episode:06d}.parquet", _frames([episode], video=video))
        for camera in (TOP, WRIST) if video else ():
            _write_video(directory / "videos" / name / camera / f"episode_{episode:06d}.mp4", camera, [episode])


def _save_v3(directory: Path, *, video: bool) -> None:
    """The first two episodes share files; the index of the tasks' data frame has no name."""
    _write(directory / "meta" / "tasks.parquet", {"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    files = [[0, 1], [2]]
    rows: list[dict[str, Any]] = []
    for file, episodes in enumerate(files):
        _write(directory / "data" / "chunk-000" / f"file-{file:03d}.parquet", _frames(episodes, video=video))
        for camera in (TOP, WRIST) if video else ():
            _write_video(directory / "videos" / camera / "chunk-000" / f"file-{file:03d}.mp4", camera, episodes)
        for episode in episodes:
            row: dict[str, float] = {
                "episode_index": episode,
                "length": LENGTHS[episode],
                "data/chunk_index": 0,
                "data/file_index": file,
            }
            start = sum(LENGTHS[earlier] for earlier in episodes if earlier < episode) / FPS
            for camera in (TOP, WRIST) if video else ():
                place = {"chunk_index": 0, "file_index": file, "from_timestamp": start}
                row |= {f"videos/{camera}/{key}": value for key, value in place.items()}
            rows.append(row)
    # Files of meta/episodes need not be in the order of the episodes
    for file, part in enumerate([rows[2:], rows[:2]]):
        path = directory / "meta" / "episodes" / "chunk-000" / f"file-{file:03d}.parquet"
        _write(path, {key: [row[key] for row in part] for key in part[0]})


def _frames(episodes: list[int], *, video: bool) -> dict[str, list[Any]]:
    frames = [(episode, frame) for episode in episodes for frame in range(LENGTHS[episode])]
    columns: dict[str, list[Any]] = {
        "observation.state": [[float(episode), float(frame)] for episode, frame in frames],
        "action": [[float(frame), -float(frame), 1.0] for _, frame in frames],
        "episode_index": [episode for episode, _ in frames],
        "frame_index": [frame for _, frame in frames],
        "task_index": [episode % 2 for episode, _ in frames],
    }
    for camera in () if video else (TOP, WRIST):
        columns[camera] = [{"bytes": _png(colour(camera, *frame)), "path": "frame.png"} for frame in frames]
    return columns


def _png(value: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, value).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _write_video(path: Path, camera: str, episodes: list[int]) -> None:
    """Key frames are far apart, so that frames in between have to be decoded from them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"g": "8", "qscale:v": "2"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for episode in episodes:
            for frame in range(LENGTHS[episode]):
                pixels = np.full((SIZE[1], SIZE[0], 3), colour(camera, episode, frame), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
