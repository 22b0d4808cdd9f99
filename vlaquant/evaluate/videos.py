"""Episodes as small animated WebP files, which every browser plays, and frames out of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
from PIL import ImageSequence

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.environment import Image

SUFFIX = ".webp"
#: Of a video: a frame is what a policy was shown when it was asked, and shown so long.
_FRAME_MS, _QUALITY = 150, 75


@dataclass(slots=True)
class Recording:
    """The frames of one episode, in order."""

    frames: list[Image] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """An animated WebP; the last frame stays longer."""
        path.parent.mkdir(parents=True, exist_ok=True)
        first, *rest = [PIL.Image.fromarray(frame) for frame in self.frames]
        shown = [_FRAME_MS] * len(rest) + [10 * _FRAME_MS]
        first.save(path, save_all=True, append_images=rest, duration=shown, loop=0, quality=_QUALITY)


def read_frames(path: Path, count: int) -> list[PIL.Image.Image]:
    """At most ``count`` frames of a video, evenly spread, with the first and the last.

    Raises:
        EvaluationError: no such file, or no images in it.
    """
    try:
        with PIL.Image.open(path) as video:
            total = getattr(video, "n_frames", 1)
            wanted = set(spread(total, count))
            return [
                frame.convert("RGB") for number, frame in enumerate(ImageSequence.Iterator(video)) if number in wanted
            ]
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read as a video: {error}") from error


def spread(total: int, count: int) -> Sequence[int]:
    """At most ``count`` of the numbers below ``total``, evenly spread, with the first and the last."""
    if total <= count:
        return range(total)
    return [round(place * (total - 1) / max(count - 1, 1)) for place in range(count)]
