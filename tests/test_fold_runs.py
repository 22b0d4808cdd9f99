"""Folds that are undone, in runs on directories: stopped and resumed, in both modes, and in several processes."""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import together
from staged import (
    WINDOWS,
    differing,
    files_of,
    killed_after,
    make_source,
    recipe_for,
    skip_verification,
    streamed,
    written,
)

from vlaquant.passes import fold

RECIPE = recipe_for("llama", "awq + gptq", "w4a16")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "llama", "llama")


def run_wrong(source: Path, output: Path, **more: Any) -> None:
    """Folds into norms as if they were Gemma's; the other folds of a block are right."""
    with pytest.MonkeyPatch.context() as patched:
        skip_verification(patched)
        patched.setattr(fold, "norm_offset", lambda norm: 1.0)
        streamed(source, RECIPE, list(WINDOWS), output, **more)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output") / "whole"
    run_wrong(source, output)
    return output


def transforms(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "vlaquant.json").read_text(encoding="utf-8"))["transforms"]
    return found


def test_the_manifest_says_what_was_undone(wanted: Path) -> None:
    undone = {record["source"].rpartition(".")[2] for record in transforms(wanted) if record["reverted"]}
    kept = {record["source"].rpartition(".")[2] for record in transforms(wanted) if record["kept"]}
    assert undone == {"input_layernorm", "post_attention_layernorm"}
    assert "up_proj" in kept
    assert kept <= {"v_proj", "up_proj"}
    assert len(transforms(wanted)) == 2 * 4


def test_nothing_of_a_wrong_fold_is_left(source: Path, wanted: Path) -> None:
    before, after = written(source), written(wanted)
    norms = [name for name in before if name.endswith("norm.weight")]
    assert norms
    assert all(before[name].equal(after[name]) for name in norms)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(source: Path, wanted: Path, tmp_path: Path) -> None:
    with killed_after(1):
        run_wrong(source, tmp_path / "out")
    run_wrong(source, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files_of(wanted)


def test_both_modes_undo_the_same(source: Path, wanted: Path, tmp_path: Path) -> None:
    run_wrong(source, tmp_path / "out", mode="rerun")
    assert differing(written(tmp_path / "out"), written(wanted)) == []
    assert transforms(tmp_path / "out") == transforms(wanted)


def test_two_processes_undo_what_one_does(source: Path, wanted: Path, tmp_path: Path) -> None:
    ended = together(tmp_path / "log", 2, run_wrong, source, tmp_path / "out")
    assert [one.code for one in ended] == [0, 0], "\n".join(one.err for one in ended)
    assert differing(written(tmp_path / "out"), written(wanted)) == []
    assert transforms(tmp_path / "out") == transforms(wanted)
