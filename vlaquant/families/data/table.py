"""Episodes in a folder that ``datasets`` reads: parquet files with a row for each observation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image, load_dataset
from numpy.typing import NDArray

from vlaquant.errors import CalibrationError
from vlaquant.families.observation import Observation


def load_observations(
    directory: Path,
    split: str,
    count: int | None = None,
    unnorm_key: str | None = None,
    *,
    cameras: Sequence[str | None] | None = None,
    state: str | None = None,
    action: str | None = None,
) -> list[Observation]:
    """Observations of one split: the rows of the parquet files in ``directory / split``.

    Columns are ``instruction``, images, and as far as there are any ``state``, ``action``, ``episode`` and ``task``.

    Args:
        directory: holds a folder for each split.
        split: its name.
        count: so many rows, evenly spread over the split; None for all.
        unnorm_key: of all observations.
        cameras: image columns in the order of the policy's cameras, None for one that is missing; by default ``image``,
            or else all image columns in their order.
        state: column of the state, if it is not ``state``.
        action: column of the action, if it is not ``action``.

    Raises:
        CalibrationError: no such folder, split or column, or it is empty.
    """
    where = directory / split
    if not where.is_dir():
        raise CalibrationError(f"{directory}: no split {split!r} (a folder of parquet files of that name)")
    if not any(where.glob("*.parquet")):
        raise CalibrationError(f"{where}: holds no parquet file")
    rows = load_dataset("parquet", data_files=str(where / "*.parquet"), split="train")
    if len(rows) == 0:
        raise CalibrationError(f"{where}: holds no observation")
    images = _cameras(where, rows, cameras)
    state = _column(where, rows, state, "state")
    action = _column(where, rows, action, "action")
    if "instruction" not in rows.column_names:
        raise CalibrationError(f"{where}: no column 'instruction'; its columns are {', '.join(rows.column_names)}")
    if count is not None and count < len(rows):
        rows = rows.select(np.linspace(0, len(rows) - 1, count).round().astype(int).tolist())
    wanted = {*filter(None, (*images, state, action)), "instruction", "episode", "task"}
    return [
        Observation(
            images=tuple(None if camera is None else row[camera] for camera in images),
            instruction=row["instruction"],
            state=_numbers(row, state),
            action=_numbers(row, action),
            episode=int(row.get("episode") or 0),
            task=row.get("task") or "",
            unnorm_key=unnorm_key,
        )
        for row in rows.select_columns([name for name in rows.column_names if name in wanted])
    ]


def _cameras(where: Path, rows: Any, cameras: Sequence[str | None] | None) -> list[str | None]:
    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if not found:
        raise CalibrationError(f"{where}: no column holds images; its columns are {', '.join(rows.column_names)}")
    if cameras is None:
        return ["image"] if "image" in found else [*found]
    for camera in cameras:
        if camera is not None and camera not in found:
            raise CalibrationError(f"{where}: no camera {camera!r}; its image columns are {', '.join(found)}")
    return list(cameras)


def _column(where: Path, rows: Any, name: str | None, default: str) -> str | None:
    if name is None:
        return default if default in rows.column_names else None
    if name not in rows.column_names:
        raise CalibrationError(f"{where}: no column {name!r}; its columns are {', '.join(rows.column_names)}")
    return name


def _numbers(row: dict[str, Any], column: str | None) -> NDArray[np.float64] | None:
    value = None if column is None else row[column]
    return None if value is None else np.asarray(value, dtype=np.float64)
