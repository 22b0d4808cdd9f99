"""Where calibration data comes from."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from vlaquant.recipe.base import Name, RecipePath, Section

Cameras = Annotated[tuple[Name | None, ...] | None, Field(strict=False, min_length=1)]


class Episodes(Section):
    """Recorded robot episodes: observations, evenly spread over one split of a ``datasets`` folder.

    Attributes:
        path: the folder, with a subfolder of parquet files for each split.
        unnorm_key: dataset whose action statistics apply; can be left out if the checkpoint knows only one.
        split: which subfolder.
        cameras: image columns in the order of the policy's cameras, null for one that is missing; by default ``image``,
            or else all image columns.
        state: column of the state, by default ``state``.
        action: column of the action, by default ``action``.
        samples: how many observations.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["episodes"] = "episodes"
    path: RecipePath
    unnorm_key: Name | None = None
    split: Name = "calibration"
    cameras: Cameras = None
    state: Name | None = None
    action: Name | None = None
    samples: PositiveInt = 64
    min_tokens: PositiveInt = 32


class LeRobot(Section):
    """A LeRobotDataset folder, layout 2.0, 2.1 or 3.0: frames spread over its episodes and their phases.

    Attributes:
        path: the dataset's folder.
        unnorm_key: as for episodes.
        cameras: keys in the order of the policy's cameras, null for one that is missing; by default all of the dataset.
        state: key of the state, by default ``observation.state``.
        action: key of the action, by default ``action``.
        chunk: give the actions of so many frames from each one on.
        samples: how many frames.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["lerobot"] = "lerobot"
    path: RecipePath
    unnorm_key: Name | None = None
    cameras: Cameras = None
    state: Name | None = None
    action: Name | None = None
    chunk: PositiveInt | None = None
    samples: PositiveInt = 64
    min_tokens: PositiveInt = 32


class JsonLines(Section):
    """A file with a JSON object a line beside image files, as docs/robot-data.md describes it; chosen as for lerobot.

    Attributes:
        path: the file; images lie relative to its folder.
        unnorm_key: as for episodes.
        samples: how many lines.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: RecipePath
    unnorm_key: Name | None = None
    samples: PositiveInt = 64
    min_tokens: PositiveInt = 32


class Text(Section):
    """A text file, for language models: windows of it, evenly spread.

    Attributes:
        path: the file.
        samples: how many windows.
        sequence_length: tokens of a window.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["text"] = "text"
    path: RecipePath
    samples: PositiveInt = 64
    sequence_length: PositiveInt = 512
    min_tokens: PositiveInt = 32


Calibration = Annotated[Episodes | LeRobot | JsonLines | Text, Field(discriminator="kind")]
