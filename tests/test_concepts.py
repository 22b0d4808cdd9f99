"""The code of docs/concepts.md runs, with the formulae of the package; docs/how-to/add-a-pass.md works as it stands."""

import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import pytest
from documents import ROOT, read

from vlaquant import numerics
from vlaquant.recipe import sections

CONCEPTS = ROOT / "docs" / "concepts.md"
PASS = ROOT / "docs" / "how-to" / "add-a-pass.md"


def run_blocks(text: str) -> dict[str, Any]:
    left: dict[str, Any] = {}
    for block in documents.blocks(text, "python"):
        exec(block, left)
    return left


def test_code_of_the_concepts() -> None:
    assert len(documents.blocks(read(CONCEPTS), "python")) == 6
    run_blocks(read(CONCEPTS))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(x / S + Z).round()", "(x / S - Z).round()"),
        ("(high - low) / (2**4 - 1)", "(high - low) / 2**4"),
        ("4 + 16 / 64", "4 + 16 / 32"),
        ("** 0.5 / W", "** 0.4 / W"),
        ("mean_abs**rho", "mean_abs**0.4"),
        ("(X @ nearest.T)", "(X @ solved.T)"),
    ],
)
def test_a_wrong_formula_is_seen(old: str, new: str) -> None:
    text = read(CONCEPTS)
    assert text.count(old) == 1
    with pytest.raises(AssertionError):
        run_blocks(text.replace(old, new))


def test_the_affine_map_is_written_as_in_the_code() -> None:
    (page,) = (block for block in documents.blocks(read(CONCEPTS), "text") if block.startswith("q ="))
    assert numerics.__doc__ is not None
    assert page.strip().replace("−", "-") in numerics.__doc__.replace("−", "-")


def blocks_with_names() -> dict[str, str]:
    return dict(re.findall(r"^```python (\S+)\n(.*?)^```$", read(PASS), flags=re.DOTALL | re.MULTILINE))


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which somebody has copied every block of the page, and works."""
    names = blocks_with_names()
    for name, content in names.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in names:
        sys.modules.pop(Path(name).stem, None)


@pytest.mark.usefixtures("followed")
def test_the_tests_of_the_new_pass() -> None:
    tests = {
        name: one for name, one in vars(importlib.import_module("test_coordinate_descent")).items() if callable(one)
    }
    count = 0
    for name, test in tests.items():
        if name.startswith("test_"):
            marks = getattr(test, "pytestmark", [])
            for case in marks[0].args[1] if marks else [()]:
                test(*case)
                count += 1
    assert count == 4


def test_the_comparison_of_the_new_pass(followed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(followed / "compare.py"))
    printed, shown = (
        {line[:20].strip(): float(line[20:].split()[0]) for line in text.splitlines()}
        for text in (capsys.readouterr().out, documents.blocks(read(PASS), "text")[0])
    )
    # Another processor adds in another order, which may move a weight that lies between two codes
    assert printed == pytest.approx(shown, rel=0.03)


def test_the_places_that_must_know_a_pass_exist() -> None:
    assert {"transforms", "quantizer"} <= sections.KINDS.keys()
    assert hasattr(sections, "Quantizer")
    assert hasattr(sections, "Transform")
