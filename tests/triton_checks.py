"""What the Triton kernels must compute. Run by ``test_kernels_triton.py`` in a process of its own.

On the CPU where ``TRITON_INTERPRET=1`` is set, else on the CUDA device.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import (
    INT8_SCHEMES,
    REFERENCE_ONLY_SCHEMES,
    exact_output,
    integer_output,
    layer_of,
    relative_error,
    run,
    with_powers_of_two,
)
from torch import Tensor

from vlaquant.kernels import triton_w4a16, triton_w4a16_jit, triton_w8a8, triton_w8a8_jit, unpack
from vlaquant.kernels.reference import REFERENCE
from vlaquant.kernels.triton_common import INTERPRETED, Config, jit, tl
from vlaquant.kernels.triton_w4a16 import TRITON_W4A16, pack, pack_planes
from vlaquant.kernels.triton_w8a8 import TRITON_W8A8
from vlaquant.linear import QuantLinear
from vlaquant.numerics import quantize_tokens
from vlaquant.scheme import PRESETS, Granularity, QuantSpec, Scheme

DEVICE = "cpu" if INTERPRETED else "cuda"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
W8A8_SCHEMES = INT8_SCHEMES | {"asym_token": REFERENCE_ONLY_SCHEMES["asym_token"]}

W4A16_CONFIGS = [
    Config("gemv", 16, split=2),
    Config("gemv", 32, warps=2),
    Config("gemm", 32, 16, split=3, stages=3),
    Config("gemm", 64, 32, stages=3),
]
W8A8_CONFIGS = [
    Config("gemv", 16, split=2),
    Config("gemv", 8),
    Config("gemm", 32, 16, split=2, stages=3),
    Config("gemm", 64, 32, stages=3),
]


def w4a16(group_size: int | str, *, symmetric: bool = True) -> Scheme:
    return PRESETS["w4a16"].with_weight(group_size=group_size, symmetric=symmetric)


def activations(t: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(t, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def w4a16_output(layer: QuantLinear, x: Tensor, config: Config) -> Tensor:
    layer = layer.to(DEVICE)
    packed = pack(layer.stored(), layer.query(x.dtype))
    return triton_w4a16.multiply(x.to(DEVICE).contiguous(), packed, layer.bias, config).cpu()


def w8a8_output(layer: QuantLinear, x: Tensor, config: Config) -> Tensor:
    layer = layer.to(DEVICE)
    stored, query = layer.stored(), layer.query(x.dtype)
    scale, sums, x_scale, x_zero = (*TRITON_W8A8.prepare(stored, query), None, None)[:4]
    assert scale is not None
    assert sums is not None
    assert query.scheme.activation is not None
    codes = triton_w8a8.quantize(x.to(DEVICE), x_scale, x_zero, symmetric=query.scheme.activation.symmetric)
    weight = triton_w8a8.Weight(stored.weight, scale, sums)
    return triton_w8a8.multiply(codes, weight, stored.bias, x.dtype, config).cpu()


def assert_is_rounded(got: Tensor, layer: QuantLinear, x: Tensor) -> None:
    """The product in float64, off by half a unit in the last place and by what float32 sums leave of their terms."""
    exact = exact_output(layer, x)
    weight = unpack(layer.stored(), layer.query()).dequantize(torch.float64)
    terms = x.double().abs() @ weight.abs().T + (0.0 if layer.bias is None else layer.bias.double().abs())
    assert ((got.double() - exact).abs() <= torch.finfo(got.dtype).eps / 2 * exact.abs() + 1e-6 * terms).all()


def test_layout() -> None:
    """As drawn in the module's docstring, bit by bit."""
    for lanes, k in ((16, 40), (32, 256), (32, 300)):
        codes = torch.randint(-8, 8, (3, k), dtype=torch.int8)
        words = pack_planes(codes, lanes)
        assert words.shape == (3, -(-k // (8 * lanes)) * lanes)
        for row, column in itertools.product(range(3), range(k)):
            block, rest = divmod(column, 8 * lanes)
            plane, lane = divmod(rest, lanes)
            word = int(words[row, block * lanes + lane])
            assert (word >> (4 * plane) & 15) - 8 == codes[row, column]


def check_w4a16(scheme: Scheme, k: int = 384) -> None:
    layer = layer_of(scheme, 37, k)
    for config in W4A16_CONFIGS:
        x = activations(3 if config.path == "gemv" else 5, k)
        assert relative_error(w4a16_output(layer, x, config), exact_output(layer.cpu(), x)) < 1e-6, config


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, "channel", "tensor"])
def test_w4a16_is_the_product_in_float64(group_size: int | str) -> None:
    check_w4a16(w4a16(group_size))
    check_w4a16(w4a16(group_size, symmetric=False))


def test_w4a16_groups_of_some_blocks() -> None:
    check_w4a16(w4a16(512, symmetric=False), k=1024)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_w4a16_rounds_once(dtype: torch.dtype) -> None:
    """Whatever the dtype of the activations, only the result is rounded to it."""
    layer = layer_of(w4a16(64, symmetric=False), 40, 320, dtype=dtype)
    for config in W4A16_CONFIGS:
        x = activations(2, 320, dtype)
        got = w4a16_output(layer, x, config)
        assert got.dtype == dtype
        assert_is_rounded(got, layer.cpu(), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", [16, 128, "channel"])
def test_dense_weight_is_the_reference(group_size: int | str, dtype: torch.dtype) -> None:
    for symmetric in (True, False):
        layer = layer_of(w4a16(group_size, symmetric=symmetric), 21, 384, dtype=dtype).to(DEVICE)
        stored, query = layer.stored(), layer.query()
        got = triton_w4a16.dequantize(pack(stored, query), torch.empty(1, 384, dtype=dtype, device=DEVICE))
        assert torch.equal(got, unpack(stored, query).dequantize(dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 16), (1, 960), (33, 48), (65, 272), (130, 528)])
def test_w4a16_edges(n: int, k: int) -> None:
    """No multiple of any block size, one row, fewer columns than a block has."""
    for t, dtype in ((1, torch.float32), (3, torch.bfloat16), (17, torch.bfloat16)):
        layer = layer_of(w4a16(16), n, k, dtype=dtype)
        x = activations(t, k, dtype)
        assert_is_rounded(run(TRITON_W4A16, layer.to(DEVICE), x.to(DEVICE)).cpu(), layer.cpu(), x)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 17, 70, 300])
def test_w4a16_any_number_of_tokens(tokens: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_of(w4a16(32), 48, 128, dtype=dtype, bias=tokens % 2 == 0).to(DEVICE)
        x = activations(tokens, 128, dtype).to(DEVICE)
        got = run(TRITON_W4A16, layer, x)
        assert got.shape == (tokens, 48)
        assert torch.equal(got, run(TRITON_W4A16, layer, x))
        wanted = exact_output(layer, x)
        # Dense, bfloat16 rounds the weight as the reference does
        worst = 1e-6 if dtype == torch.float32 else max(1.1 * relative_error(run(REFERENCE, layer, x), wanted), 2**-8)
        assert relative_error(got, wanted) < worst


@settings(max_examples=25)
@given(st.data())
def test_w4a16_shapes(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([16, 32, 64, 128]))
    k = size * data.draw(st.integers(1, 640 // size))
    n = data.draw(st.integers(1, 70))
    t = data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from(FLOATS))
    scheme = w4a16(size, symmetric=data.draw(st.booleans()))
    layer = layer_of(scheme, n, k, bias=data.draw(st.booleans()), dtype=dtype)
    wide = activations(t, 2 * k, dtype) * 2.0 ** data.draw(st.integers(-10, 10))
    x = data.draw(st.sampled_from([wide[:, :k], wide[:, ::2], wide.T.contiguous().T[:, k:]]))
    got = run(TRITON_W4A16, layer.to(DEVICE), x.to(DEVICE)).cpu()
    if dtype == torch.float32 or t <= 16:
        assert_is_rounded(got, layer.cpu(), x)
    else:
        assert relative_error(got, exact_output(layer.cpu(), x)) < 2**-8


def check_w8a8(scheme: Scheme, n: int, k: int) -> None:
    """Integers as activations, whose dynamic scale is 1: then every bit of the result must be right."""
    layer = with_powers_of_two(layer_of(scheme, n, k))
    low = -127 if scheme.activation is None or scheme.activation.symmetric else -128
    for config, tokens in zip(W8A8_CONFIGS, (1, 3, 5, 33), strict=True):
        x = torch.randint(low, 128, (tokens, k), generator=torch.Generator().manual_seed(1)).float()
        x[:, 0], x[:, 1] = 127.0, low
        assert np.array_equal(w8a8_output(layer, x, config).double().numpy(), integer_output(layer.cpu(), x)), config


@pytest.mark.parametrize("scheme", W8A8_SCHEMES)
def test_w8a8_multiplies_integers_exactly(scheme: str) -> None:
    for n, k in ((1, 8), (7, 320), (70, 130), (33, 590)):
        check_w8a8(W8A8_SCHEMES[scheme], n, k)


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_w8a8_does_not_saturate(scheme: str) -> None:
    layer = with_powers_of_two(layer_of(INT8_SCHEMES[scheme], 16, 2048, bias=False))
    layer.load_state_dict({**layer.state_dict(), "weight": torch.full((16, 2048), 127, dtype=torch.int8)})
    x = torch.full((3, 2048), 127.0)
    for config in W8A8_CONFIGS:
        assert np.array_equal(w8a8_output(layer, x, config).double().numpy(), integer_output(layer.cpu(), x)), config


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", W8A8_SCHEMES)
def test_w8a8_is_the_reference(scheme: str, dtype: torch.dtype) -> None:
    for tokens, bias in ((1, True), (9, False), (20, True)):
        layer = layer_of(W8A8_SCHEMES[scheme], 33, 130, bias=bias, dtype=dtype)
        x = (activations(130, tokens, dtype) * 2).T
        x[tokens // 2] = 0.0
        got = run(TRITON_W8A8, layer.to(DEVICE), x.to(DEVICE)).cpu()
        assert got.dtype == dtype
        assert relative_error(got, run(REFERENCE, layer.cpu(), x)) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_of_tokens_are_the_same_bits(dtype: torch.dtype) -> None:
    check_codes(dtype, symmetric=True)
    check_codes(dtype, symmetric=False)


def check_codes(dtype: torch.dtype, *, symmetric: bool) -> None:
    spec = QuantSpec(bits=8, granularity=Granularity.TOKEN, symmetric=symmetric, dynamic=True)
    x = activations(24, 2100) * torch.logspace(-30, 30, 24)[:, None]
    x[3], x[4, 5], x[5, 7] = 0.0, torch.inf, -torch.inf
    x[6], x[7], x[8] = x[6].abs(), 1e-44, -3e38
    x[9] = torch.arange(2100) % 254 - 126.5  # ties between codes
    x[9, 0] = 127.0
    x = x.to(dtype)
    got = triton_w8a8.quantize(x.to(DEVICE), None, None, symmetric=symmetric)
    codes, scale, zero = quantize_tokens(x, spec)
    assert torch.equal(got.codes.cpu(), codes)
    assert torch.equal(got.scale.cpu(), scale[:, 0])
    if got.zero is not None:
        assert torch.equal(got.zero.cpu().float(), zero[:, 0])
    assert symmetric == (got.zero is None)


def test_a_nan_stays_with_its_token() -> None:
    x = activations(4, 64)
    x[1, 3] = torch.nan
    for kernel, scheme in ((TRITON_W8A8, PRESETS["w8a8"]), (TRITON_W4A16, w4a16(32))):
        wrong = run(kernel, layer_of(scheme, 20, 64).to(DEVICE), x.to(DEVICE)).isnan().cpu()
        assert wrong[1].all()
        assert not wrong[[0, 2, 3]].any()


@settings(max_examples=25)
@given(
    st.integers(1, 20), st.integers(1, 70), st.integers(1, 600), st.sampled_from(sorted(W8A8_SCHEMES)), st.booleans()
)
def test_w8a8_shapes(t: int, n: int, k: int, scheme: str, bias: bool) -> None:  # noqa: FBT001
    layer = layer_of(W8A8_SCHEMES[scheme], n, k, bias=bias)
    x = activations(t, k)
    got = run(TRITON_W8A8, layer.to(DEVICE), x.to(DEVICE)).cpu()
    assert np.allclose(got.double().numpy(), integer_output(layer.cpu(), x), rtol=1e-5, atol=1e-5)


@jit
def first_group(pointer, _group, rows, n):
    return tl.load(pointer + rows, mask=rows < n, other=0).to(tl.float32)


@jit
def next_plane(words, zero, _nothing, plane):
    return ((words >> ((4 * plane + 4) % 32)) & 15).to(tl.float32) - 8.0 - zero


@jit
def half_up(values):
    return tl.floor(values + 0.5)


@jit
def no_zero_point(sums, token, rows, x_scale, _x_zero, scale, _sums, bias, tokens, n, PER_TOKEN, _has_zero, HAS_BIAS):
    return RIGHT_SCALED(sums, token, rows, x_scale, None, scale, None, bias, tokens, n, PER_TOKEN, 0, HAS_BIAS)


RIGHT_SCALED = triton_w8a8_jit._scaled


FAULTS = {
    "group": (triton_w4a16_jit, "_group_vector", first_group, lambda: check_w4a16(w4a16(32))),
    "plane": (triton_w4a16_jit, "_codes", next_plane, lambda: check_w4a16(w4a16(32))),
    "rounding": (triton_w8a8_jit, "_round", half_up, lambda: check_codes(torch.float32, symmetric=True)),
    "zero": (triton_w8a8_jit, "_scaled", no_zero_point, lambda: check_w8a8(PRESETS["w8a8_static"], 7, 320)),
}


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps the functions that it was compiled with")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    module, name, wrong, check = FAULTS[fault]
    check()
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        check()


def test_operators_are_registered_as_they_behave() -> None:
    """Shapes and dtypes for tracing, and that inputs are left alone: what torch.compile relies on."""
    for kernel, scheme in ((TRITON_W8A8, PRESETS["w8a8_static"]), (TRITON_W4A16, w4a16(32, symmetric=False))):
        layer = layer_of(scheme, 20, 64).to(DEVICE)
        stored, query = layer.stored(), layer.query()
        prepared = kernel.prepare(stored, query)
        x = activations(3, 64).to(DEVICE)
        if kernel is TRITON_W4A16:
            arguments: tuple[object, ...] = (x, *prepared, layer.bias, 32)
            torch.library.opcheck(torch.ops.vlaquant.triton_w4a16.default, arguments)
        else:
            arguments = (x, stored.weight, *prepared, layer.bias, False)
            torch.library.opcheck(torch.ops.vlaquant.triton_w8a8.default, arguments)


def test_queries_that_are_refused() -> None:
    usual = dataclasses.replace(layer_of(w4a16(32), 8, 64).query(), device=DEVICE)
    assert TRITON_W4A16.why_not(usual) is None
    assert "int8 activations" in str(TRITON_W4A16.why_not(dataclasses.replace(usual, scheme=PRESETS["w4a8"])))
    assert "needs 4 bits, not 3" in str(TRITON_W4A16.why_not(dataclasses.replace(usual, scheme=PRESETS["w3a16"])))
    for size in (8, 24):
        assert "a power of two" in str(TRITON_W4A16.why_not(dataclasses.replace(usual, scheme=w4a16(size))))
    assert "not torch.float64" in str(TRITON_W4A16.why_not(dataclasses.replace(usual, dtype=torch.float64)))
    usual = dataclasses.replace(usual, scheme=PRESETS["w8a8"])
    assert TRITON_W8A8.why_not(usual) is None
    assert "weight-only" in str(TRITON_W8A8.why_not(dataclasses.replace(usual, scheme=PRESETS["w8a16"])))
    assert "not in groups of 128" in str(TRITON_W8A8.why_not(dataclasses.replace(usual, scheme=PRESETS["w4a8"])))
    assert "overflow int32" in str(TRITON_W8A8.why_not(dataclasses.replace(usual, in_features=70_000)))
    asymmetric = PRESETS["w8a8"].with_weight(symmetric=False)
    assert "symmetric weight" in str(TRITON_W8A8.why_not(dataclasses.replace(usual, scheme=asymmetric)))
