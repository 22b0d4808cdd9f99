"""What goes wrong in the middle of a run: a clear error, no output, and finished stages that are not lost."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from staged import (
    WINDOWS,
    files_of,
    left_behind,
    make_source,
    recipe_for,
    skip_verification,
    stages_in,
    streamed,
)
from torch import Tensor, nn

import vlaquant
from vlaquant.engine.run import RunOptions
from vlaquant.engine.weights import WeightsOnDemand
from vlaquant.engine.work import WorkDirectory, work_path
from vlaquant.errors import CalibrationError, CheckpointError, ExportError, VlaquantError

GPTQ = recipe_for("llama", "gptq", "w4a16")
RTN = recipe_for("llama", "rtn", "w4a16")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", "llama")


@contextmanager
def after_stage(stages: int, happens: Callable[[], object]) -> Iterator[None]:
    """Inside, something happens as soon as so many stages are finished."""
    commit = WorkDirectory.commit

    def then(self: WorkDirectory, *args: Any) -> None:
        commit(self, *args)
        if len(self.records) == stages:
            happens()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "commit", then)
        yield


def fails(source: Path, output: Path, error: type[VlaquantError], match: str, recipe: dict[str, Any] = GPTQ) -> str:
    """A run that fails and leaves no output; returns its message and notes."""
    with pytest.raises(error, match=match) as caught:
        streamed(source, recipe, None if recipe is RTN else WINDOWS, output)
    assert not output.exists()
    assert [name for name in left_behind(output) if name != work_path(output).name] == []
    return " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def resumes(source: Path, output: Path, recipe: dict[str, Any] = GPTQ) -> None:
    """The unfinished run of ``output`` goes on to what a run without trouble writes."""
    samples = None if recipe is RTN else WINDOWS
    assert stages_in(output) > 0
    streamed(source, recipe, samples, output, resume=True)
    streamed(source, recipe, samples, output.parent / "untroubled")
    assert files_of(output) == files_of(output.parent / "untroubled")
    assert left_behind(output) == []


def _no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "place",
    [
        "vlaquant.checkpoint.tensor_writing._header",
        "vlaquant.engine.work.write_json",
        "vlaquant.engine.work.sync_directory",
        "vlaquant.calibrate.cache.write_json",
        "pathlib.Path.mkdir",
        "vlaquant.export.writing.write_json",
        "vlaquant.export.writing.copy_side_files",
    ],
)
def test_a_full_disk(tmp_path: Path, source: Path, place: str) -> None:
    with pytest.MonkeyPatch.context() as patch, after_stage(1, lambda: patch.setattr(place, _no_space)):
        said = fails(source, tmp_path / "out", ExportError, "No space left")
    assert "--resume" in said
    resumes(source, tmp_path / "out")


def test_a_full_disk_in_the_first_stage_leaves_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlaquant.checkpoint.tensor_writing._header", _no_space)
        assert "--resume" not in fails(source, tmp_path / "out", ExportError, "No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("left", [0, 4096, 3 * 4096, 12 * 4096])
def test_a_disk_that_is_really_full(source: Path, small_disk: Path, left: int) -> None:
    """``left`` bytes are free after the first stage, so that it fails sooner or later."""
    filler = small_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            while shutil.disk_usage(small_disk).free > left:
                file.write(b"0" * 4096)

    with after_stage(1, fill):
        said = fails(source, small_disk / "out", ExportError, "No space left")
    assert "--resume" in said
    filler.unlink()
    resumes(source, small_disk / "out")


def test_a_disk_that_is_too_small_is_refused_before_any_work(source: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 2**16))
    fails(source, small_disk / "out", ExportError, r"needs 0\.00 GiB of disk and 0\.00 GiB are free; make room")
    assert stages_in(small_disk / "out") == 0


@pytest.mark.parametrize("log", ["/dev/full", "no/such/folder/log.jsonl"])
def test_a_log_that_cannot_be_written(tmp_path: Path, source: Path, log: str) -> None:
    if log == "/dev/full" and not Path(log).exists():
        pytest.skip("needs a device that is always full")
    path = tmp_path / log
    with pytest.raises(ExportError, match=str(path)):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out", log=path)
    assert [one.name for one in tmp_path.iterdir()] == ["source"]


class NoiseError(Exception):
    """What a model or its run function may raise."""


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("where", ["streamed", "memory"])
def test_a_sample_that_the_model_refuses(tmp_path: Path, source: Path, bad: int, where: str) -> None:
    def run(model: Any, sample: Tensor) -> object:
        if sample is WINDOWS[bad]:
            raise NoiseError("no such token")
        return model(input_ids=sample, use_cache=False)

    model = source if where == "streamed" else vlaquant.load(source)
    output = tmp_path / "out" if where == "streamed" else None
    with pytest.raises(CalibrationError, match=f"sample {bad}.*NoiseError.*no such token") as caught:
        vlaquant.quantize(model, GPTQ, WINDOWS, run, output)
    assert isinstance(caught.value.__cause__, NoiseError)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_sample_of_another_shape(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CalibrationError, match="sample 1"):
        streamed(source, GPTQ, [WINDOWS[0], torch.tensor([[5, 2000]]), WINDOWS[2]], tmp_path / "out")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_not_the_samples_fault_is_not_blamed_on_it(source: Path, stop: type[BaseException]) -> None:
    def run(model: nn.Module, sample: Tensor) -> object:
        raise stop

    with pytest.raises(stop):
        vlaquant.quantize(vlaquant.load(source), GPTQ, WINDOWS, run)


def _change(source: Path, **values: float) -> None:
    """Fill tensors of the checkpoint; ``__`` stands for a dot."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name, value in values.items():
        tensors[f"{name.replace('__', '.')}.weight"].fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("mode", ["replay", "rerun"])
def test_activations_that_overflow_in_a_later_stage(tmp_path: Path, source: Path, mode: Any) -> None:
    _change(source, model__layers__1__mlp__gate_proj=3e37, model__layers__1__mlp__up_proj=3e37)
    for resume in (False, True):
        with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj: .* NaN or Inf in sample 0"):
            streamed(source, GPTQ, WINDOWS, tmp_path / "out", mode=mode, resume=resume)
        assert not (tmp_path / "out").exists()
        assert stages_in(tmp_path / "out") == 1


@pytest.mark.parametrize("stage", [0, 1])
def test_nan_weights_whose_turn_comes_late(tmp_path: Path, source: Path, stage: int) -> None:
    _change(source, **{f"model__layers__{stage}__mlp__up_proj": float("nan")})
    fails(source, tmp_path / "out", CheckpointError, rf"layers\.{stage}\.mlp\.up_proj\.weight holds 8192 values", RTN)
    assert stages_in(tmp_path / "out") == stage
    (tmp_path / "probed").mkdir()
    output = tmp_path / "probed" / "out"
    fails(source, output, CheckpointError, rf"layers\.{stage}\.mlp\.up_proj\.weight holds 8192 values")
    assert left_behind(output) == [], "a probe run comes before all stages"


@pytest.mark.parametrize("name", ["lm_head", "model__norm", "model__embed_tokens"])
def test_nan_weights_that_nothing_quantizes(tmp_path: Path, source: Path, name: str) -> None:
    _change(source, **{name: float("inf")})
    recipe = {"rules": [{"part": "language", "scheme": "w4a16", "group_size": 32}]}
    with pytest.raises(CheckpointError, match=rf"{name.replace('__', '.')}\.weight holds"):
        streamed(source, recipe, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _touch(file: Path) -> None:
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def _replace_with_a_copy(file: Path) -> None:
    shutil.copyfile(file, file.with_suffix(".copy"))
    file.with_suffix(".copy").replace(file)


CHANGES: list[Callable[[Path], object]] = [
    lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    lambda file: file.write_bytes(b"x" * file.stat().st_size),
    Path.unlink,
    _touch,
    _replace_with_a_copy,
]


@pytest.mark.parametrize("change", CHANGES, ids=["truncated", "overwritten", "deleted", "touched", "replaced"])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("room", ["for all", "for one"])
def test_a_source_that_changes_during_the_run(
    tmp_path: Path, source: Path, change: Callable[[Path], object], stages: int, room: str
) -> None:
    file, good = source / "model.safetensors", (source / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch, after_stage(stages, lambda: change(file)):
        if room == "for one":
            init = WeightsOnDemand.__init__
            patch.setattr(
                WeightsOnDemand, "__init__", lambda self, *args, **more: init(self, *args, **(more | {"budget": 0}))
            )
        fails(source, tmp_path / "out", CheckpointError, r"model\.safetensors: changed while|holds no \*\.safetensors")
    file.write_bytes(good)
    resumes(source, tmp_path / "out")


def test_a_work_directory_that_cannot_be_made(tmp_path: Path, source: Path) -> None:
    (tmp_path / ".out.work").write_text("in the way", encoding="utf-8")
    with pytest.raises(ExportError, match=r"\.out\.work"):
        streamed(source, GPTQ, WINDOWS, tmp_path / "out", resume=True)
    (tmp_path / "parent").write_text("in the way", encoding="utf-8")
    with pytest.raises(ExportError, match="parent"):
        streamed(source, GPTQ, WINDOWS, tmp_path / "parent" / "out")


def test_an_unknown_device_is_refused(source: Path) -> None:
    with pytest.raises(VlaquantError, match="nonsense"):
        vlaquant.quantize(vlaquant.load(source), GPTQ, WINDOWS, options=RunOptions(device="nonsense"))
