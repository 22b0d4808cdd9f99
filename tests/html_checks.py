"""A strict look at HTML: every element is closed in its order, and what a reader or a browser would meet."""

from collections import Counter
from html.parser import HTMLParser

#: Elements without an end.
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Document(HTMLParser):
    """What a page holds.

    Attributes:
        complaints: elements that are closed in another order than they were opened, ids that are there twice, and
            labels or links that lead nowhere.
        elements: (name, attributes), in order.
        text: all text that is not script or style, with one space where there was any.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.complaints: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self.feed(page)
        self.close()
        self.complaints += [f"<{name}> is never closed" for name in self._open]
        ids = Counter(attributes["id"] for _, attributes in self.elements if "id" in attributes)
        self.complaints += [f"id {name!r} is there {count} times" for name, count in ids.items() if count > 1]
        for name, attributes in self.elements:
            wanted = [attributes[key] for key in ("aria-labelledby", "for") if key in attributes]
            if name == "a" and attributes.get("href", "").startswith("#"):
                wanted.append(attributes["href"][1:])
            self.complaints += [f"<{name}> leads to {one!r}, which is not there" for one in wanted if one not in ids]
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        if len(attributes) < len(attrs):
            self.complaints.append(f"<{tag}> has an attribute twice")
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.complaints.append(f"</{tag}> at {self.getpos()} closes {self._open[-1:] or 'nothing'}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in {"script", "style"}:
            self._text.append(data)

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.elements)
