"""What every chart is: a drawing for any width, and the same as a table."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from vlaquant.report.svg import tag

#: Pixels of a drawing on a desk, and on a phone.
WIDE, NARROW = 900, 350


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a heading; ``numbers`` are the columns that are aligned to the right."""

    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()

    def __html__(self) -> Markup:
        """The table as HTML; the first cell of a row is its heading."""
        head = tag("tr", *(tag("th", cell, scope="col", class_=self._kind(i)) for i, cell in enumerate(self.heading)))
        body = [
            tag(
                "tr",
                tag("th", row[0], scope="row"),
                *(tag("td", cell, class_=self._kind(i)) for i, cell in enumerate(row[1:], start=1)),
            )
            for row in self.rows
        ]
        return tag("table", tag("thead", head), tag("tbody", *body))

    def _kind(self, column: int) -> str | None:
        return "number" if column in self.numbers else None


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. A notebook shows it as it is; ``draw(width)`` gives its SVG.

    Attributes:
        title: what it is about.
        summary: what it shows, in a sentence or two.
        draw: width in pixels -> SVG.
        table: the same figures.
    """

    title: str
    summary: str
    draw: Callable[[int], Markup]
    table: Table

    def _repr_html_(self) -> str:
        heading = tag("strong", self.title)
        return str(tag("div", heading, tag("p", self.summary), self.draw(WIDE)))


def wide(width: int) -> bool:
    """Whether there is room for a column of labels beside the drawing."""
    return width >= 560
