"""What the pages (README.md, docs/, …) hold: commands, code, links, headings. And how a command is tried."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """Every page that a user reads, in a fixed order."""
    top = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    return [*(ROOT / name for name in top), *sorted((ROOT / "docs").rglob("*.md"))]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return [textwrap.dedent(content) for _, info, content in _FENCE.findall(text) if info == language]


def languages(text: str) -> set[str]:
    """First word after each opening fence."""
    return {info.split(" ")[0] for _, info, _ in _FENCE.findall(text)}


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text)


def commands(text: str) -> list[str]:
    """One line for each command of the ``bash`` blocks, without comments, spaces as in :func:`shlex.join`."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(words) for words in split if words]


def mentions(text: str) -> list[str]:
    """Commands that are named in the text, such as `vlaquant eval --rollouts`."""
    code = re.findall(r"`([^`]+)`", prose(text))
    return [" ".join(one.split()) for one in code if re.match(r"(make|vlaquant|python) [a-z]", one)]


def headings(text: str) -> list[str]:
    """The signs before each heading."""
    return re.findall(r"^(#+) ", prose(text), flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What a link may name after #, as GitHub makes it of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^()\s]+)\)", prose(text))


def images(text: str) -> list[tuple[str, str]]:
    """(text alternative, file) of each image."""
    return re.findall(r"!\[([^\]]*)\]\(([^()\s]+)\)", text)


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of each table, without the line of dashes."""
    found = re.findall(r"(?:^ *\|.*\|\n)+", prose(text) + "\n", flags=re.MULTILINE)
    return [
        [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in table.splitlines()
            if not re.fullmatch(r"[\s|:-]+", line)
        ]
        for table in found
    ]


def link_complaints(page: Path, text: str) -> Iterator[str]:
    """Relative links that lead nowhere."""
    for link in links(text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            yield f"{page.relative_to(ROOT)}: {link} does not exist"
        elif anchor and anchor not in anchors(read(target)):
            yield f"{page.relative_to(ROOT)}: {link}: no such heading"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
