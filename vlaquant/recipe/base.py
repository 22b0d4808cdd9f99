"""What all sections of a recipe are made of."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, ValidationInfo

from vlaquant.recipe.words import shown
from vlaquant.scheme import Granularity


def _group_size(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and value in {Granularity.CHANNEL, Granularity.TENSOR}:
        return value
    raise ValueError(f"must be a positive number of columns, 'channel' or 'tensor', got {shown(value)}")


def _anchored(path: Path, info: ValidationInfo) -> Path:
    """``path`` as seen from the recipe file's folder; as it is for a recipe that came as a mapping."""
    folder: Path | None = (info.context or {}).get("folder")
    return path if folder is None else Path(os.path.normpath(folder / path.expanduser()))


def parse_bytes(text: str) -> int:
    """A size such as 8GB, 500MB, 6GiB or 123456, in bytes.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no size; write it like 8GB or 500MiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def _bytes(value: object) -> int:
    if isinstance(value, str):
        return parse_bytes(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(f"must be a size such as 4.2GB, got {shown(value)}")


Name = Annotated[str, Field(min_length=1)]
GroupSize = Annotated[int | Literal["channel", "tensor"], PlainValidator(_group_size)]
RecipePath = Annotated[Path, Field(strict=False), AfterValidator(_anchored)]
Bytes = Annotated[int, PlainValidator(_bytes)]


class Section(BaseModel, frozen=True, extra="forbid", strict=True):
    """A mapping of the recipe: no key beyond those declared, no conversion between types."""
