"""Reading refuses what is incomplete; writing leaves all or nothing."""

import errno
import hashlib
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import signalled
from safetensors.torch import load_file, save_file
from tiny import llama, save_llama

from vlaquant.checkpoint import (
    MANIFEST,
    atomic_directory,
    check_source,
    copy_side_files,
    read_config,
    read_manifest,
    read_tensors,
    require_finite,
    source_identity,
    weight_files,
    write_json,
    write_tensors,
)
from vlaquant.errors import CheckpointError, ExportError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "source", llama())


def test_a_good_directory_passes(source: Path) -> None:
    assert check_source(source)["model_type"] == "llama"


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        read_config(tmp_path / "nowhere")


def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_source(source)


def test_config_that_is_no_json(source: Path) -> None:
    (source / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        check_source(source)


@pytest.mark.parametrize("kept", [4, 100, 0.5])
def test_truncated_safetensors(source: Path, kept: float) -> None:
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(CheckpointError, match="truncated"):
        check_source(source)


def test_pickles_are_refused_and_not_opened(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\)"):
        check_source(source)


def test_no_weights_at_all(source: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        check_source(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(source: Path, value: float) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 values"):
        check_source(source)


def test_quantized_source_is_refused(source: Path) -> None:
    write_json(source / "config.json", read_config(source) | {"quantization_config": {}})
    with pytest.raises(CheckpointError, match="quantized already"):
        check_source(source)


def test_missing_shard(source: Path) -> None:
    write_json(source / "model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})
    with pytest.raises(CheckpointError, match=r"missing: model-1\.safetensors"):
        weight_files(source)


def test_index_that_names_a_tensor_of_no_file(source: Path) -> None:
    names = [*load_file(source / "model.safetensors"), "model.layers.9.mlp.up_proj.weight"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    write_json(source / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"1 tensors that no file holds: model\.layers\.9\.mlp\.up_proj\.weight"):
        check_source(source, values=False)


def test_check_of_headers_leaves_the_values_to_others(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    assert check_source(source, values=False)["model_type"] == "llama"
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 1 values") as whole:
        check_source(source)
    with pytest.raises(CheckpointError) as single:
        require_finite("model.norm.weight", tensors["model.norm.weight"], source)
    assert str(single.value) == str(whole.value)


@pytest.mark.parametrize("kept", [4, 100, 0.5])
def test_check_of_headers_sees_truncation(source: Path, kept: float) -> None:
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(CheckpointError, match="truncated"):
        check_source(source, values=False)


_FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
_FLOATS8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", [*_FLOATS, *_FLOATS8], ids=str)
def test_every_float_dtype_is_checked(dtype: torch.dtype) -> None:
    values = torch.linspace(1.0, 8.0, 50)
    require_finite("w", values.to(dtype), Path("model"))
    values[[7, 30]] = float("nan")
    with pytest.raises(CheckpointError, match="w holds 2 values that are NaN or infinite, of 50"):
        require_finite("w", values.to(dtype), Path("model"))


@pytest.mark.parametrize("dtype", [*_FLOATS, torch.float8_e5m2], ids=str)
def test_both_infinities_are_seen(dtype: torch.dtype) -> None:
    for value in (float("inf"), -float("inf")):
        with pytest.raises(CheckpointError, match="w holds 1 values"):
            require_finite("w", torch.tensor([[0.0, value, 1.0]]).to(dtype), Path("model"))


def test_tensors_without_floats_are_finite() -> None:
    for tensor in (torch.empty(0, 3), torch.arange(5), torch.tensor([True])):
        require_finite("w", tensor, Path("model"))


def test_shards_read_back_equal(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.randn(index + 1, 5) for index in range(6)}
    write_tensors(tmp_path, tensors, max_shard_bytes=100)
    files = weight_files(tmp_path)
    assert len(files) > 1
    found = dict(read_tensors(files))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_side_files_travel_byte_for_byte(source: Path, tmp_path: Path) -> None:
    (source / "heads").mkdir()
    (source / "heads" / "action_head.pt").write_bytes(bytes(range(256)))
    save_file({"w": torch.ones(3)}, source / "action_head.safetensors")
    target = tmp_path / "target"
    target.mkdir()
    sums = copy_side_files(source, target)
    assert {"heads/action_head.pt", "action_head.safetensors"} <= sums.keys()
    assert "model.safetensors" not in sums
    assert "config.json" not in sums
    for name in sums:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_identity_names_what_changed(source: Path) -> None:
    write_tensors(source, load_file(source / "model.safetensors"), max_shard_bytes=50_000)
    (source / "notes.txt").write_text("a", encoding="utf-8")
    shards = [path.name for path in weight_files(source)]
    assert len(shards) > 1
    before = source_identity(source)
    assert list(before) == ["config.json", "model.safetensors.index.json", *shards]
    for name, total in before.items():
        assert total == hashlib.sha256((source / name).read_bytes()).hexdigest()
    (source / "notes.txt").write_text("b", encoding="utf-8")
    assert source_identity(source) == before
    for name in (shards[-1], "config.json", "model.safetensors.index.json"):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data + b" ")
        after = source_identity(source)
        assert [one for one in before if after[one] != before[one]] == [name]
        (source / name).write_bytes(data)


def test_atomic_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target, overwrite=False) as partial:
        (partial / "file").write_text("x", encoding="utf-8")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x", encoding="utf-8")
    with pytest.raises(ExportError, match="--overwrite"), atomic_directory(target, overwrite=False):
        pass
    assert (target / "precious").exists()
    with atomic_directory(target, overwrite=True) as partial:
        (partial / "new").write_text("y", encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x", encoding="utf-8")
    with pytest.raises(ExportError, match="No space left"), atomic_directory(target, overwrite=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="No space left"),
        atomic_directory(tmp_path / "out", overwrite=False) as partial,
    ):
        _write_to_a_full_device(partial / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def _write_to_a_full_device(path: Path) -> None:
    path.symlink_to("/dev/full")
    path.write_bytes(b"0" * 10**6)


def test_manifest_must_be_complete(source: Path) -> None:
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(source)
    write_json(source / MANIFEST, {"complete": False})
    with pytest.raises(CheckpointError, match="cut off"):
        read_manifest(source)
    write_json(source / MANIFEST, {"complete": True})
    assert read_manifest(source) == {"complete": True}
    partial = source.parent / ".out.partial-1"
    shutil.copytree(source, partial)
    with pytest.raises(CheckpointError, match="cut off"):
        read_manifest(partial)


def write_slowly(ready: Any, target: Path) -> None:
    with atomic_directory(target, overwrite=False) as partial:
        write_json(partial / "config.json", {})
        write_json(partial / "vlaquant.json", {"complete": True})
        ready.set()
        time.sleep(60)


def test_sigkill_leaves_nothing_acceptable(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert signalled(signal.SIGKILL, write_slowly, target).code == -signal.SIGKILL
    # The partial directory is there, and it even has a manifest that says "complete"
    (left,) = tmp_path.iterdir()
    assert left != target
    assert (left / MANIFEST).is_file()
    with pytest.raises(CheckpointError, match="cut off"):
        read_manifest(left)
