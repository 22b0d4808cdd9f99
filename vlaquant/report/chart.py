"""What every chart is: a drawing for any width, and the same as a table."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from vlaquant.report.svg import captioned, tag

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
    """One chart. A notebook shows it with its title and summary; ``svg()`` gives the same as the text of a file.

    Attributes:
        title: what it is about.
        summary: what it shows, in a sentence or two.
        draw: width in pixels -> SVG of the drawing alone.
        table: the same figures.
    """

    title: str
    summary: str
    draw: Callable[[int], Markup]
    table: Table

    def svg(self, width: int = WIDE) -> str:
        """A picture ``width`` pixels wide that stands alone: title, summary and drawing, in light colours."""
        return str(captioned(self.draw(width), self.title, self.summary, width))

    def _repr_svg_(self) -> str:
        return self.svg()


def wide(width: int) -> bool:
    """Whether there is room for a column of labels beside the drawing."""
    return width >= 560
