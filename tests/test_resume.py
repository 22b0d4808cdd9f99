"""A run that was stopped at any moment goes on to the very same files, or says why it cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from staged import (
    WINDOWS,
    KilledError,
    files_of,
    killed_after,
    left_behind,
    make_source,
    recipe_for,
    samples_for,
    skip_verification,
    stages_in,
    streamed,
    unfinished,
)

from vlaquant.engine.work import work_path
from vlaquant.errors import ExportError
from vlaquant.passes.layer import quantize_layers

GPTQ = recipe_for("llama", "gptq", "w4a16")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", "llama")


@pytest.mark.parametrize("mode", ["replay", "rerun"])
@pytest.mark.parametrize(
    ("kind", "quantizer", "scheme", "more"),
    [
        ("llama", "gptq", "w4a16", {}),
        ("llama", "gptq", "w8a8", {"propagate": "float"}),
        ("llama tied", "awq", "w4a16", {}),
        ("llama", "smoothquant", "w8a8", {}),
        ("llama", "smoothquant", "w8a8 static", {}),
        ("openvla", "smoothquant", "w8a8", {}),
        ("llama", "gptaq", "w4a16", {}),
        ("openvla", "gptaq", "w8a8", {}),
    ],
    ids=str,
)
def test_the_same_files_whichever_stage_was_the_last(
    tmp_path: Path, kind: str, quantizer: str, scheme: str, more: dict[str, str], mode: str
) -> None:
    if quantizer == "gptaq" and mode == "rerun":
        pytest.skip("gptaq is refused in the mode rerun, see test_two_chains.py")
    source, samples = make_source(tmp_path / "source", kind), samples_for(kind)
    recipe = recipe_for(kind, quantizer, scheme, **more)
    streamed(source, recipe, samples, tmp_path / "whole", mode=mode)
    wanted = files_of(tmp_path / "whole")
    # Of the policy's nine stages a few will do
    for stages in (4, 7) if kind == "openvla" else (1, 2):
        output = tmp_path / f"out{stages}"
        with killed_after(stages):
            streamed(source, recipe, samples, output, mode=mode)
        assert not output.exists()
        assert stages_in(output) == stages
        streamed(source, recipe, samples, output, mode=mode, resume=True)
        assert files_of(output) == wanted
        assert left_behind(output) == []


@pytest.mark.parametrize(
    ("quantizer", "scheme", "mode"),
    [
        ("gptq", "w4a16", "replay"),
        ("gptaq", "w4a16", "replay"),
        ("smoothquant", "w8a8", "rerun"),
        ("rtn", "w8a8", "replay"),
    ],
)
def test_the_same_files_from_every_state_of_the_disk(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, quantizer: str, scheme: str, mode: str
) -> None:
    """What a killed process or a power cut can leave: the work directory at every flush and every rename."""
    recipe, samples = recipe_for("llama", quantizer, scheme), None if quantizer == "rtn" else WINDOWS
    states = snapshots(monkeypatch, tmp_path / "whole")
    streamed(source, recipe, samples, tmp_path / "whole", mode=mode)
    monkeypatch.undo()
    skip_verification(monkeypatch)
    wanted, done = files_of(tmp_path / "whole"), set()
    for number, state in enumerate(states):
        output = tmp_path / f"try{number}" / "out"
        output.parent.mkdir()
        shutil.move(state, work_path(output))
        done.add(stages_in(output))
        streamed(source, recipe, samples, output, mode=mode, resume=True)
        assert files_of(output) == wanted, f"state {number} of {len(states)}"
        assert left_behind(output) == []
    assert done == {0, 1, 2, 3}
    assert len(states) > 12


def snapshots(monkeypatch: pytest.MonkeyPatch, output: Path) -> list[Path]:
    """Copies of the work directory, made before and after everything that makes a change of it last."""
    states: list[Path] = []
    seen: list[dict[str, bytes]] = []

    def copy() -> None:
        found = files_of(work_path(output)) if work_path(output).is_dir() else {}
        # What the log says does not matter
        if found and (content := found | {"log.jsonl": b""}) not in seen:
            seen.append(content)
            states.append(output.parent / f"state{len(states)}")
            shutil.copytree(work_path(output), states[-1])

    for place in (
        "engine.work.sync_directory",
        "checkpoint.tensor_writing.sync_directory",
        "calibrate.cache.sync_tree",
    ):
        monkeypatch.setattr(f"vlaquant.{place}", lambda _: copy())
    replace = Path.replace

    def renaming(self: Path, target: Path) -> Path:
        copy()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", renaming)
    return states


def test_a_kill_in_the_first_stage_leaves_nothing_to_go_on_with(tmp_path: Path, source: Path) -> None:
    with killed_after(0):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_kill_while_the_output_is_written(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed(source, GPTQ, WINDOWS, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("vlaquant.export.writing.join_tensor_files", _die)
        with pytest.raises(KilledError):
            streamed(source, GPTQ, WINDOWS, tmp_path / "out")
    assert stages_in(tmp_path / "out") == 3
    monkeypatch.setattr("vlaquant.engine.loop.quantize_layers", _die)
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_finished_stages_are_not_done_again(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(source, tmp_path / "out", 2)
    solved: list[str] = []
    solve = quantize_layers

    def counting(works: dict[str, Any], *args: Any) -> Any:
        solved.extend(works)
        return solve(works, *args)

    monkeypatch.setattr("vlaquant.engine.loop.quantize_layers", counting)
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    assert solved == ["lm_head"]


def _die(*_: Any, **__: Any) -> None:
    raise KilledError


def test_the_comparison_notices_a_wrong_resume(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stored outputs of the finished stage a resumed run would see other inputs."""
    monkeypatch.setattr("vlaquant.calibrate.cache.ActivationCache.restore_", _restore_zeros)
    with pytest.raises(AssertionError):
        test_the_same_files_whichever_stage_was_the_last(tmp_path / "again", "llama", "gptq", "w4a16", {}, "replay")


def _restore_zeros(self: Any, _: Path) -> None:
    for sample in range(len(WINDOWS)):
        self.put("model.layers.0", sample, torch.ones(1, 24, 64))
        self.put("model.layers.1", sample, torch.ones(1, 24, 64))


def test_what_a_kill_during_the_writing_left_is_cleared_away(tmp_path: Path, source: Path) -> None:
    """A killed process cannot tidy up; the next run of the same output does, but for an output that stepped aside."""
    for name in (".out.partial-0123abcd", ".out.partial-old-0123abcd", ".other.partial-0123abcd"):
        (tmp_path / name).mkdir()
    with killed_after(1):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out")
    streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    assert left_behind(tmp_path / "out") == [".other.partial-0123abcd", ".out.partial-old-0123abcd"]


def test_a_kill_after_the_output_is_there(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume there is nothing left to do but to tidy up, if the output is that of the very same run."""
    recipe, other = recipe_for("llama", "gptq", "w4a16"), recipe_for("llama", "gptq", "w8a8")
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("vlaquant.engine.work.WorkDirectory.remove", lambda _: None)
        result = streamed(source, recipe, samples_for("llama"), output)
    before = files_of(output)
    with pytest.raises(ExportError, match="exists and is not empty"):
        streamed(source, other, samples_for("llama"), output, resume=True)
    with pytest.raises(ExportError, match="exists and is not empty"):
        streamed(source, recipe, samples_for("llama")[:-1], output, resume=True)
    again = streamed(source, recipe, samples_for("llama"), output, resume=True)
    assert again.layers == result.layers
    assert again.plan == result.plan
    assert again.manifest == json.loads(json.dumps(result.manifest))
    assert files_of(output) == before
    assert left_behind(output) == []
    with pytest.raises(ExportError, match="exists and is not empty"):
        streamed(source, other, samples_for("llama"), output, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("vlaquant.engine.work.WorkDirectory.remove", lambda _: None)
        streamed(source, other, samples_for("llama"), tmp_path / "other")
    (tmp_path / ".other.work").rename(tmp_path / ".out.work")
    with pytest.raises(ExportError, match="exists and is not empty"):
        streamed(source, recipe, samples_for("llama"), output, resume=True)
