"""The C kernels with every instruction set of this CPU, against float64 and int64."""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
    query,
    relative_error,
    run,
    with_powers_of_two,
)

from vlaquant.errors import VlaquantError
from vlaquant.kernels import select_kernel
from vlaquant.kernels.native import NATIVE, NATIVE_INT8
from vlaquant.kernels.native.library import Library, find_library, open_library
from vlaquant.linear import QuantLinear, from_quantized
from vlaquant.numerics import quantize_tokens, quantize_weight
from vlaquant.scheme import PRESETS

FOUND = find_library()
if isinstance(FOUND, str):
    pytest.skip(f"the native kernels: {FOUND}", allow_module_level=True)
LIBRARY: Library = FOUND
SETS = LIBRARY.instruction_sets
W4 = PRESETS["w4a16"]
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SCHEMES = {name: scheme for name, scheme in (INT8_SCHEMES | REFERENCE_ONLY_SCHEMES).items() if name != "asym_token"}


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    assert LIBRARY.use(request.param.encode())
    yield request.param
    LIBRARY.use(LIBRARY.instruction_set.encode())


def tokens(count: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, k, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, "channel"), (3, 20), (8, "tensor"), (8, 40), (5, 4)])
def test_float_activations(instruction_set: str, bits: int, group_size: int | str, dtype: torch.dtype) -> None:
    """Every number of tokens up to a tile and a half, a chunk and a bit, and rows that are no multiple of 32."""
    for symmetric, bias in ((True, False), (False, True)):
        scheme = W4.with_weight(bits=bits, group_size=group_size, symmetric=symmetric)
        layer = layer_of(scheme, 37, 320 if group_size != 20 else 60, bias=bias)
        for count in (1, 2, 3, 4, 5, 8, 9, 12, 13, 18, 200):
            x = tokens(count, layer.in_features, dtype)
            got = run(NATIVE, layer, x)
            assert got.dtype == dtype
            assert relative_error(got, exact_output(layer, x)) < DTYPES[dtype], (symmetric, count)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_are_multiplied_exactly(instruction_set: str, scheme: str) -> None:
    for n, k in ((1, 8), (33, 64), (7, 320)):
        layer = with_powers_of_two(layer_of(SCHEMES[scheme], n, k))
        for count in (1, 3, 8, 12, 13, 31):
            # An absmax of 127 a token makes its dynamic scale 1
            x = torch.randint(-127, 128, (count, k), generator=torch.Generator().manual_seed(1)).float()
            x[:, 0] = 127.0
            wanted = integer_output(layer, x).astype(np.float32)
            assert np.array_equal(run(NATIVE_INT8, layer, x).numpy(), wanted), (n, k, count)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_products_do_not_saturate(instruction_set: str, bits: int) -> None:
    scheme = PRESETS["w8a8"].with_weight(bits=bits)
    for sign in (1.0, -1.0):
        weight = quantize_weight(torch.full((32, 4096), sign), scheme.weight, scale_dtype=torch.float32)
        layer = from_quantized(weight, scheme, None, dtype=torch.float32)
        x = torch.full((3, 4096), 127.0)
        assert relative_error(run(NATIVE_INT8, layer, x), x.double() @ layer.dequantize().double().T) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_rounded_as_numerics_does(instruction_set: str, dtype: torch.dtype) -> None:
    """An identity as weight gives the codes and scales themselves."""
    k = 96
    scheme = PRESETS["w8a8"]
    identity = quantize_weight(torch.eye(k) * 127, scheme.weight, scale_dtype=torch.float32)
    layer = from_quantized(identity, scheme, None, dtype=torch.float32)
    assert scheme.activation is not None
    x = torch.cat([tokens(40, k), tokens(8, k) * 1e-30, tokens(8, k) * 1e4, torch.zeros(1, k)]).to(dtype)
    codes, scale, _ = quantize_tokens(x, scheme.activation)
    wanted = (codes.float() * 127 * scale).to(dtype)
    got = run(NATIVE_INT8, layer, x)
    if dtype == torch.float32:
        assert torch.equal((got / scale / 127).round(), codes.float())
    finite = torch.isfinite(wanted)
    assert torch.allclose(got[finite].double(), wanted[finite].double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-37)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 70),
    count=st.integers(1, 30),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    integer=st.booleans(),
    which=st.sampled_from(SETS),
    seed=st.integers(0, 100),
)
def test_any_shape(n, groups, group_size, count, bits, symmetric, integer, which, seed) -> None:
    preset = PRESETS["w8a8"] if integer else W4
    scheme = preset.with_weight(bits=bits, group_size=group_size, symmetric=symmetric)
    layer = layer_of(scheme, n, groups * group_size, bias=seed % 2 == 0, seed=seed)
    x = tokens(count, layer.in_features)
    LIBRARY.use(which.encode())
    got = run(NATIVE_INT8 if integer else NATIVE, layer, x)
    LIBRARY.use(LIBRARY.instruction_set.encode())
    wanted = torch.as_tensor(integer_output(layer, x)) if integer else exact_output(layer, x)
    assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("preset", ["w4a16", "w8a16", "w8a8", "w4a8"])
def test_strides_one_row_and_one_column(instruction_set: str, preset: str) -> None:
    kernel = NATIVE_INT8 if preset.endswith("a8") else NATIVE
    scheme = PRESETS[preset].with_weight(group_size=32) if "w4" in preset else PRESETS[preset]
    layer = layer_of(scheme, 40, 64)
    x = tokens(64, 16).T
    assert torch.equal(run(kernel, layer, x), run(kernel, layer, x.contiguous()))
    wide = tokens(9, 200)
    assert torch.equal(run(kernel, layer, wide[:, 3:67]), run(kernel, layer, wide[:, 3:67].contiguous()))
    assert torch.equal(run(kernel, layer, wide[:1, :64].expand(5, 64)), run(kernel, layer, wide[:1, :64].repeat(5, 1)))
    one = layer_of(PRESETS[preset].with_weight(group_size="channel"), 1, 1)
    assert run(kernel, one, torch.ones(1, 1)).shape == (1, 1)


@pytest.mark.parametrize("preset", ["w4a16", "w8a8"])
def test_a_bias_of_any_dtype_and_stride(preset: str) -> None:
    layer, x = layer_of(PRESETS[preset], 40, 128), tokens(3, 128)
    plain = layer(x)
    assert layer.bias is not None
    for bias in (layer.bias.double(), layer.bias.detach().repeat_interleave(2)[::2], layer.bias.half().float()):
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        assert torch.allclose(layer(x), plain, atol=2e-3)
    assert not torch.equal(layer(x), plain), "the last one was rounded"


def test_values_that_are_not_finite_stay_in_their_token(instruction_set: str) -> None:
    for scheme, kernel in ((W4.with_weight(group_size=32, symmetric=False), NATIVE), (PRESETS["w8a8"], NATIVE_INT8)):
        layer = layer_of(scheme, 40, 64)
        for bad, count in itertools.product((math.nan, math.inf, -math.inf), (2, 30)):
            for dtype in DTYPES:
                x = tokens(count, 64, dtype)
                clean = run(kernel, layer, x)
                x[1, 5] = bad
                got = run(kernel, layer, x)
                assert not torch.isfinite(got[1]).any()
                assert torch.equal(got[[0, *range(2, count)]], clean[[0, *range(2, count)]])


def test_huge_and_tiny_scales(instruction_set: str) -> None:
    for factor in (1e-30, 1e30):
        layer = layer_of(W4.with_weight(group_size=32, symmetric=False), 33, 64, bias=False)
        state = layer.state_dict()
        layer.load_state_dict(state | {"weight_scale": state["weight_scale"] * factor})
        x = tokens(3, 64)
        assert relative_error(run(NATIVE, layer, x), exact_output(layer, x)) < 1e-6


def test_results_do_not_depend_on_threads() -> None:
    layers: list[tuple[QuantLinear, object]] = [
        (layer_of(PRESETS["w4a16"], 500, 1024), NATIVE),
        (layer_of(PRESETS["w8a8"], 500, 1024), NATIVE_INT8),
    ]
    before = torch.get_num_threads()
    for layer, _ in layers:
        for count in (1, 40):
            x = tokens(count, 1024)
            try:
                answers = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    answers.append(layer(x))
            finally:
                torch.set_num_threads(before)
            assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_calls_from_several_threads_at_once() -> None:
    layer = layer_of(PRESETS["w4a16"], 300, 1024)
    inputs = [tokens(count, 1024) for count in range(1, 25)]
    wanted = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for got, right in zip(pool.map(layer, inputs), wanted, strict=True):
                assert torch.equal(got, right)


def test_a_layout_with_a_mistake_is_noticed() -> None:
    layer = layer_of(W4.with_weight(group_size=32, symmetric=False), 40, 64)
    x, asked, stored = tokens(3, 64), layer.query(torch.float32), layer.stored()
    for which in (1, 2, 3):
        prepared = NATIVE.prepare(stored, asked)
        assert relative_error(NATIVE.run(x, stored, prepared, asked), exact_output(layer, x)) < 1e-6
        prepared[which].copy_(prepared[which].clone().flip(1))
        assert relative_error(NATIVE.run(x, stored, prepared, asked), exact_output(layer, x)) > 1e-3


def test_native_is_preferred_and_says_what_it_does_not_do() -> None:
    assert select_kernel(query(PRESETS["w4a16"])) is NATIVE
    assert select_kernel(query(PRESETS["w4a8"])) is NATIVE_INT8
    assert "not on cuda" in str(NATIVE.why_not(query(W4, device="cuda")))
    assert "not torch.float64" in str(NATIVE.why_not(query(W4, dtype=torch.float64)))
    assert "weight-only" in str(NATIVE.why_not(query(PRESETS["w8a8"])))
    assert "weight-only" in str(NATIVE_INT8.why_not(query(W4)))
    assert "zero point per token" in str(NATIVE_INT8.why_not(query(REFERENCE_ONLY_SCHEMES["asym_token"])))
    assert "overflow" in str(NATIVE_INT8.why_not(query(PRESETS["w8a8"], in_features=70_000)))


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("vlaquant.kernels.native.library.__file__", str(tmp_path / "library.py"))
    find_library.cache_clear()
    try:
        assert "install a C compiler" in str(find_library())
        (tmp_path / LIBRARY.path.name).write_bytes(b"not a library")
        find_library.cache_clear()
        assert "does not load" in str(find_library())
    finally:
        find_library.cache_clear()


def test_the_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for name in SETS:
            monkeypatch.setenv("VLAQUANT_ISA", name)
            assert open_library(LIBRARY.path).instruction_set == name
        monkeypatch.setenv("VLAQUANT_ISA", "z80")
        with pytest.raises(VlaquantError, match=rf"VLAQUANT_ISA='z80' is none of {SETS[0]}, .*{SETS[-1]}, which run"):
            open_library(LIBRARY.path)
    finally:
        LIBRARY.use(LIBRARY.instruction_set.encode())
