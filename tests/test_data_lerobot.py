"""LeRobotDataset folders: the right frame of the right camera with the right state, action and instruction."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_recordings import LENGTHS, TASKS, TOP, WRIST, colour, save_lerobot

from vlaquant.errors import CalibrationError
from vlaquant.families.data import load_lerobot
from vlaquant.families.data.choosing import choose_frames

LAYOUTS = [("v2.0", "video"), ("v2.1", "image"), ("v3.0", "video"), ("v3.0", "image")]


def assert_shows(image: Any, camera: str, episode: int, frame: int, error: float = 5.0) -> None:
    seen = np.asarray(image, dtype=np.float64).mean(axis=(0, 1))
    np.testing.assert_allclose(seen, colour(camera, episode, frame), rtol=0.0, atol=error)


@pytest.mark.parametrize(("version", "kind"), LAYOUTS)
def test_every_frame_is_what_was_recorded(version: str, kind: str, tmp_path: Path) -> None:
    seen = load_lerobot(save_lerobot(tmp_path / "data", version, video=kind == "video"), 1000)
    assert len(seen) == sum(LENGTHS)
    frames = [(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    for one, (episode, frame) in zip(seen, frames, strict=True):
        assert one.state is not None
        assert one.action is not None
        assert one.state.tolist() == [episode, frame]
        assert one.action.tolist() == [frame, -frame, 1.0]
        assert (one.episode, one.instruction, one.task) == (episode, TASKS[episode % 2], TASKS[episode % 2])
        assert len(one.images) == 2, "depth is no camera"
        for camera, image in zip((TOP, WRIST), one.images, strict=True):
            assert_shows(image, camera, episode, frame, error=5.0 if kind == "video" else 0.0)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_part_of_the_frames_is_chosen_by_the_seed(version: str, tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", version)
    seen = load_lerobot(directory, 7, seed=5, unnorm_key="here")
    found = [(one.episode, int(one.state[1])) for one in seen if one.state is not None]
    assert found == choose_frames(LENGTHS, 7, seed=5)
    for one, (episode, frame) in zip(seen, found, strict=True):
        assert_shows(one.image, TOP, episode, frame)
        assert one.unnorm_key == "here"


def test_cameras_are_given_in_the_policys_order_and_may_be_missing(tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", "v3.0")
    one = load_lerobot(directory, 1000, cameras=[WRIST, None, TOP])[0]
    assert one.images[1] is None
    assert_shows(one.images[0], WRIST, 0, 0)
    assert_shows(one.images[2], TOP, 0, 0)


def test_other_keys_and_chunks_that_end_with_the_episode(tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", "v2.1", video=False)
    seen = load_lerobot(directory, 1000, state="action", action="observation.state", chunk=3)
    assert seen[10].action is not None
    assert seen[10].action.tolist() == [[0.0, 10.0], [0.0, 11.0], [0.0, 11.0]]
    assert seen[10].state is not None
    assert seen[10].state.tolist() == [10.0, -10.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ["observation.images.left"]}, f"no camera 'observation.images.left'; it has {TOP}, {WRIST}"),
        ({"cameras": ["observation.images.depth"]}, "no camera 'observation.images.depth'"),
        ({"state": "joints"}, "no feature 'joints'; it has .*observation.state, action"),
        ({"action": "actions"}, "no feature 'actions'"),
    ],
)
def test_keys_that_do_not_exist(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_lerobot(save_lerobot(tmp_path / "data", "v3.0"), 4, **options)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="nowhere: no such folder"):
        load_lerobot(tmp_path / "nowhere", 4)
    with pytest.raises(CalibrationError, match=r"not a LeRobotDataset \(it has no meta/info.json\)"):
        load_lerobot(tmp_path, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v1.6"}, "has layout v1.6; those that can be read are v2.0, v2.1 and v3.0"),
        ({"fps": None}, "info.json: not as LeRobot writes it"),
        ({"features": {"action": {"dtype": "float32"}}}, "has no camera; its features are action"),
    ],
)
def test_facts_that_cannot_be_read(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", "v2.1", video=False)
    info = directory / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        load_lerobot(directory, 4)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_an_empty_dataset_is_refused(version: str, tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", version)
    (directory / "meta" / "episodes.jsonl").write_text("", encoding="utf-8")
    for file in directory.glob("meta/episodes/*/*"):
        file.unlink()
    with pytest.raises(CalibrationError, match="holds no episode"):
        load_lerobot(directory, 4)


@pytest.mark.parametrize("name", ["*.mp4", "*.parquet"])
def test_files_that_are_missing_or_damaged(name: str, tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", "v2.1")
    file = min(directory.rglob(name))
    file.write_bytes(b"no longer what it was")
    with pytest.raises(CalibrationError, match=f"{file.name}: cannot be"):
        load_lerobot(directory, 1000)
    file.unlink()
    with pytest.raises(CalibrationError, match=f"{file.name}: no such"):
        load_lerobot(directory, 1000)


def test_a_video_that_is_shorter_than_the_table(tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", "v2.1")
    long, short = sorted(directory.rglob(f"{TOP}/*.mp4"))[:2]
    long.write_bytes(short.read_bytes())
    with pytest.raises(CalibrationError, match=r"no frame at 0\.700 s \(the nearest is at 0\.600 s\)"):
        load_lerobot(directory, 1000)


def test_a_table_that_is_shorter_than_meta_says(tmp_path: Path) -> None:
    directory = save_lerobot(tmp_path / "data", "v2.1", video=False)
    file = directory / "meta" / "episodes.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("12", "13"), encoding="utf-8")
    with pytest.raises(CalibrationError, match="holds 12 frames of episode 0, meta/ says 13"):
        load_lerobot(directory, 1000)


def test_without_pyav_only_videos_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, images = (save_lerobot(tmp_path / str(kind), "v3.0", video=kind) for kind in (True, False))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CalibrationError, match=r"needs PyAV; install it with: pip install 'vlaquant\[video\]'"):
        load_lerobot(video, 4)
    assert len(load_lerobot(images, 4)) == 4
