"""JSON lines beside image files: read as documented, and refused with the line that is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlaquant.errors import CalibrationError
from vlaquant.families.data import load_jsonl

GOOD: dict[str, Any] = {"images": ["a.png"], "instruction": "push"}


def write(folder: Path, *lines: Any) -> Path:
    """Two image files, and a file of lines beside them."""
    (folder / "frames").mkdir()
    Image.new("RGB", (6, 4), (10, 20, 30)).save(folder / "a.png")
    Image.new("L", (6, 4), 40).save(folder / "frames" / "b.jpg")
    file = folder / "mine.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(f"{text}\n\n", encoding="utf-8")
    return file


def test_a_full_line_and_a_short_one(tmp_path: Path) -> None:
    full = {
        "images": ["a.png", None, "frames/b.jpg"],
        "instruction": "push the button",
        "state": [1, 2.5],
        "action": [[1, 2], [3, 4], [5, 6]],
        "episode": 7,
        "task": "push",
    }
    short = {"images": [None, None, "a.png"], "instruction": "pull", "state": None}
    one, other = load_jsonl(write(tmp_path, full, short), 10, unnorm_key="mine")
    assert one.images[1] is None
    assert np.asarray(one.image)[0, 0].tolist() == [10, 20, 30]
    assert one.images[2] is not None
    assert np.asarray(one.images[2]).shape == (4, 6, 3), "grey images become RGB"
    assert one.state is not None
    assert one.action is not None
    assert (one.state.tolist(), one.action.tolist()) == ([1.0, 2.5], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert (one.instruction, one.episode, one.task, one.unnorm_key) == ("push the button", 7, "push", "mine")
    assert (other.state, other.action, other.episode, other.task) == (None, None, 0, "")
    with pytest.raises(CalibrationError, match="'pull': the first camera has no image"):
        _ = other.image


def test_lines_are_chosen_by_episode_with_a_seed(tmp_path: Path) -> None:
    lines = [GOOD | {"episode": episode, "state": [frame]} for episode in (4, 2) for frame in range(9)]
    file = write(tmp_path, *lines)
    seen = load_jsonl(file, 6, seed=1)
    assert [one.episode for one in seen] == [4, 4, 4, 2, 2, 2]
    states = [int(one.state[0]) for one in seen if one.state is not None]
    assert [state // 3 for state in states] == [0, 1, 2, 0, 1, 2]
    assert [one.state for one in load_jsonl(file, 6, seed=1)] == states
    assert [one.state for one in load_jsonl(file, 6, seed=2)] != states


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{images", "mine.jsonl:2: not JSON"),
        ("[1]", r"mine.jsonl:2: must be an object with the keys images, instruction, state, action, episode, task"),
        ({"images": ["a.png"]}, "mine.jsonl:2: 'instruction' is missing"),
        ({"instruction": "push"}, "mine.jsonl:2: 'images' is missing"),
        (GOOD | {"images": []}, r"mine.jsonl:2: 'images' must be a list of paths, got \[\]"),
        (GOOD | {"images": "a.png"}, "'images' must be a list of paths, got a.png"),
        (GOOD | {"image": "a.png"}, "mine.jsonl:2: unknown key 'image'; legal keys are images, instruction"),
        (GOOD | {"instruction": 3}, "'instruction' must be text, got 3"),
        (GOOD | {"episode": "one"}, "'episode' must be a whole number, got one"),
        (GOOD | {"episode": True}, "'episode' must be a whole number, got True"),
        (GOOD | {"state": [1, "x"]}, "'state' must be a list of numbers"),
        (GOOD | {"action": [[1, 2], [3]]}, "'action' must be a list of numbers, or a list of such lists of one length"),
        (GOOD | {"action": []}, "'action' must be a list of numbers"),
        (GOOD | {"images": ["a.png", "a.png"]}, "lines have 1 or 2 images"),
        (GOOD | {"images": ["c.png"]}, "mine.jsonl:2: no image .*c.png; paths are relative to"),
        (GOOD | {"images": ["mine.jsonl"]}, "mine.jsonl:2: .*mine.jsonl cannot be read as an image"),
    ],
)
def test_lines_that_are_wrong(line: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_jsonl(write(tmp_path, GOOD, line), 10)


def test_no_file_and_no_line(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.jsonl: no such file"):
        load_jsonl(tmp_path / "nowhere.jsonl", 10)
    with pytest.raises(CalibrationError, match=r"mine\.jsonl: holds no observation"):
        load_jsonl(write(tmp_path), 10)
