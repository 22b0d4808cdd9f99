"""The bit layout: inverse pairs, equality with a string of bits, and with the package that owns the format."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import mutant
from torch import Tensor

from vlaquant import packing
from vlaquant.packing import pack_columns, pack_rows, packed_width, unpack_columns, unpack_rows

BITS = range(2, 9)


@st.composite
def codes_of(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.integers(2, 8))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    bound = 2 ** (bits - 1)
    return torch.randint(-bound, bound, shape, generator=generator).to(torch.int8), bits


def packed_as_strings(codes: Tensor, bits: int) -> Tensor:
    """Write each row as a string of 0 and 1, first code rightmost, and read the words off its right end."""
    rows = []
    for row in codes.tolist():
        stream = "".join(format(code + 2 ** (bits - 1), f"0{bits}b") for code in reversed(row))
        stream = stream.zfill(-(-len(stream) // 32) * 32)
        words = [int(stream[end - 32 : end], 2) for end in range(len(stream), 0, -32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@settings(max_examples=200)
@given(sample=codes_of())
def test_rows_round_trip_and_match_the_bit_string(sample: tuple[Tensor, int]) -> None:
    codes, bits = sample
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (codes.shape[0], packed_width(codes.shape[1], bits))
    assert packed.is_contiguous()
    assert torch.equal(packed, packed_as_strings(codes, bits))
    unpacked = unpack_rows(packed, bits, codes.shape[1])
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


@settings(max_examples=100)
@given(sample=codes_of())
def test_columns_round_trip_and_match_the_bit_string(sample: tuple[Tensor, int]) -> None:
    codes, bits = sample
    packed = pack_columns(codes, bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, packed_as_strings(codes.T, bits).T)
    assert torch.equal(unpack_columns(packed, bits, codes.shape[0]), codes)


@settings(max_examples=100)
@given(sample=codes_of())
def test_is_byte_identical_to_compressed_tensors(sample: tuple[Tensor, int]) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, bits = sample
    rows, columns = helpers.pack_to_int32(codes, bits), helpers.pack_to_int32(codes, bits, packed_dim=0)
    assert torch.equal(pack_rows(codes, bits), rows)
    assert torch.equal(pack_columns(codes, bits), columns)
    assert torch.equal(unpack_rows(rows, bits, codes.shape[1]), helpers.unpack_from_int32(rows, bits, codes.shape))
    if bits == 4 and columns.shape[0] == 1 and columns.shape[1] > 1:
        return  # compressed-tensors 0.20 itself stumbles over a single word of several columns
    unpacked = helpers.unpack_from_int32(columns, bits, codes.shape, packed_dim=0)
    assert torch.equal(unpack_columns(columns, bits, codes.shape[0]), unpacked)


def test_the_pictures_in_the_docstring() -> None:
    four = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int8)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in pack_rows(four, 4)[0].tolist()] == ["fedcba98", "00000000"]
    three = torch.tensor([[-4, -4, 3]], dtype=torch.int8)  # u = 0, 0, 7: the last straddles bytes 0 and 1
    assert pack_rows(three, 3).view(torch.uint8).tolist() == [[0b11000000, 0b00000001, 0, 0]]


@pytest.mark.parametrize("bits", BITS)
def test_odd_strides_and_empty_tensors(bits: int) -> None:
    codes = torch.randint(-2, 2, (6, 10), dtype=torch.int8)
    for view in (codes.T, codes[:, ::3], codes[::2], codes[:1], codes[:, :1], codes[:, :1].T):
        assert torch.equal(pack_rows(view, bits), packed_as_strings(view, bits))
        assert torch.equal(unpack_columns(pack_columns(view, bits), bits, view.shape[0]), view)
    assert pack_rows(codes[:0], bits).shape == (0, packed_width(10, bits))
    assert unpack_rows(pack_rows(codes[:0], bits), bits, 10).shape == (0, 10)


@pytest.mark.parametrize("bits", BITS)
def test_meta_tensors_have_the_right_shape(bits: int) -> None:
    packed = pack_rows(torch.empty(3, 11, dtype=torch.int8, device="meta"), bits)
    assert packed.shape == (3, packed_width(11, bits))
    assert unpack_rows(packed, bits, 11).shape == (3, 11)


def test_misuse_is_refused() -> None:
    too_large = torch.tensor([[8, 0]], dtype=torch.int8)
    with pytest.raises(AssertionError):
        pack_rows(too_large, 4)
    with pytest.raises(AssertionError):
        pack_rows(-too_large - 1, 4)
    assert pack_rows(too_large, 5).shape == (1, 1)
    with pytest.raises(AssertionError):
        pack_rows(too_large.to(torch.int32), 5)
    with pytest.raises(AssertionError):
        pack_rows(too_large, 9)
    with pytest.raises(AssertionError):
        unpack_rows(torch.zeros(1, 2, dtype=torch.int32), 4, 3)


@pytest.mark.parametrize("bits", BITS)
def test_slices_that_begin_anywhere_in_memory(bits: int) -> None:
    codes = torch.randint(-2, 2, (6, 16), dtype=torch.int8)
    whole = pack_rows(codes, bits)
    for start in (1, 2, 5):
        assert torch.equal(pack_rows(codes.flatten()[16 * start :].reshape(-1, 16), bits), whole[start:])
        shifted = torch.cat([torch.zeros(start, dtype=torch.int8), codes.flatten()])[start:].reshape(6, 16)
        assert torch.equal(pack_rows(shifted, bits), whole)
        assert torch.equal(unpack_rows(whole[start:], bits, 16), codes[start:])


def check_packed(module: types.ModuleType) -> None:
    for bits in BITS:
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 43)).to(torch.int8)
        packed = packed_as_strings(codes, bits)
        assert torch.equal(module.pack_rows(codes, bits), packed)
        assert torch.equal(module.unpack_rows(packed, bits, 43), codes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("for lane in (8, 16, 32):", "for lane in (8, 16):"),
        ("for lane in (32, 16, 8):", "for lane in (32, 8, 16):"),
        ("high &= _every(2 * lane, width, width)", "pass"),
        ("high &= _every(2 * lane, lane, width)", "pass"),
        ("= -(1 << (bits - 1))  # u = 0", "= 0"),
        ("_every(8, bits - 1, 1)", "_every(8, 0, 1)"),
        ("codes -= 1 << (bits - 1)", "codes += 1 << (bits - 2)"),
    ],
)
def test_the_oracle_notices_a_broken_copy(old: str, new: str) -> None:
    check_packed(packing)
    with pytest.raises(AssertionError):
        check_packed(mutant(packing, old, new))


def test_rows_are_packed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-4, 4, (7, 20)).to(torch.int8)
    for values in (1, 60, 140):
        monkeypatch.setattr(packing, "_ROWS_OF", values)
        assert torch.equal(pack_rows(codes, 3), packed_as_strings(codes, 3))
