"""Film strips: what both policies saw in an episode that only one of them solved."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from markupsafe import Markup

from vlaquant.evaluate.results import Outcome, Pair, Rollouts
from vlaquant.evaluate.videos import read_frames, spread
from vlaquant.report.chart import Chart, Table, wide
from vlaquant.report.svg import drawing, quiet, tag, text, tip

#: Frames of a strip on a desk, and on a phone; strips on a page; and the side of a frame in the file, in pixels.
_WIDE, _NARROW = 8, 4
_MOST = 3
_SIDE, _QUALITY = 144, 70
_GAP = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Film:
    """One episode of both policies; frames are JPEG as ``data:`` addresses, evenly spread over the episode."""

    pair: Pair
    before: tuple[str, ...]
    after: tuple[str, ...]


def find_films(found: Rollouts, folder: Path) -> tuple[Film, ...]:
    """Strips of the first episodes that ended differently, those that the quantized policy lost first.

    Args:
        found: names the videos.
        folder: that ``found.videos`` starts from.

    Raises:
        EvaluationError: a video that is there, and cannot be read.
    """
    if found.videos is None:
        return ()
    place = folder / found.videos
    apart = sorted((pair for pair in found.episodes if pair.differs), key=lambda pair: pair.candidate.success)
    films: list[Film] = []
    for pair in apart:
        names = [pair.reference.video, pair.candidate.video]
        files = [place / name for name in names if name is not None]
        if len(films) < _MOST and len(files) == len(names) and all(file.is_file() for file in files):
            films.append(Film(pair, *(tuple(map(address, read_frames(file, _WIDE))) for file in files)))
    return tuple(films)


def address(frame: PIL.Image.Image) -> str:
    """A frame as a small JPEG in a ``data:`` address."""
    small = frame.copy()
    small.thumbnail((_SIDE, _SIDE))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


def film_strips(films: Sequence[Film]) -> Chart:
    """Both policies in the episodes that they ended differently: one above the other, from start to end."""
    first = films[0].pair
    summary = (
        f"Both policies started alike, and one alone solved the task. From left to right an episode from its start to "
        f"its end. {first.task}, seed {first.seed}: float {_ending(first.reference)}, quantized "
        f"{_ending(first.candidate)}."
    )
    rows = tuple(
        (film.pair.task, str(film.pair.seed), _ending(film.pair.reference), _ending(film.pair.candidate))
        for film in films
    )
    return Chart(
        "Episodes that ended differently",
        summary,
        lambda width: _drawing(width, films, summary),
        Table(("task", "seed", "float", "quantized"), rows, frozenset({1})),
    )


def _ending(outcome: Outcome) -> str:
    return f"solved it in {outcome.steps} steps" if outcome.success else f"failed after {outcome.steps} steps"


def _drawing(width: int, films: Sequence[Film], label: str) -> Markup:
    count = _WIDE if wide(width) else _NARROW
    side = (width + _GAP) / count - _GAP
    shapes, y = [], 0.0
    for film in films:
        shapes.append(text(0, y + 14, f"{film.pair.task}, seed {film.pair.seed}", font_weight="600"))
        y += 24
        strips = (("float", film.pair.reference, film.before), ("quantized", film.pair.candidate, film.after))
        for who, outcome, frames in strips:
            shapes.append(quiet(0, y + 12, f"{who}: {_ending(outcome)}"))
            y += 18
            for place, number in enumerate(spread(len(frames), count)):
                words = tip(f"{who}, frame {number + 1} of {len(frames)}")
                x = place * (side + _GAP)
                shapes.append(tag("image", words, href=frames[number], x=x, y=y, width=side, height=side))
            y += side + 8
        y += 10
    return drawing(width, y, label, *shapes)
