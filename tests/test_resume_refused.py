"""Unfinished runs that cannot go on: what is in the way, was another run, or is damaged; and each way out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from staged import (
    WINDOWS,
    differing,
    files_of,
    killed_after,
    left_behind,
    make_source,
    recipe_for,
    skip_verification,
    stages_in,
    streamed,
    unfinished,
    written,
)

import vlaquant
from vlaquant.engine.fingerprint import package_versions
from vlaquant.errors import CheckpointError, ExportError, VlaquantError

GPTQ = recipe_for("llama", "gptq", "w4a16")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", "llama")


def test_an_unfinished_run_is_in_the_way(tmp_path: Path, source: Path) -> None:
    work = unfinished(source, tmp_path / "out")
    before = files_of(work)
    with pytest.raises(ExportError, match=r"was not finished lies in \.out\.work.*--resume.*--overwrite"):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out")
    assert files_of(work) == before


def test_overwrite_throws_an_unfinished_run_away(tmp_path: Path, source: Path) -> None:
    work = unfinished(source, tmp_path / "out")
    (work / "stage-0000.safetensors").write_bytes(b"of no use")
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", overwrite=True)
    streamed(source, GPTQ, WINDOWS, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert left_behind(tmp_path / "out") == []


def test_resume_with_overwrite_goes_on_and_replaces(tmp_path: Path, source: Path) -> None:
    unfinished(source, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x", encoding="utf-8")
    with pytest.raises(ExportError, match="not empty"):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    assert stages_in(tmp_path / "out") == 1
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True, overwrite=True)
    assert not (tmp_path / "out" / "old").exists()


def test_a_resume_with_nothing_to_resume_begins(tmp_path: Path, source: Path) -> None:
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    streamed(source, GPTQ, WINDOWS, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def _other_weights(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def _other_config(source: Path) -> None:
    config = source / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("1e-06", "1e-05"), encoding="utf-8")


@pytest.mark.parametrize("change", [_other_weights, _other_config])
def test_another_source_is_refused(tmp_path: Path, source: Path, change: Any) -> None:
    work = unfinished(source, tmp_path / "out")
    before = files_of(work)
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    change(changed)
    name = "model.safetensors" if change is _other_weights else "config.json"
    with pytest.raises(ExportError, match=rf"was another one: source_sha256\.{name}: .* now, .* then.*--overwrite"):
        streamed(changed, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    assert files_of(work) == before
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": {"kind": "gptq", "damp": 0.02}}, r"recipe\.quantizer\.damp: 0\.02 now, 0\.01 then"),
        ({"seed": 1}, r"recipe\.seed: 1 now, 0 then"),
        ({"propagate": "float"}, r"recipe\.propagate: float now, quantized then"),
        ({"rules": GPTQ["rules"][:1]}, r"recipe\.rules: "),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, source: Path, changes: dict[str, Any], message: str) -> None:
    unfinished(source, tmp_path / "out")
    with pytest.raises(ExportError, match=f"was another one: {message}"):
        streamed(source, GPTQ | changes, WINDOWS, tmp_path / "out", resume=True)
    assert stages_in(tmp_path / "out") == 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (WINDOWS[:2], r"samples\.count: 2 now, 3 then"),
        ([WINDOWS[1], WINDOWS[0], WINDOWS[2]], r"samples\.sha256: "),
        ([*WINDOWS[:2], WINDOWS[2] + 1], r"samples\.sha256: "),
    ],
)
def test_other_samples_are_refused(tmp_path: Path, source: Path, samples: list[Any], message: str) -> None:
    unfinished(source, tmp_path / "out")
    with pytest.raises(ExportError, match=f"was another one: {message}"):
        streamed(source, GPTQ, samples, tmp_path / "out", resume=True)


def test_another_version_is_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(source, tmp_path / "out")
    versions = package_versions() | {"torch": "1.0"}
    monkeypatch.setattr("vlaquant.engine.run.package_versions", lambda: versions)
    with pytest.raises(ExportError, match=r"was another one: versions\.torch: 1\.0 now, "):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)


def test_where_the_output_goes_and_how_it_is_made_does_not_matter(tmp_path: Path, source: Path) -> None:
    streamed(source, GPTQ, WINDOWS, tmp_path / "whole")
    unfinished(source, tmp_path / "out")
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    streamed(moved, GPTQ, WINDOWS, tmp_path / "out", resume=True, mode="rerun", max_memory=10**12)
    assert differing(written(tmp_path / "out"), written(tmp_path / "whole")) == []


class _Opaque:
    """A sample whose content nobody but its owner knows."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids


def test_samples_that_nobody_can_compare_are_never_the_same(tmp_path: Path, source: Path) -> None:
    samples = [_Opaque(window) for window in WINDOWS]

    def quantize(*, resume: bool) -> None:
        vlaquant.quantize(
            source,
            GPTQ,
            samples,
            lambda model, sample: model(input_ids=sample.ids, use_cache=False),
            tmp_path / "out",
            resume=resume,
        )

    with killed_after(1):
        quantize(resume=False)
    with pytest.raises(ExportError, match=r"was another one: samples\.sha256: unknown .* now, unknown .* then"):
        quantize(resume=True)


def _outputs(work: Path, pattern: str) -> list[Path]:
    return sorted((work / "chain-0000").rglob(pattern))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda work: _cut(work / "stage-0000.safetensors"), "truncated"),
        (lambda work: (work / "stage-0000.safetensors").unlink(), "stage-0000"),
        (lambda work: _cut(work / "stage-0000.json"), "stage-0000"),
        (lambda work: _cut(work / "identity.json"), "identity"),
        (lambda work: shutil.rmtree(work / "chain-0000"), "chain-0000"),
        (lambda work: _outputs(work, "*.json")[0].unlink(), r"outputs\.json"),
        (lambda work: _cut(_outputs(work, "*.json")[0]), r"outputs\.json"),
        (lambda work: _cut(_outputs(work, "*.safetensors")[0]), "truncated"),
    ],
    ids=["cut stage", "no stage", "cut record", "cut identity", "no chain", "no index", "cut index", "cut outputs"],
)
def test_a_damaged_work_directory_is_refused(tmp_path: Path, source: Path, damage: Any, message: str) -> None:
    work = unfinished(source, tmp_path / "out")
    damage(work)
    with pytest.raises(VlaquantError, match=message) as caught:
        streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "--overwrite" in said, said
    assert not (tmp_path / "out").exists()
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", overwrite=True)


def test_a_finished_stage_whose_bytes_changed_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing looks at the values of a finished stage before the end; there the sums of its tensors differ."""
    file = unfinished(source, tmp_path / "out", 2) / "stage-0000.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_packed"][0, 0] ^= 1
    save_file(tensors, file)
    with pytest.raises((ExportError, CheckpointError), match=r"1 tensors differ.*up_proj\.weight_packed"):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
