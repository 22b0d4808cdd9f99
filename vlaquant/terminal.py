"""What people at a terminal see: tables of 100 columns, one progress bar at a time, and how a command ends.

Results go to standard output, everything else to standard error. No other module prints.
"""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

#: Columns that everything fits in.
WIDTH = 100
#: What ``--json`` without a file means.
STDOUT = Path("-")

_GAP = 2
#: The least room for a column of words, and of names.
_LEAST_WORDS, _LEAST_NAMES = 24, 16
_BOLD, _DIM, _RED, _YELLOW, _GREEN, _CYAN = "1", "2", "31", "33", "32", "36"
#: A number, perhaps with a unit and an interval.
_FIGURE = re.compile(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?( ?[%×x]| \w{1,4})?( \[[^\]]*\])?")
_DASHES = re.compile(r"-{3,}|-+(  -+)+")


@dataclass(frozen=True, slots=True)
class Closing:
    """The end of what a command says.

    Attributes:
        done: what it did.
        worse: what that costs, with a figure; or that nobody knows yet.
        next: the words of the command to type now.
    """

    done: str
    worse: str
    next: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found: as text for people, as plain values for programs, and what to make of it."""

    text: str
    document: dict[str, Any]
    closing: Closing


def format_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as aligned text; the first row is the heading. Columns of figures are aligned to the right.

    Where :data:`WIDTH` is not enough, the last column is wrapped between words, and then the names in the first one
    lose their middles; they stay distinct where that is possible. Figures are left whole. A row of one cell is a
    heading of the rows below it and goes across.
    """
    table = [tuple(row) for row in rows]
    columns = range(len(table[0]))
    cells = [row for row in table if len(row) == len(columns)]
    widths = [max(len(row[column]) for row in cells) for column in columns]
    figures = [_of_figures([row[column] for row in cells[1:]]) for column in columns]
    for column, least in ((columns[-1], _LEAST_WORDS), (0, _LEAST_NAMES)):
        excess = sum(widths) + _GAP * (len(widths) - 1) - WIDTH
        if excess > 0 and not figures[column]:
            widths[column] = max(widths[column] - excess, min(widths[column], least))
    names = shortened([row[0] for row in cells], widths[0])
    lines: list[str] = []
    for row in table:
        if len(row) < len(columns):
            lines += _wrapped(row[0])
            continue
        *first, last = names[row[0]], *row[1:]
        for number, end in enumerate(textwrap.wrap(last, widths[-1], break_on_hyphens=False) or [""]):
            lines.append(_aligned([*(first if number == 0 else [""] * len(first)), end], widths, figures))
        if row is table[0]:
            lines.append((" " * _GAP).join("-" * width for width in widths))
    return "\n".join(lines)


def _of_figures(cells: Sequence[str]) -> bool:
    """Whether a column holds figures and nothing else."""
    known = [cell for cell in cells if cell not in {"", "-", "–"}]
    return bool(known) and all(map(_FIGURE.fullmatch, known))


def _aligned(cells: Sequence[str], widths: Sequence[int], figures: Sequence[bool]) -> str:
    placed = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, figures, strict=True)
    )
    return (" " * _GAP).join(placed).rstrip()


def shortened(names: Iterable[str], length: int) -> dict[str, str]:
    """Name -> the same in at most ``length`` signs: long ones lose their middle, where most of them stay distinct."""
    known = list(dict.fromkeys(names))

    def cut(name: str, head: int) -> str:
        return name if len(name) <= length else f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"

    heads = sorted(range(1, length - 1), key=lambda head: abs(head - length // 3))
    if not heads or all(len(name) <= length for name in known):
        return {name: name for name in known}
    best = max(heads, key=lambda head: len({cut(name, head) for name in known}))
    return {name: cut(name, best) for name in known}


def _wrapped(line: str, indent: str = "    ") -> list[str]:
    """A line that is too long as several; words that are too long, such as paths, stay whole."""
    if len(line) <= WIDTH:
        return [line]
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )


def bar(
    items: Iterable[Any] | None = None,
    label: str = "",
    *,
    total: int | None = None,
    done: int = 0,
    unit: str = "it",
    show: bool = True,
) -> "tqdm[Any]":
    """A progress bar on standard error, if that is a terminal; it goes when it is full.

    One at a time: while one is shown, those that begin inside of it are not.
    """
    hidden = not show or any(not one.disable for one in _BARS)
    made = tqdm(
        items,
        label or None,
        total=total,
        initial=done,
        unit=unit,
        disable=True if hidden else None,
        leave=False,
        dynamic_ncols=True,
    )
    _BARS.add(made)
    return made


_BARS: "weakref.WeakSet[tqdm[Any]]" = weakref.WeakSet()


def say(text: str) -> None:
    """A line on standard error, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def complain(who: str, lines: Sequence[str]) -> None:
    """What went wrong, on standard error."""
    for line in lines:
        print(f"{styled(f'{who}:', _RED, sys.stderr)} {line}", file=sys.stderr)


@contextlib.contextmanager
def quiet_stdout(json_to: Path | None) -> Iterator[None]:
    """Inside, nothing but the document reaches standard output if that is where it goes."""
    if json_to != STDOUT:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def finish(outcome: Outcome, json_to: Path | None) -> None:
    """Print what a command found, and write it as JSON: to a file beside that, or to standard output in place of it."""
    if json_to == STDOUT:
        sys.stdout.write(document_text(outcome.document))
        _show_closing(outcome.closing, sys.stderr)
        return
    if json_to is not None:
        json_to.parent.mkdir(parents=True, exist_ok=True)
        json_to.write_text(document_text(outcome.document), encoding="utf-8")
    show(outcome.text, sys.stdout)
    _show_closing(outcome.closing, sys.stdout)


def document_text(document: dict[str, Any]) -> str:
    """JSON as its standard has it: what is not finite is null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def show(text: str, stream: TextIO) -> None:
    """Print text with its headings in bold. Lines that are too long are wrapped."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        style = _DIM if _DASHES.fullmatch(line) else _BOLD if _DASHES.fullmatch(following) else None
        for one in _wrapped(line):
            print(styled(one, style, stream), file=stream)


def _show_closing(closing: Closing, stream: TextIO) -> None:
    indent = " " * 7
    print(file=stream)
    for label, words, style in (("done", closing.done, _GREEN), ("worse", closing.worse, _YELLOW)):
        first, *more = _wrapped(f"{label:<7}{words}", indent)
        print("\n".join([styled(first[:7], style, stream) + first[7:], *more]), file=stream)
    called = (*_program(), *closing.next[1:]) if closing.next[0] == "vlaquant" else closing.next
    print(styled("next   ", _CYAN, stream) + command_text(called), file=stream)


def _program() -> tuple[str, ...]:
    """How to call vlaquant again: as it was called now, if a shell does not find it by its name."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("vlaquant", "__main__.py"):
        return (Path(sys.executable).name, "-m", "vlaquant")
    found = called.name != "vlaquant" or shutil.which("vlaquant") is not None
    return ("vlaquant",) if found else (str(called),)


def command_text(words: Sequence[str]) -> str:
    """A command that can be copied into a shell; on several lines if it is long, which begin with options."""
    groups: list[str] = []
    for word in map(shlex.quote, words):
        if groups and not word.startswith("--"):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) > WIDTH - 10:
            lines.append(f"  {group}")
        else:
            lines[-1] += f" {group}"
    return " \\\n       ".join(lines)


def styled(text: str, style: str | None, stream: TextIO) -> str:
    """Text in a colour, if the stream is a terminal and ``NO_COLOR`` (https://no-color.org) does not ask for none."""
    if style is None or not text or not colourful(stream):
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def colourful(stream: TextIO) -> bool:
    """Whether colours are wanted there."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
