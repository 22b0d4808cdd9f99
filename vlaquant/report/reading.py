"""Looking into JSON of which not every field need be there."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlaquant.errors import EvaluationError


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        EvaluationError: no such file, not JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise EvaluationError(f"{path}: holds {type(data).__name__}, wanted an object")
    return data


def look(data: object, *keys: str) -> Any:
    """What lies under a chain of keys; None if something on the way is missing."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def mapping(data: object, *keys: str) -> dict[str, Any]:
    """The mapping there; an empty one if there is none."""
    found = look(data, *keys)
    return dict(found) if isinstance(found, Mapping) else {}


def figure(data: object, *keys: str) -> float | None:
    """The finite number there; None if there is none."""
    found = look(data, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def figures(data: object, *keys: str) -> tuple[float, ...]:
    """The list of finite numbers there; empty if it is anything else."""
    found = look(data, *keys)
    if not isinstance(found, list):
        return ()
    values = [figure({"one": one}, "one") for one in found]
    return tuple(value for value in values if value is not None) if None not in values else ()


def words(data: object, *keys: str) -> str | None:
    """The text there; None if there is none."""
    found = look(data, *keys)
    return found if isinstance(found, str) else None
