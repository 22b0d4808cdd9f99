"""The notebooks of ``examples/`` as they are committed, and the script that runs them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from notebook_checks import MAX_KIB, complaints

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cell(source: str, *outputs: dict[str, Any], number: int | None = None) -> dict[str, Any]:
    kind = {"cell_type": "code", "id": f"cell-{source[:8].encode().hex()}", "metadata": {}}
    return kind | {"source": source, "execution_count": number, "outputs": list(outputs)}


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def notebook(*cells: dict[str, Any], needs: tuple[str, ...] = ()) -> dict[str, Any]:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "vlaquant": {"needs": list(needs)}}
    return {"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def run(folder: Path, made: dict[str, Any], *options: str) -> tuple[int, str]:
    """Exit status and output of the script."""
    path = folder / "made.ipynb"
    path.write_text(json.dumps(made), encoding="utf-8")
    command = [sys.executable, "scripts/run_notebooks.py", str(path), "--output", str(folder / "out"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_were_run_and_show_no_local_path(path):
    assert list(complaints(json.loads(path.read_text(encoding="utf-8")))) == []


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (notebook(), "has no code"),
        (notebook(cell("1 + 1")), "was not run once from top to bottom"),
        (notebook(cell("a", number=2), cell("b", number=1)), "was not run once from top to bottom"),
        (
            notebook(cell("a", {"output_type": "error", "ename": "KeyError", "evalue": "x"}, number=1)),
            "raised KeyError: x",
        ),
        (notebook(cell("a", stream("careful", "stderr"), number=1)), "wrote to stderr: careful"),
        (notebook(cell("a", stream("written: " + "/" + "tmp/x/y"), number=1)), "shows a path of this machine"),
        (notebook(cell("a", stream("x" * (MAX_KIB + 1) * 1024), number=1)), "KiB, at most"),
    ],
)
def test_what_must_not_be_committed_is_found(made, complaint):
    assert [one for one in complaints(made) if complaint in one]


def test_relative_paths_and_images_are_no_complaint():
    image = {"output_type": "display_data", "data": {"image/png": "iVBOR" + "/" + "tmp/abc", "text/plain": "a figure"}}
    assert list(complaints(notebook(cell("a", stream("written: ../build/x"), image, number=1)))) == []


def test_a_cell_that_raises_fails_the_run(tmp_path):
    pytest.importorskip("nbclient")
    status, text = run(tmp_path, notebook(cell("print('first')"), cell("1 / 0"), cell("print('third')")), "--in-place")
    assert status == 1
    assert "a cell raised" in text
    assert "ZeroDivisionError" in text
    assert not (tmp_path / "out").exists()
    assert "first" not in json.dumps(json.loads((tmp_path / "made.ipynb").read_text())["cells"][0]["outputs"])


def test_outputs_that_must_not_be_committed_fail_the_run(tmp_path):
    pytest.importorskip("nbclient")
    made = notebook(cell("import os\nprint(os.sep + 'tmp' + os.sep + 'x')"))
    status, text = run(tmp_path, made, "--in-place")
    assert status == 1
    assert "cell 1 shows a path of this machine" in text
    assert json.loads((tmp_path / "made.ipynb").read_text()) == made


def test_a_run_in_place_stores_the_outputs_and_only_them(tmp_path):
    pytest.importorskip("nbclient")
    assert run(tmp_path, notebook(cell("print(6 * 7)")), "--in-place")[0] == 0
    done = json.loads((tmp_path / "made.ipynb").read_text())
    assert done == json.loads((tmp_path / "out" / "made.ipynb").read_text())
    assert done["cells"][0]["outputs"] == [stream("42\n") | {"text": ["42\n"]}]
    assert done["cells"][0]["metadata"] == {}
    assert list(complaints(done)) == []


def test_a_notebook_whose_packages_are_missing_is_skipped_aloud(tmp_path):
    pytest.importorskip("nbclient")
    status, text = run(tmp_path, notebook(cell("1 / 0"), needs=("no-such-package",)))
    assert status == 0
    assert "SKIPPED, needs no-such-package" in text
