"""Single tensors out of safetensors files: what safetensors reads, and refusal of what is damaged or changes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tensors import blocks, every_dtype, same
from safetensors.torch import save_file

from vlaquant.checkpoint import TensorFiles, tensor_files
from vlaquant.errors import CheckpointError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(blocks(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a file by ``change``, which returns the new one (an object, or JSON text)."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    new = change(json.loads(data[8:end]))
    text = new.encode() if isinstance(new, str) else json.dumps(new).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    with TensorFiles.open([tmp_path / "all.safetensors"]) as files:
        assert set(files.names()) == tensors.keys()
        assert files.bytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert same(files.read(name), tensor), name
            assert (files[name].dtype, files[name].shape) == (tensor.dtype, tuple(tensor.shape))
            assert b"".join(bytes(piece) for piece in files.pieces(name)) == bytes(tensor_files.tensor_bytes(tensor))


def test_read_gives_private_writable_memory(file: Path) -> None:
    before = file.read_bytes()
    with TensorFiles.open([file]) as files:
        first, second = files.read("block.5.weight"), files.read("block.5.weight")
        first.zero_()
        assert first.is_contiguous()
        assert second.abs().sum() > 0
    assert file.read_bytes() == before


# What is damaged


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        TensorFiles.open([file])


def test_trailing_bytes(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: \d+ bytes, but its header describes"):
        TensorFiles.open([file])


def test_length_that_no_header_has(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="damaged header: it claims 18446744073709551615 bytes"):
        TensorFiles.open([file])


def moved(offsets: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header | {"block.2.weight": header["block.2.weight"] | {"data_offsets": offsets}}


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header | {"block.2.weight": header["block.2.weight"] | values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "{", "damaged header"),
        (lambda _: "[]", "holds list, wanted an object"),
        (lambda _: "[" * 100_000, "damaged header"),
        (lambda header: json.dumps(header).replace("block.3", "block.2"), "a name occurs twice"),
        (moved([0, 42]), r"block\.\d\.weight overlaps the tensor before it"),
        (moved([-42, 0]), r"block\.2\.weight has shape .* wanted lists of integers from 0 up"),
        (moved([42, 83]), r"block\.2\.weight of shape .* needs 42 bytes, but lies at \[42, 83\]"),
        (moved([84, 42]), "needs 42 bytes"),
        (moved([0, 42, 84]), "needs 42 bytes"),
        (moved([0.0, 42.0]), "wanted lists of integers"),
        (moved(None), "wanted lists of integers"),
        (lambda header: {name: one for name, one in header.items() if name != "block.2.weight"}, "leaves a gap"),
        (changed(shape=[3, True]), "wanted lists of integers"),
        (changed(shape=[2**40, 2**40]), "needs 2417851639229258349412352 bytes"),
        (changed(dtype="F4"), r"block\.2\.weight has dtype 'F4'; vlaquant reads U64, "),
        (changed(dtype=["F32"]), "has dtype"),
        (lambda header: header | {"block.2.weight": {}}, "lacks dtype, shape or data_offsets"),
        (lambda header: header | {"block.2.weight": 5}, "lacks dtype, shape or data_offsets"),
    ],
)
def test_damaged_header(file: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_header(file, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        TensorFiles.open([file])


def test_unchanged_header_passes_the_editor(file: Path) -> None:
    edit_header(file, lambda header: header)
    assert len(TensorFiles.open([file])) == 6


def test_one_name_in_two_files(file: Path) -> None:
    save_file({"block.1.weight": torch.ones(1)}, file.with_name("other.safetensors"))
    with pytest.raises(CheckpointError, match=r"other\.safetensors: holds block\.1\.weight, and so does model\.saf"):
        TensorFiles.open([file, file.with_name("other.safetensors")])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read: .*No such file"):
        TensorFiles.open([tmp_path / "gone.safetensors"])


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_descriptors_are_closed(file: Path) -> None:
    before = open_descriptors()
    with TensorFiles.open([file]) as files:
        assert open_descriptors() == before + 1
    assert open_descriptors() == before
    with pytest.raises(CheckpointError, match="was closed"):
        files.read("block.1.weight")
    file.with_name("bad").write_bytes(b"bad")
    with pytest.raises(CheckpointError):
        TensorFiles.open([file, file.with_name("bad")])
    assert open_descriptors() == before
    forgotten = TensorFiles.open([file])
    assert open_descriptors() == before + 1
    del forgotten
    assert open_descriptors() == before


# What changes while it is read


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**6))


def rewrite(path: Path) -> None:
    """Same size and same time, as a download that is put in place of the old file."""
    time = path.stat().st_mtime_ns
    new = path.with_name("new")
    new.write_bytes(bytes(path.stat().st_size))
    os.utime(new, ns=(time, time))
    new.replace(path)


@pytest.mark.parametrize("change", [grow, shrink, touch, rewrite, Path.unlink])
@pytest.mark.parametrize("name", ["block.0.weight", "block.5.weight"])
def test_file_that_changes_after_opening(file: Path, change: Callable[[Path], None], name: str) -> None:
    with TensorFiles.open([file]) as files:
        assert files.read(name).dtype == torch.bfloat16
        change(file)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was being read"):
            files.read(name)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            list(files.pieces(name))
