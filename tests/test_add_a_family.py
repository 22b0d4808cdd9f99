"""``docs/how-to/add-a-family.md``, followed word for word; and families from outside of vlaquant."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import vlaquant
from vlaquant.errors import CheckpointError, PlanError, RecipeError
from vlaquant.families import FAMILIES, family_of_config, register_family
from vlaquant.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "how-to" / "add-a-family.md"
RULES = [{"part": "trunk", "scheme": "w8a16"}]


def blocks() -> dict[str, str]:
    """File name, or ``text`` for what is printed -> content."""
    found = re.findall(r"^```(?:python )?(\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return dict(found)


def python(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, as a user would who has installed vlaquant."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody has copied every block of the page."""
    folder = tmp_path_factory.mktemp("page")
    for name, content in blocks().items():
        if name.endswith(".py"):
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_page_does_what_it_says(followed: Path) -> None:
    done = python(followed, "quantize_toy.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == blocks()["text"]
    assert len(blocks()["toy_family.py"].splitlines()) < 60
    with pytest.raises(CheckpointError, match=r"family 'toy' is none of .*import the module that registers"):
        vlaquant.load(followed / "toy-w4")


@pytest.fixture
def clean() -> Iterator[None]:
    known = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(known)


@pytest.mark.usefixtures("clean")
def test_registered_families_come_first_and_recipes_know_them() -> None:
    mine = replace(FAMILIES["module"], name="mine", owns_config=lambda config: "mine" in config)
    with pytest.raises(RecipeError, match="unknown family 'mine'"):
        load_recipe({"family": "mine", "rules": RULES})
    register_family(mine)
    assert load_recipe({"family": "mine", "rules": RULES}).family == "mine"
    assert family_of_config({"mine": 1, "model_type": "openvla"}) is mine
    assert next(iter(FAMILIES)) == "mine"
    with pytest.raises(PlanError, match="'mine' is known already"):
        register_family(mine)


@pytest.mark.usefixtures("clean")
def test_a_family_in_a_script_is_refused() -> None:
    def load(directory: Path) -> nn.Module:
        raise AssertionError(directory)

    load.__module__ = "__main__"
    with pytest.raises(PlanError, match="which no other process can import"):
        register_family(replace(FAMILIES["module"], name="mine", load=load))
    assert "mine" not in FAMILIES
