"""Calibration sections of a recipe: each kind reaches its reader, and what it reads reaches the policy."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import observations, openvla, save_observations
from tiny_recordings import TOP, WRIST, save_lerobot

import vlaquant
from vlaquant.engine.opening import Opened, recipe_samples
from vlaquant.errors import CalibrationError, RecipeError
from vlaquant.families import FAMILIES
from vlaquant.families.data import load_jsonl, load_lerobot
from vlaquant.families.observation import Observation
from vlaquant.recipe import load_recipe

RULES = [{"part": "language", "scheme": "w4a16", "group_size": 32}]


PAGE = (Path(__file__).parent.parent / "docs" / "robot-data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def read(section: dict[str, Any], seed: int = 0) -> list[Observation]:
    recipe = load_recipe({"rules": RULES, "calibration": section, "seed": seed})
    return list(recipe_samples(recipe, Opened(torch.nn.Identity(), FAMILIES["openvla"], None, None, "")))


def jsonl(folder: Path, count: int = 12) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "frame.png")
    lines = [{"images": ["frame.png"], "instruction": "push", "state": [row]} for row in range(count)]
    file = folder / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def states(seen: list[Observation]) -> list[list[float]]:
    return [one.state.tolist() for one in seen if one.state is not None]


def test_lerobot_gets_all_its_keys_and_the_recipes_seed(tmp_path: Path) -> None:
    path = save_lerobot(tmp_path / "data", "v3.0", video=False)
    section = {"kind": "lerobot", "path": str(path), "cameras": [WRIST, None, TOP], "samples": 5, "unnorm_key": "here"}
    section |= {"state": "action", "action": "observation.state", "chunk": 4}
    seen = read(section, seed=7)
    assert states(seen) == states(load_lerobot(path, 5, seed=7, state="action")) != states(read(section))
    for one in seen:
        assert [image is None for image in one.images] == [False, True, False]
        assert one.action is not None
        assert (one.action.shape, one.unnorm_key) == ((4, 2), "here")


def test_jsonl_gets_the_recipes_seed(tmp_path: Path) -> None:
    section = {"kind": "jsonl", "path": str(jsonl(tmp_path)), "samples": 4, "unnorm_key": "here"}
    seen = read(section, seed=7)
    assert states(seen) == states(load_jsonl(tmp_path / "mine.jsonl", 4, seed=7)) != states(read(section))
    assert {one.unnorm_key for one in seen} == {"here"}


def test_episodes_gets_its_columns(tmp_path: Path) -> None:
    save_observations(tmp_path, "mine", observations(5))
    section = {"kind": "episodes", "path": str(tmp_path), "split": "mine", "samples": 3, "cameras": [None, "image"]}
    seen = read(section)
    assert [[image is None for image in one.images] for one in seen] == [[True, False]] * 3
    with pytest.raises(CalibrationError, match="no column 'joints'"):
        read(section | {"state": "joints"})
    with pytest.raises(CalibrationError, match="no column 'moves'"):
        read(section | {"action": "moves"})


@pytest.mark.parametrize("kind", ["lerobot", "jsonl"])
def test_a_policy_is_calibrated_with_it(kind: str, tmp_path: Path) -> None:
    section: dict[str, Any] = {"kind": kind, "path": str(jsonl(tmp_path))}
    if kind == "lerobot":
        section |= {"path": str(save_lerobot(tmp_path / "data", "v2.1")), "cameras": [TOP]}
    recipe = {"rules": RULES, "quantizer": {"kind": "gptq"}, "calibration": section}
    result = vlaquant.quantize(openvla(), recipe)
    assert len(result.layers) == 14
    assert result.mean_relative_loss is not None
    assert result.mean_relative_loss < 0.1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "lerobot"}, "calibration.path: missing"),
        ({"kind": "lerobot", "path": "a", "camera": "top"}, "unknown key; legal keys here: .*did you mean 'cameras'"),
        ({"kind": "lerobot", "path": "a", "cameras": []}, "calibration.cameras"),
        ({"kind": "lerobot", "path": "a", "cameras": "top"}, "calibration.cameras: must be a list, got 'top'"),
        ({"kind": "jsonl", "path": "a", "cameras": ["top"]}, "calibration.cameras: unknown key"),
        ({"kind": "json", "path": "a"}, "must be one of episodes, lerobot, jsonl, text, got 'json'; did you mean"),
    ],
)
def test_sections_that_are_wrong(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"rules": RULES, "calibration": section})


def test_a_section_reads_back_from_what_it_resolved_to() -> None:
    recipe = load_recipe({"rules": RULES, "calibration": {"kind": "lerobot", "path": "a", "cameras": ["top", None]}})
    assert recipe.resolved()["calibration"]["cameras"] == ["top", None]
    assert load_recipe(recipe.resolved()) == recipe


def test_the_recipes_of_the_documentation_are_valid() -> None:
    kinds = [load_recipe({"rules": RULES} | yaml.safe_load(block)).calibration for block in blocks("yaml")]
    assert [one.kind for one in kinds if one is not None] == ["jsonl", "lerobot", "episodes"]


def test_the_lines_of_the_documentation_are_read(tmp_path: Path) -> None:
    (lines,) = blocks("json")
    for name in re.findall(r"\w+/\w+\.jpg", lines):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "mine.jsonl").write_text(lines, encoding="utf-8")
    one, other = load_jsonl(tmp_path / "mine.jsonl", 10)
    assert (one.task, other.images[1], other.state) == ("cup", None, None)


def test_the_conversion_of_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (4, 4), (9, 9, 9))
    frame = {"front": picture, "wrist": picture, "instruction": "push", "state": np.ones(3), "action": np.zeros(2)}
    (code,) = blocks("python")
    exec(code, {"my_episodes": [[frame, frame], [frame]]})
    seen = load_jsonl(tmp_path / "recordings" / "calibration.jsonl", 10)
    assert [one.episode for one in seen] == [0, 0, 1]
    assert all(len(one.images) == 2 and one.image.getpixel((0, 0)) == (9, 9, 9) for one in seen)
