"""Pages are whole: links lead somewhere, images have a text alternative, quoted figures are those of the files."""

import json
import re
from pathlib import Path
from typing import Any

import documents
import make_recipe_reference as reference
import pytest
from documents import ROOT, read
from pydantic import PositiveInt

from vlaquant.recipe import sections
from vlaquant.recipe.base import Section

README, CONCEPTS = ROOT / "README.md", ROOT / "docs" / "concepts.md"
TRANSLATIONS = {README: ROOT / "README.zh-CN.md", CONCEPTS: ROOT / "docs" / "zh" / "concepts.md"}


def test_relative_links_lead_somewhere() -> None:
    complaints = [one for page in documents.pages() for one in documents.link_complaints(page, read(page))]
    assert complaints == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](nowhere.md)", "nowhere.md does not exist"),
        ("[a](docs/recipes.md#nothing)", "no such heading"),
        ("![a](docs/images/nothing.svg)", "does not exist"),
        ("[a](#nothing)", "no such heading"),
    ],
)
def test_a_link_that_leads_nowhere_is_seen(text: str, complaint: str) -> None:
    assert complaint in next(documents.link_complaints(README, text))


def test_links_that_are_right_are_no_complaint() -> None:
    text = "[a](docs/recipes.md#schemes) [b](https://example.org/x) ![c](docs/images/grid.svg)\n"
    assert list(documents.link_complaints(README, text + "```text\n[d](none)\n```\n")) == []


@pytest.mark.parametrize("page", documents.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_images_can_be_read_aloud(page: Path) -> None:
    for alternative, _ in documents.images(read(page)):
        assert len(alternative) >= 40, f"{page.name}: say what the image shows: {alternative!r}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        found = {(page.parent / link.partition("#")[0]).resolve() for link in documents.links(read(page))}
        waiting += [one for one in found if one.suffix == ".md" and one.is_file() and one not in reached]
    decisions = {page for page in documents.pages() if page.parent.name == "decisions"}
    assert set(documents.pages()) - decisions - {ROOT / "CHANGELOG.md"} <= reached


def test_the_recipe_reference_is_up_to_date() -> None:
    assert read(reference.PAGE) == reference.page(), "python scripts/make_recipe_reference.py"


def test_the_reference_knows_every_section_and_key() -> None:
    described = [section for _, section in reference.sections()]
    kinds = [section for group in sections.KINDS.values() for section in group.values()]
    assert {sections.Recipe, sections.Rule, *kinds} <= set(described)
    assert len(described) == len(set(described))


class Allowance(Section):
    """How much may be used.

    Attributes:
        bytes: at most so many, over
            two lines; see :class:`vlaquant.recipe.Recipe`.
        parts: of which parts.
    """

    bytes: PositiveInt
    parts: dict[str, float] | None = None


class Wider(sections.Recipe):
    allowance: Allowance | None = None


def test_the_reference_copes_with_sections_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "Recipe", Wider)
    assert ("`allowance`", Allowance) in reference.sections()
    summary, meanings = reference.described(Allowance)
    assert summary == "How much may be used."
    assert meanings["bytes"] == "at most so many, over two lines; see `Recipe`."
    assert reference.in_words(sections.Rule.model_fields["embodiment"].annotation) == (
        "whole number, at least 0, may be `null`"
    )
    assert reference.in_words(Allowance.model_fields["parts"].annotation) == "mapping of text to number, may be `null`"
    monkeypatch.setattr(Allowance, "__doc__", "How much.\n\nAttributes:\n    bytes: so many.\n")
    with pytest.raises(LookupError, match="what parts mean"):
        reference.described(Allowance)
    monkeypatch.setattr(Allowance, "__doc__", "How much.\n\nAttributes:\n    bytes: a.\n    parts: b.\n    more: c.\n")
    with pytest.raises(LookupError, match="speaks of more"):
        reference.described(Allowance)


def _measured(results: dict[str, Any], key: str) -> list[str]:
    one = results[key]
    cells = [f"{one['bytes']['disk'] / 2**20:.2f}", f"{one['actions']['token_agreement']:.1%}".replace("%", " %")]
    cells.append(f"{one['actions']['mean_l1']:.4f}")
    if one["rollouts"]:
        success = one["rollouts"]["candidate"]["all"]
        interval = f"[{100 * success['low']:.0f}, {100 * success['high']:.0f}]"
        cells.append(f"{success['rate']:.1%} {interval}".replace("% ", " % "))
    return cells


ROWS = {
    "W4A16 rounding": "w4 rtn",
    "W4A16 AWQ": "w4 awq",
    "W4A16 GPTQ": "w4 gptq",
    "W4A16 AWQ + GPTQ": "w4 awq + gptq",
    "W3A16 rounding": "w3 rtn",
    "W3A16 AWQ": "w3 awq",
    "W3A16 GPTQ": "w3 gptq",
    "W8A8 rounding": "w8a8 rtn",
    "W8A8 SmoothQuant": "w8a8 smoothquant",
    "W2A16 rounding": "w2 rtn",
    "W2A16 GPTQ": "w2 gptq",
    "W2A16 rounding, per row": "w2 channel rtn",
    "W2A16 rounding, per tensor": "w2 tensor rtn",
}


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/results.md", "docs/how-to/choose-a-recipe.md"])
def test_tables_of_recipes_say_what_was_measured(page: str) -> None:
    results = json.loads(read(ROOT / "bench" / "results" / "demo_recipes.json"))
    rows = [row for table in documents.tables(read(ROOT / page)) for row in table if row[0] in ROWS]
    assert len(rows) >= 3
    for row in rows:
        missing = [cell for cell in _measured(results, ROWS[row[0]]) if cell not in row and "–" not in row]
        assert missing in ([], _measured(results, ROWS[row[0]])[3:]), (page, row)


def differences(original: str, translated: str) -> list[str]:
    """In what two pages that say the same in two languages are not alike."""
    parts = {
        "headings": documents.headings,
        "commands": documents.commands,
        "code": lambda text: documents.blocks(text, "python"),
        "images": lambda text: [Path(file).name for _, file in documents.images(text)],
        "links": lambda text: [Path(link).name for link in documents.links(text)],
        "shapes of tables": lambda text: [[len(row) for row in table] for table in documents.tables(text)],
        "figures in tables": _figures,
    }
    return [name for name, part in parts.items() if part(translated) != part(original)]


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_translations_have_the_same_parts(page: Path) -> None:
    assert differences(read(page), read(TRANSLATIONS[page])) == []


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("\n## ", "\n### ", "headings"),
        ("--rollouts 20", "--rollouts 2", "commands"),
        ("import vlaquant", "import valquant", "code"),
        ("results.svg", "result.svg", "images"),
        ("(docs/speed.md)", "(docs/recipes.md)", "links"),
        ("| 2.91 | 89.7 % |", "| 2.91 |", "shapes of tables"),
        ("0.0023", "0.0032", "figures in tables"),
    ],
)
def test_a_translation_that_lags_behind_is_seen(old: str, new: str, difference: str) -> None:
    text = read(README)
    assert old in text
    assert difference in differences(text, text.replace(old, new, 1))


def _figures(text: str) -> list[list[str]]:
    """Numbers of each table, row by row."""
    return [
        sorted(number for row in table for cell in row for number in re.findall(r"\d+(?:[.,]\d+)*", cell))
        for table in documents.tables(text)
    ]


def test_pages_speak_of_one_kind_of_shell() -> None:
    known = {"bash", "json", "python", "text", "yaml"}
    assert {page.name: documents.languages(read(page)) - known for page in documents.pages()} == {
        page.name: set() for page in documents.pages()
    }
