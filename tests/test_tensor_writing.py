"""Safetensors files from memory or from other files: the bytes that safetensors writes, whole or not at all."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import signalled
from made_tensors import blocks, every_dtype, same, some_tensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlaquant.checkpoint import (
    TensorFiles,
    join_tensor_files,
    tensor_files,
    tensor_writing,
    weight_files,
    write_made_tensors,
    write_tensor_file,
    write_tensors,
)
from vlaquant.errors import CheckpointError, ExportError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(blocks(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_writes_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    for metadata in ({"format": "pt"}, None):
        save_file(every_dtype(), tmp_path / "theirs", metadata=metadata)
        write_tensor_file(tmp_path / "ours", every_dtype(), metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_comparison_with_safetensors_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {dtype: -rank for dtype, rank in tensor_writing._RANK.items()}
    monkeypatch.setattr(tensor_writing, "_RANK", ranks)
    with pytest.raises(AssertionError):
        test_writes_the_bytes_that_safetensors_writes(tmp_path)


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=5),
    data=st.data(),
)
def test_round_trip(names: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    shape, dtype = st.lists(st.integers(0, 4), max_size=3), st.sampled_from([*tensor_files.DTYPES.values()])
    names = [name for name in names if name != "__metadata__"]
    tensors = {name: some_tensor(data.draw(dtype), tuple(data.draw(shape))) for name in names}
    write_tensor_file(path, tensors)
    with TensorFiles.open([path]) as files:
        assert files.keys() == tensors.keys()
        assert all(same(files.read(name), tensor) for name, tensor in tensors.items())
    assert load_file(path).keys() == tensors.keys()


def test_writes_views_that_are_not_contiguous(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    tensors = {"transposed": whole.T, "slice": whole[:, ::2], "expanded": whole[:1].expand(4, 8), "parameter": whole}
    tensors["parameter"] = torch.nn.Parameter(whole)
    write_tensor_file(tmp_path / "x", tensors)
    assert all(torch.equal(load_file(tmp_path / "x")[name], tensor) for name, tensor in tensors.items())


def test_dtype_that_safetensors_has_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w has dtype torch\.complex128, which safetensors cannot hold"):
        write_tensor_file(tmp_path / "x", {"w": torch.ones(2, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


# Joining


def split_over_files(tensors: dict[str, Tensor], directory: Path) -> list[tuple[str, TensorFiles, str]]:
    """Each tensor in a file of its own, under another name."""
    sources = []
    for number, (name, tensor) in enumerate(tensors.items()):
        path = directory / f"stage-{number:02d}.safetensors"
        write_tensor_file(path, {f"its.{name}": tensor})
        sources.append((name, TensorFiles.open([path]), f"its.{name}"))
    return sources


@pytest.mark.parametrize("limit", [10, 100, 200, 10**9])
@pytest.mark.parametrize("make", [blocks, every_dtype])
def test_join_equals_writing_from_memory(
    tmp_path: Path, limit: int, make: Callable[[], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_PIECE_BYTES", 16)
    for folder in ("memory", "files", "stages"):
        (tmp_path / folder).mkdir()
    tensors = make()
    write_tensors(tmp_path / "memory", tensors, max_shard_bytes=limit)
    sources = split_over_files(tensors, tmp_path / "stages")
    join_tensor_files(sources, tmp_path / "files", max_shard_bytes=limit)
    written = sorted((tmp_path / "memory").iterdir())
    assert [path.name for path in written] == sorted(path.name for path in (tmp_path / "files").iterdir())
    assert (len(written) > 1) == (limit < 10**9)
    for path in written:
        assert path.read_bytes() == (tmp_path / "files" / path.name).read_bytes()


def test_made_tensors_equal_writing_from_memory(tmp_path: Path) -> None:
    tensors = every_dtype()
    for folder in ("memory", "made"):
        (tmp_path / folder).mkdir()
    asked: list[str] = []

    def make(name: str) -> Tensor:
        asked.append(name)
        return tensors[name].clone()

    write_tensors(tmp_path / "memory", tensors, max_shard_bytes=200)
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_made_tensors(tmp_path / "made", empty, make, max_shard_bytes=200)
    assert sorted(asked) == sorted(tensors)
    for path in (tmp_path / "memory").iterdir():
        assert path.read_bytes() == (tmp_path / "made" / path.name).read_bytes()


@pytest.mark.parametrize("wrong", [torch.ones(3, 2), torch.ones(2, 3).half()], ids=["shape", "dtype"])
def test_made_tensor_that_does_not_fit(tmp_path: Path, wrong: Tensor) -> None:
    with pytest.raises(ExportError, match=r"w: made as .*, wanted torch\.float32 \[2, 3\]"):
        write_made_tensors(tmp_path, {"w": torch.empty(2, 3, device="meta")}, lambda _: wrong)
    assert list(tmp_path.iterdir()) == []


def test_shards_are_full_and_not_too_big(tmp_path: Path) -> None:
    write_tensors(tmp_path, blocks(), max_shard_bytes=100)
    shards = [list(load_file(path)) for path in weight_files(tmp_path)]
    # Blocks of 84, 70, 56, 42, 28 and 14 bytes, in this order
    assert [sorted(shard) for shard in shards] == [
        ["block.5.weight"],
        ["block.4.weight"],
        ["block.2.weight", "block.3.weight"],
        ["block.0.weight", "block.1.weight"],
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 294
    assert {
        name: f"model-{number:05d}-of-00004.safetensors" for number, one in enumerate(shards, 1) for name in one
    } == (index["weight_map"])
    for path in weight_files(tmp_path):
        with safe_open(path, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_tensors(tmp_path, {})
    assert load_file(tmp_path / "model.safetensors") == {}
    assert len(TensorFiles.open([tmp_path / "model.safetensors"])) == 0


def test_join_refuses_one_name_twice(file: Path, tmp_path: Path) -> None:
    with (
        TensorFiles.open([file]) as files,
        pytest.raises(CheckpointError, match=r"two tensors are to be written under the name w$"),
    ):
        join_tensor_files([("w", files, "block.1.weight"), ("w", files, "block.2.weight")], tmp_path)


def test_join_refuses_a_source_that_changes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_PIECE_BYTES", 16)
    out = tmp_path / "out"
    out.mkdir()
    with TensorFiles.open([file]) as files:
        pieces = files.pieces

        def change_in_the_middle(name: str) -> Iterator[memoryview]:
            for number, piece in enumerate(pieces(name)):
                yield piece
                if name == "block.3.weight" and number == 1:
                    os.truncate(file, file.stat().st_size // 2)

        monkeypatch.setattr(files, "pieces", change_in_the_middle)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            join_tensor_files([(name, files, name) for name in files], out)
    assert list(out.iterdir()) == []


# Faults of the disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_keeps_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    (file.parent / ".model.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(
        ExportError, match=r"model\.safetensors: could not be written, and nothing was: .*No space left"
    ):
        write_tensor_file(file, blocks())
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]
    assert file.read_bytes() == before


def test_disk_that_fills_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = iter(range(10))

    def full_at_the_third(tensor: Tensor) -> memoryview:
        if next(turn) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return tensor_files.tensor_bytes(tensor)

    monkeypatch.setattr(tensor_writing, "tensor_bytes", full_at_the_third)
    with pytest.raises(ExportError, match="No space left on device"):
        write_tensor_file(tmp_path / "x.safetensors", blocks())
    assert list(tmp_path.iterdir()) == []


def test_limit_of_the_file_size_in_the_middle(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, old[1]))
    try:
        with pytest.raises(ExportError, match="File too large"):
            write_tensor_file(tmp_path / "x.safetensors", {f"t{index}": torch.randn(2**12) for index in range(9)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def write_slowly(ready: Any, folder: Path) -> None:
    def make(name: str) -> torch.Tensor:
        if name == "b":
            ready.set()
            time.sleep(60)
        return torch.ones(2**18)

    write_made_tensors(folder, dict.fromkeys("ab", torch.ones(2**18)), make)


def test_sigkill_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert signalled(signal.SIGKILL, write_slowly, tmp_path).code == -signal.SIGKILL
    assert [left.name for left in tmp_path.iterdir()] == [".model.safetensors.partial"]
    assert list(tmp_path.glob("*.safetensors")) == []
    write_tensor_file(path, {"a": torch.ones(3)})
    assert [left.name for left in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(path)["a"].tolist() == [1.0] * 3


# One process for all, as importing takes seconds; peaks only grow, so what must stay small comes first.
# Not ru_maxrss: a child begins with its parent's.
_PEAKS = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
from vlaquant.checkpoint import TensorFiles, join_tensor_files, source_identity, write_tensors
torch.set_num_threads(1)
directory, out = Path(sys.argv[1]), Path(sys.argv[2])
path = directory / "model.safetensors"

def peak_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

def read():
    with TensorFiles.open([path]) as files:
        for name in files:
            files.read(name).view(torch.int16).max()

def join():
    with TensorFiles.open([path]) as files:
        join_tensor_files([(name, files, name) for name in files], out, 64 * 2**20)

def write():
    tensor = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    write_tensors(out, {str(index): tensor.T for index in range(20)}, 64 * 2**20)

def mapped():
    with safe_open(path, "pt") as handle:
        for name in handle.keys():
            handle.get_tensor(name).view(torch.int16).max()

# What libraries load when they are first used is not part of it
small = Path(out, "small")
small.mkdir()
write_tensors(small, {"t": torch.zeros(64, 128, dtype=torch.bfloat16).T}, 64 * 2**20)
torch.zeros(2**22, dtype=torch.int16).max()
before = peak_mib()
for what in (read, join, write, lambda: source_identity(directory), mapped):
    what()
    print(peak_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory in /proc")
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "out").mkdir()
    write_tensors(tmp_path, {f"t{index:02d}": torch.zeros(2**22, dtype=torch.bfloat16) for index in range(20)})
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS, str(tmp_path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    read, join, write, identity, mapped = map(float, done.stdout.split())
    # 20 tensors of 8 MiB: one of them, and a buffer of 8 MiB
    assert max(read, join, write, identity) < 50, done.stdout
    # The measurement sees what it must: a mapped file stays in memory
    assert mapped > 120, done.stdout
