"""Folders that ``datasets`` reads: several cameras, states, and names of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from vlaquant.errors import CalibrationError
from vlaquant.families.data import load_observations


def write(folder: Path, **columns: Any) -> Path:
    """Four rows, each image in its own grey."""

    def grey(start: int) -> list[Image.Image]:
        return [Image.new("RGB", (6, 4), (start + row, 0, 0)) for row in range(4)]

    made = {"left": grey(10), "right": grey(20), "instruction": [f"do {row}" for row in range(4)]} | columns
    (folder / "calibration").mkdir()
    rows = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]
    Dataset.from_list(rows).to_parquet(folder / "calibration" / "data.parquet")
    return folder


def reds(images: Any) -> list[int | None]:
    return [None if image is None else int(np.asarray(image)[0, 0, 0]) for image in images]


def test_all_image_columns_by_default_and_the_rest_as_far_as_it_is_there(tmp_path: Path) -> None:
    seen = load_observations(write(tmp_path, state=[[row, 1.5] for row in range(4)]), "calibration")
    assert [reds(one.images) for one in seen] == [[10 + row, 20 + row] for row in range(4)]
    assert [one.state.tolist() for one in seen if one.state is not None] == [[row, 1.5] for row in range(4)]
    assert [(one.action, one.episode, one.task) for one in seen] == [(None, 0, "")] * 4
    assert [one.instruction for one in seen] == [f"do {row}" for row in range(4)]


def test_named_columns_and_missing_cameras(tmp_path: Path) -> None:
    write(tmp_path, joints=[[float(row)] for row in range(4)], moves=[[[1.0, 2.0]] * 3] * 4)
    options: dict[str, Any] = {"cameras": ["right", None, "left"], "state": "joints", "action": "moves"}
    seen = load_observations(tmp_path, "calibration", 2, **options)
    assert [reds(one.images) for one in seen] == [[20, None, 10], [23, None, 13]]
    assert [one.state.tolist() for one in seen if one.state is not None] == [[0.0], [3.0]]
    assert [one.action.shape for one in seen if one.action is not None] == [(3, 2)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ["top"]}, "no camera 'top'; its image columns are left, right"),
        ({"cameras": ["instruction"]}, "no camera 'instruction'"),
        ({"state": "joints"}, "no column 'joints'; its columns are left, right, instruction"),
        ({"action": "moves"}, "no column 'moves'"),
    ],
)
def test_columns_that_do_not_exist(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_observations(write(tmp_path), "calibration", **options)


def test_tables_without_images_or_instructions(tmp_path: Path) -> None:
    for name in ("blind", "mute"):
        (tmp_path / name).mkdir()
    Dataset.from_list([{"instruction": "do"}]).to_parquet(tmp_path / "blind" / "data.parquet")
    Dataset.from_list([{"image": Image.new("RGB", (2, 2))}]).to_parquet(tmp_path / "mute" / "data.parquet")
    with pytest.raises(CalibrationError, match="no column holds images; its columns are instruction"):
        load_observations(tmp_path, "blind")
    with pytest.raises(CalibrationError, match="no column 'instruction'; its columns are image"):
        load_observations(tmp_path, "mute")
