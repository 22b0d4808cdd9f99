"""Outputs come back bit for bit: every dtype, layout and nest, from memory, from spilled files and after a restore."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlaquant.calibrate import cache as cache_module
from vlaquant.calibrate.cache import ActivationCache
from vlaquant.calibrate.outputs import DTYPES, objection, tensors_in
from vlaquant.errors import CalibrationError, ExportError


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_identical(got: Any, wanted: Any) -> None:
    assert type(got) is type(wanted)
    if isinstance(wanted, Tensor):
        assert (got.dtype, got.shape, got.device) == (wanted.dtype, wanted.shape, wanted.device)
        assert bits(got) == bits(wanted)
        assert got.numel() == 0 or got.stride() == wanted.stride()
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key, item in wanted.items():
            assert_identical(got[key], item)
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_identical(one, other)
    else:
        assert got == wanted or (math.isnan(got) and math.isnan(wanted))


def through(output: Any, way: str, directory: Path) -> Any:
    """``output``, once in and out of a cache."""
    cache = ActivationCache(limit_bytes=0 if way == "spilled" else None, spill_directory=directory / "spill")
    cache.put("unit", 3, output)
    if way == "saved":
        cache.save(directory / "saved")
        cache = ActivationCache()
        cache.restore_(directory / "saved")
    return cache.get("unit", 3)


WAYS = pytest.mark.parametrize("way", ["memory", "spilled", "saved"])


def raw(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of small dtypes, NaNs and infinities among them, and random ones of the others."""
    if dtype is torch.bool:
        return torch.tensor([[True, False, True]])
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (2**16,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(2, -1)


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(dtype: str, way: str, tmp_path: Path) -> None:
    tensor = raw(DTYPES[dtype])
    assert_identical(through(tensor, way, tmp_path), tensor)


LAYOUTS: dict[str, Tensor] = {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "empty inside": torch.zeros(2, 0, 3),
    "transposed": torch.randn(3, 4, 5).transpose(0, 2),
    "sliced": torch.randn(4, 6)[:, 1:4],
    "every second": torch.randn(8, 6)[::2, ::3],
    "expanded": torch.randn(1, 3, 1).expand(4, 3, 5),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "column": torch.randn(4, 6)[:, :1],
}


@WAYS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_its_values_and_strides(layout: str, way: str, tmp_path: Path) -> None:
    assert_identical(through(LAYOUTS[layout], way, tmp_path), LAYOUTS[layout])


def test_overlapping_windows_keep_their_values() -> None:
    windows = torch.arange(6.0).unfold(0, 3, 1)
    cache = ActivationCache()
    cache.put("unit", 0, windows)
    assert torch.equal(cache.get("unit", 0), windows)


NEST: Any = ({"a": torch.randn(2), 7: [None, True, 3, -0.5, "text", math.nan, math.inf]}, (), [], {}, (torch.ones(1),))


@WAYS
def test_nests_keep_their_structure(way: str, tmp_path: Path) -> None:
    assert objection(NEST) is None
    assert_identical(through(NEST, way, tmp_path), NEST)


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3).map(torch.randn),
)
_NESTS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 5)), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(_NESTS)
def test_any_nest_comes_back(nest: Any) -> None:
    cache = ActivationCache()
    cache.put("unit", 0, nest)
    assert_identical(cache.get("unit", 0), nest)


def test_what_comes_out_and_went_in_may_be_changed() -> None:
    output = torch.zeros(3)
    cache = ActivationCache()
    cache.put("unit", 0, [output, output])
    output += 1.0
    first = cache.get("unit", 0)
    first[0] += 2.0
    assert first[1].tolist() == [0.0, 0.0, 0.0]
    assert cache.get("unit", 0)[0].tolist() == [0.0, 0.0, 0.0]


def test_memory_is_bounded_and_the_rest_is_on_disk(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    cache = ActivationCache(limit_bytes=2048, spill_directory=spill)
    outputs = {(unit, sample): torch.randn(64) for unit in ("a", "b") for sample in range(8)}
    for (unit, sample), output in outputs.items():
        cache.put(unit, sample, output)
    assert (cache.bytes_in_memory, cache.bytes_spilled) == (2048, 2048)
    assert len(list(spill.iterdir())) == 8
    for (unit, sample), output in outputs.items():
        assert_identical(cache.get(unit, sample), output)
    cache.drop("a")
    assert (cache.bytes_in_memory, cache.bytes_spilled) == (0, 2048)
    cache.put("c", 0, torch.zeros(512))
    assert cache.bytes_in_memory == 2048
    cache.put("b", 0, torch.zeros(64))
    assert torch.equal(cache.get("b", 0), torch.zeros(64))
    cache.drop("b")
    assert cache.bytes_spilled == 0
    assert list(spill.iterdir()) == []


def test_left_over_spilled_files_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "spill").mkdir()
    (tmp_path / "spill" / "old.safetensors").write_bytes(b"x")
    ActivationCache(limit_bytes=0, spill_directory=tmp_path / "spill")
    assert not (tmp_path / "spill").exists()


def test_without_a_limit_nothing_is_spilled(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{"limit_bytes": 0}, {"spill_directory": tmp_path / "spill"}]
    for limits in cases:
        cache = ActivationCache(**limits)
        cache.put("unit", 0, torch.zeros(100))
        assert (cache.bytes_in_memory, cache.bytes_spilled) == (400, 0)


def test_dropped_and_unknown_outputs_are_errors() -> None:
    cache = ActivationCache()
    cache.put("unit", 0, torch.zeros(2))
    cache.drop("unit")
    for unit, sample in (("unit", 0), ("unit", 1), ("other", 0)):
        with pytest.raises(CalibrationError, match=f"output of {unit} for sample {sample} is not stored"):
            cache.get(unit, sample)
    with pytest.raises(CalibrationError, match="other has not run for sample 0"):
        cache.placeholder("other", 0, dense=False)


@pytest.mark.parametrize("size", ["dense", "one number"])
@pytest.mark.parametrize("how", ["put", "put_outline", "dropped", "restored"])
def test_placeholders_are_poison_of_the_same_kind(how: str, size: str, tmp_path: Path) -> None:
    dense = size == "dense"
    output = (torch.randn(3, 4).T, [torch.zeros(2, dtype=torch.bfloat16), "x"], torch.randn(2, 1).expand(2, 5))
    cache = ActivationCache()
    (cache.put_outline if how == "put_outline" else cache.put)("unit", 0, output)
    if how in ("dropped", "restored"):
        cache.drop("unit")
    if how == "restored":
        cache.save(tmp_path / "saved")
        cache = ActivationCache()
        cache.restore_(tmp_path / "saved")
    poison = cache.placeholder("unit", 0, dense=dense)
    assert poison[1][1] == "x"
    for got, wanted in zip(tensors_in(poison), tensors_in(output), strict=True):
        assert (got.dtype, got.shape, got.device) == (wanted.dtype, wanted.shape, wanted.device)
        assert got.isnan().all()
        assert got.untyped_storage().nbytes() <= (wanted.untyped_storage().nbytes() if dense else 8)
        assert not dense or got.stride() == wanted.stride()
    if dense:
        poison[0][0] = 1.0


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point])
def test_every_floating_dtype_can_be_poison(dtype: torch.dtype) -> None:
    cache = ActivationCache()
    cache.put("unit", 0, torch.zeros(3).to(dtype))
    for dense in (True, False):
        assert cache.placeholder("unit", 0, dense=dense).float().isnan().all()


def test_whole_numbers_cannot_be_poison() -> None:
    cache = ActivationCache()
    cache.put("unit", 0, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"unit returns a tensor of torch\.int64"):
        cache.placeholder("unit", 0, dense=True)


def filled(directory: Path) -> tuple[ActivationCache, dict[tuple[str, int], Tensor]]:
    cache = ActivationCache(limit_bytes=500, spill_directory=directory / "spill")
    outputs = {(f"unit.{index % 2}", index): torch.randn(50) for index in range(6)}
    for (unit, sample), output in outputs.items():
        cache.put(unit, sample, output)
    return cache, outputs


def test_save_and_restore_keep_everything(tmp_path: Path) -> None:
    cache, outputs = filled(tmp_path)
    cache.save(tmp_path / "first")
    cache.drop("unit.0")
    cache.put("unit.2", 0, torch.ones(3))
    outputs["unit.2", 0] = torch.ones(3)
    cache.save(tmp_path / "second")
    before = (tmp_path / "first" / "00000002.safetensors").stat()
    assert before.st_ino == (tmp_path / "second" / "00000002.safetensors").stat().st_ino
    assert len(list((tmp_path / "second").iterdir())) == 1 + 4
    for path in (tmp_path / "first").iterdir():
        path.unlink()
    restored = ActivationCache(limit_bytes=300, spill_directory=tmp_path / "other")
    restored.put("stale", 0, torch.ones(3))
    restored.restore_(tmp_path / "second")
    assert restored.bytes_in_memory <= 300
    for path in (tmp_path / "second").iterdir():
        path.unlink()
    for one in (cache, restored):
        for (unit, sample), output in outputs.items():
            if unit == "unit.0":
                with pytest.raises(CalibrationError):
                    one.get(unit, sample)
            else:
                assert_identical(one.get(unit, sample), output)
    with pytest.raises(CalibrationError):
        restored.get("stale", 0)
    restored.save(tmp_path / "third")
    assert len(list((tmp_path / "third").iterdir())) == 1 + 4


def test_what_is_put_again_is_written_again(tmp_path: Path) -> None:
    cache = ActivationCache()
    cache.put("unit", 0, torch.zeros(3))
    cache.save(tmp_path / "first")
    restored = ActivationCache()
    restored.restore_(tmp_path / "first")
    for sample, value in ((1, 1.0), (0, 2.0)):
        restored.put("unit", sample, torch.full((3,), value))
    restored.put("unit", 2, torch.full((3,), 3.0))
    restored.save(tmp_path / "second")
    restored.restore_(tmp_path / "second")
    assert [restored.get("unit", sample)[0].item() for sample in range(3)] == [2.0, 1.0, 3.0]
    assert restored.bytes_in_memory == 36


def test_numbers_of_files_go_on_after_a_restore(tmp_path: Path) -> None:
    cache = ActivationCache()
    cache.put("unit", 0, torch.zeros(3))
    cache.save(tmp_path / "first")
    restored = ActivationCache()
    restored.restore_(tmp_path / "first")
    restored.put("unit", 1, torch.ones(3))
    restored.save(tmp_path / "second")
    restored.restore_(tmp_path / "second")
    assert [restored.get("unit", sample)[0].item() for sample in range(2)] == [0.0, 1.0]


def test_save_flushes_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[list[str]] = []
    monkeypatch.setattr(
        cache_module, "sync_tree", lambda directory: flushed.append(sorted(path.name for path in directory.iterdir()))
    )
    cache = ActivationCache()
    cache.put("unit", 0, torch.zeros(3))
    cache.save(tmp_path / "saved")
    assert flushed == [["00000001.safetensors", "outputs.json"]]


def test_save_works_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    cache, outputs = filled(tmp_path)
    cache.save(tmp_path / "saved")
    restored = ActivationCache(limit_bytes=300, spill_directory=tmp_path / "other")
    restored.restore_(tmp_path / "saved")
    for (unit, sample), output in outputs.items():
        assert_identical(restored.get(unit, sample), output)


def test_a_directory_without_an_index_is_no_saved_cache(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no stored outputs \(it has no outputs\.json\)"):
        ActivationCache().restore_(tmp_path)


def test_a_full_disk_is_an_export_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = ActivationCache()
    cache.put("unit", 0, torch.zeros(3))
    monkeypatch.setattr(cache_module, "write_json", full)
    with pytest.raises(ExportError, match="No space left"):
        cache.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "outputs.json").exists()


def test_the_index_is_plain_json(tmp_path: Path) -> None:
    cache = ActivationCache()
    cache.put("unit", 0, NEST)
    cache.save(tmp_path)
    index = json.loads((tmp_path / "outputs.json").read_text(encoding="utf-8"))
    assert [row["unit"] for row in index["outputs"]] == ["unit"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_ragged_and_sparse_tensors_cannot_be_stored() -> None:
    for tensor in (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), torch.eye(2).to_sparse()):
        assert objection(tensor) is not None


def test_a_cache_that_casts_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = cache_module._pack
    monkeypatch.setattr(cache_module, "_pack", lambda tensor: real(tensor).to(torch.float16).to(tensor.dtype))
    with pytest.raises(AssertionError):
        test_every_dtype_keeps_its_bits("bfloat16", "memory", tmp_path)


def test_a_cache_that_forgets_strides_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache_module, "_can_be_laid_out", lambda tensor: False)
    with pytest.raises(AssertionError):
        test_every_layout_keeps_its_values_and_strides("transposed", "memory", tmp_path)
