"""The colours of the charts, in pairs for a light and a dark page.

Every colour has a contrast of at least 3 to its page (WCAG 2.2, 1.4.11), and any two stay apart for readers who see no
red, green or blue: ``tests/test_report_colours.py`` simulates that (Machado, Oliveira and Fernandes 2009). In a page
they are CSS variables, which the theme sets; elsewhere, as in a notebook, the light ones apply.
"""

from collections.abc import Mapping, Sequence

#: Name -> (on a light page, on a dark page).
COLOURS: Mapping[str, tuple[str, str]] = {
    "blue": ("#0b5cad", "#4a97ea"),
    "orange": ("#c75d00", "#e8711a"),
    "green": ("#008564", "#2fc49b"),
    "purple": ("#8e2c7a", "#d884d6"),
    "sky": ("#3f93d1", "#a8dcff"),
    "brown": ("#5c3d00", "#f2dd6e"),
    "grey": ("#868c98", "#7f8794"),
}
#: The page, its text, its quiet text, and its links.
SURFACES: Mapping[str, tuple[str, str]] = {
    "page": ("#ffffff", "#161b22"),
    "panel": ("#f5f7fa", "#1f2630"),
    "text": ("#1a1f26", "#e8ecf1"),
    "quiet": ("#515a66", "#a9b4c0"),
    "line": ("#c9d0d9", "#3c4653"),
    "link": ("#0b5cad", "#7db8f7"),
    "good": ("#00694f", "#4fd1a5"),
    "bad": ("#a8201a", "#ff8f85"),
}
#: In the order in which the parts of a network take them; grey is for all that has none.
_OF_PARTS = ("blue", "orange", "green", "purple", "sky", "brown")
#: Bits of a weight -> colour; other numbers of bits are brown, and float is grey.
_OF_BITS = {8: "orange", 4: "blue", 3: "green", 2: "purple", 6: "sky"}

FLOAT = "orange"
QUANTIZED = "blue"


def paint(name: str) -> str:
    """A colour for a CSS property or an attribute of SVG."""
    light = (COLOURS.get(name) or SURFACES[name])[0]
    return f"var(--vq-{name},{light})"


def part_colours(parts: Sequence[str]) -> dict[str, str]:
    """Part -> name of its colour; parts beyond the sixth share grey."""
    distinct = dict.fromkeys(parts)
    return {part: _OF_PARTS[i] if i < len(_OF_PARTS) else "grey" for i, part in enumerate(distinct)}


def bits_colour(bits: int | None) -> str:
    """Name of the colour of a number of bits; None is float."""
    return "grey" if bits is None else _OF_BITS.get(bits, "brown")


def variables(*, dark: bool) -> str:
    """The CSS variables of a theme."""
    return "".join(f"--vq-{name}:{pair[dark]};" for name, pair in {**COLOURS, **SURFACES}.items())


def sequential(share: float) -> tuple[int, int, int]:
    """A colour from dark blue (0) over grey to yellow (1), in whose lightness alone the order can be seen.

    Anchors of cividis (Nuñez, Anderton and Renslow 2018), which looks alike with and without red-green vision.
    """
    anchors = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))
    place = min(max(share, 0.0), 1.0) * (len(anchors) - 1)
    left = min(int(place), len(anchors) - 2)
    low, high, rest = anchors[left], anchors[left + 1], place - left
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(low, high, strict=True))
    return red, green, blue
