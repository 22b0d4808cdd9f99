"""Small pieces of error messages."""

import difflib
from collections.abc import Iterable

_LONGEST_SHOWN = 60


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` if one of the known words is near, else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """``value`` as Python writes it, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
