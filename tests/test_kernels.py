"""Every kernel against the reference, the reference against integers, and the reasons for the choice."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from vlaquant import kernels
from vlaquant.errors import VlaquantError
from vlaquant.kernels import KERNELS, Kernel, Query, Stored, explain, quantize_input, select_kernel, torch_cpu, unpack
from vlaquant.kernels.reference import REFERENCE
from vlaquant.kernels.torch_cpu import INT4PACK, ONEDNN_INT8
from vlaquant.linear import QuantLinear, from_quantized
from vlaquant.numerics import QuantizedWeight, quantize_weight
from vlaquant.scheme import PRESETS, Granularity, QuantSpec, Scheme

W4A16_G32 = PRESETS["w4a16"].with_weight(group_size=32)


def layer_of(
    scheme: Scheme, n: int, k: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> QuantLinear:
    """A layer with random weight and scales of both signs; static activations get an off-centre range."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 0.05 + 0.01
    quantized = quantize_weight(weight, scheme.weight, scale_dtype=dtype)
    if scheme.weight.symmetric:
        quantized.scale[::3] *= -1.0
    activation = scheme.activation
    static = activation is not None and not activation.dynamic
    return from_quantized(
        quantized,
        scheme,
        torch.randn(n, generator=generator) if bias else None,
        dtype=dtype,
        input_scale=torch.tensor(0.03) if static else None,
        input_zero=torch.tensor(-20.0) if static and activation is not None and not activation.symmetric else None,
    )


def run(kernel: Kernel, layer: QuantLinear, x: Tensor) -> Tensor:
    query = layer.query(x.dtype)
    assert kernel.why_not(query) is None
    stored = layer.stored()
    return kernel.run(x, stored, kernel.prepare(stored, query), query)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def exact_output(layer: QuantLinear, x: Tensor) -> Tensor:
    """Weight-only: the product in float64, with nothing rounded on the way."""
    weight = unpack(layer.stored(), layer.query()).dequantize(torch.float64)
    y = x.double() @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


def integer_output(layer: QuantLinear, x: Tensor) -> np.ndarray:
    """Int8 activations: codes times codes in int64, one group after the other, scaled in float64."""
    activation = layer.scheme.activation
    assert activation is not None
    stored = layer.stored()
    weight = unpack(stored, layer.query())
    codes, scale, zero = (value.double().numpy() for value in quantize_input(x, stored, activation))
    shifted = codes.astype(np.int64) - zero.astype(np.int64)
    n, k = weight.codes.shape
    g = weight.scale.shape[1]
    w_zero = np.zeros((1, g), np.int64) if weight.zero is None else weight.zero.numpy().astype(np.int64)
    y = np.zeros((x.shape[0], n))
    for group in range(g):
        columns = slice(group * (k // g), (group + 1) * (k // g))
        w = weight.codes.numpy().astype(np.int64)[:, columns] - w_zero[:, [group]]
        y += (shifted[:, columns] @ w.T) * weight.scale.double().numpy()[:, group]
    y *= scale
    return y if layer.bias is None else y + layer.bias.double().numpy()


def with_powers_of_two(layer: QuantLinear) -> QuantLinear:
    """The same codes with scales that multiply without rounding, so that equality can be asked for."""
    state = layer.state_dict()
    for name in {"weight_scale", "input_scale"} & set(state):
        state[name] = state[name].sign() * torch.exp2(torch.log2(state[name].abs()).round())
    if "bias" in state:
        state["bias"] = state["bias"].round()
    layer.load_state_dict(state)
    return layer


INT8_SCHEMES = {
    "dynamic": PRESETS["w8a8"],
    "dynamic_tensor": PRESETS["w8a8"].with_weight(group_size="tensor"),
    "dynamic_w6": PRESETS["w8a8"].with_weight(bits=6),
    "static_asym": PRESETS["w8a8_static"],
    "static_sym": dataclasses.replace(
        PRESETS["w8a8_static"], name="static_sym", activation=QuantSpec(bits=8, granularity=Granularity.TENSOR)
    ),
}
REFERENCE_ONLY_SCHEMES = {
    "w4a8": PRESETS["w4a8"].with_weight(group_size=8),
    "asym_weight": PRESETS["w8a8"].with_weight(symmetric=False),
    "asym_group_static": PRESETS["w8a8_static"].with_weight(bits=5, group_size=8, symmetric=False),
    "asym_token": dataclasses.replace(
        PRESETS["w8a8"],
        name="asym_token",
        activation=QuantSpec(bits=8, granularity=Granularity.TOKEN, symmetric=False, dynamic=True),
    ),
}
SHAPES = [(1, 8), (16, 24), (33, 64), (7, 320)]

needs_onednn = pytest.mark.skipif(
    ONEDNN_INT8.why_not(Query(PRESETS["w8a8"], 32, 32, torch.float32, "cpu")) is not None,
    reason=str(ONEDNN_INT8.why_not(Query(PRESETS["w8a8"], 32, 32, torch.float32, "cpu"))),
)
needs_int4pack = pytest.mark.skipif(
    INT4PACK.why_not(Query(W4A16_G32, 32, 32, torch.bfloat16, "cpu")) is not None,
    reason=str(INT4PACK.why_not(Query(W4A16_G32, 32, 32, torch.bfloat16, "cpu"))),
)


@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_reference_is_the_float_layer(bits: int, group_size: int | str) -> None:
    x = torch.randn(3, 40)
    for symmetric in (True, False):
        layer = layer_of(PRESETS["w4a16"].with_weight(bits=bits, group_size=group_size, symmetric=symmetric), 11, 40)
        assert torch.equal(run(REFERENCE, layer, x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
        assert relative_error(run(REFERENCE, layer, x.double()), exact_output(layer, x)) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reference_answers_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(3, 32)
    for scheme, wanted in ((W4A16_G32, exact_output), (PRESETS["w8a8"], integer_output)):
        layer = layer_of(scheme, 16, 32)
        got = run(REFERENCE, layer, x.to(dtype))
        assert got.dtype == dtype
        assert relative_error(got, torch.as_tensor(wanted(layer, x.to(dtype)))) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("scheme", [*INT8_SCHEMES, *REFERENCE_ONLY_SCHEMES])
def test_int8_reference_is_exact(scheme: str, n: int, k: int) -> None:
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(1)) * 2
    for bias in (True, False):
        layer = layer_of((INT8_SCHEMES | REFERENCE_ONLY_SCHEMES)[scheme], n, k, bias=bias)
        assert np.allclose(run(REFERENCE, layer, x.double()).numpy(), integer_output(layer, x), rtol=1e-13, atol=1e-13)


@needs_onednn
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_onednn_multiplies_integers_exactly(scheme: str, n: int, k: int) -> None:
    layer = with_powers_of_two(layer_of(INT8_SCHEMES[scheme], n, k))
    for tokens in (1, 2, 17, 64):
        # An absmax of 127 a token makes its dynamic scale 1
        x = torch.randint(-127, 128, (tokens, k), generator=torch.Generator().manual_seed(1)).float()
        x[:, 0] = 127.0
        assert np.array_equal(run(ONEDNN_INT8, layer, x).double().numpy(), integer_output(layer, x)), tokens


@needs_onednn
@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_onednn_does_not_saturate(scheme: str) -> None:
    """The largest products all the way: an int16 in between would clip them."""
    layer = with_powers_of_two(layer_of(INT8_SCHEMES[scheme], 16, 256, bias=False))
    layer.load_state_dict({**layer.state_dict(), "weight": torch.full((16, 256), 127, dtype=torch.int8)})
    x = torch.full((3, 256), 127.0)
    assert np.array_equal(run(ONEDNN_INT8, layer, x).double().numpy(), integer_output(layer, x))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_onednn_is_the_reference(scheme: str, dtype: torch.dtype) -> None:
    x = (torch.randn(9, 130, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    x[4] = 0.0
    for bias in (True, False):
        layer = layer_of(INT8_SCHEMES[scheme], 33, 130, bias=bias, dtype=dtype)
        got, wanted = run(ONEDNN_INT8, layer, x), run(REFERENCE, layer, x)
        assert got.dtype == dtype
        assert torch.isfinite(got).all()
        assert relative_error(got, wanted) < max(1e-6, torch.finfo(dtype).eps)


@needs_int4pack
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("n", [16, 48, 112])
def test_int4pack_is_the_reference(n: int, group_size: int, symmetric: bool) -> None:  # noqa: FBT001
    scheme = PRESETS["w4a16"].with_weight(group_size=group_size, symmetric=symmetric)
    for groups, tokens in itertools.product([1, 3], [1, 3, 40]):
        layer = layer_of(scheme, n, group_size * groups, dtype=torch.bfloat16)
        x = torch.randn(tokens, group_size * groups, generator=torch.Generator().manual_seed(1)).bfloat16()
        got, wanted = run(INT4PACK, layer, x), exact_output(layer, x)
        assert got.dtype == torch.bfloat16
        # bfloat16 rounds the reference as well; the kernel may not be worse than that, give or take
        worst = max(1.5 * relative_error(run(REFERENCE, layer, x), wanted), 2**-8)
        assert relative_error(got, wanted) < worst, (groups, tokens)


@needs_int4pack
@needs_onednn
@pytest.mark.parametrize("broken", ["int4pack scale", "onednn zero", "onednn row"])
def test_a_wrong_layout_is_noticed(broken: str) -> None:
    """The comparisons above can fail: a layout with one mistake is far off."""
    kernel = INT4PACK if broken.startswith("int4pack") else ONEDNN_INT8
    dtype = torch.bfloat16 if kernel is INT4PACK else torch.float32
    scheme = W4A16_G32.with_weight(symmetric=False) if kernel is INT4PACK else PRESETS["w8a8_static"]
    layer = layer_of(scheme, 16, 64, dtype=dtype)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    query, stored = layer.query(dtype), layer.stored()
    prepared = list(kernel.prepare(stored, query))
    wanted = run(REFERENCE, layer, x)
    assert relative_error(kernel.run(x, stored, tuple(prepared), query), wanted) < 0.01
    if broken == "int4pack scale":
        prepared[1] = prepared[1].flip(0)
    elif broken == "onednn zero":
        prepared[3] = torch.full_like(prepared[3], 128)
    else:
        prepared[1] = prepared[1].roll(1)
    assert relative_error(kernel.run(x, stored, tuple(prepared), query), wanted) > 0.02


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_take_strided_inputs(kernel: Kernel) -> None:
    scheme, dtype = (PRESETS["w8a8"], torch.float32) if "int8" in kernel.name else (W4A16_G32, torch.bfloat16)
    layer = layer_of(scheme, 16, 32, dtype=dtype)
    if kernel.why_not(layer.query()) is not None:
        pytest.skip(str(kernel.why_not(layer.query())))
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(run(kernel, layer, x.T), run(kernel, layer, x.T.contiguous()))
    assert torch.equal(run(kernel, layer, x.T[::2]), run(kernel, layer, x.T)[::2])


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaquant.kernels.native.find_library", lambda: "was not built")


def query(scheme: Scheme, **changes: object) -> Query:
    usual = Query(scheme, in_features=256, out_features=64, dtype=torch.bfloat16, device="cpu")
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "scheme", "changes", "reason"),
    [
        (INT4PACK, PRESETS["w4a16"], {"dtype": torch.float32}, "fast with bfloat16 activations, not torch.float32"),
        (INT4PACK, PRESETS["w4a16"], {"dtype": torch.float16}, "fast with bfloat16 activations, not torch.float16"),
        (INT4PACK, PRESETS["w4a16"], {"device": "cuda"}, "runs on cpu, not on cuda"),
        (INT4PACK, PRESETS["w4a16"], {"out_features": 65}, "multiple of 16, not 65"),
        (INT4PACK, PRESETS["w4a16"].with_weight(group_size=16), {}, r"groups of \(32, 64, 128, 256\), not w4a16_g16"),
        (INT4PACK, PRESETS["w4a16"].with_weight(group_size="channel"), {}, "not w4a16_channel"),
        (INT4PACK, PRESETS["w3a16"], {}, "needs 4 bits"),
        (INT4PACK, PRESETS["w4a8"], {}, "weight-only"),
        (ONEDNN_INT8, PRESETS["w4a16"], {}, "needs int8 activations"),
        (ONEDNN_INT8, PRESETS["w8a8"], {"device": "cuda"}, "runs on cpu, not on cuda"),
        (ONEDNN_INT8, PRESETS["w8a8"], {"in_features": 70_000}, "could overflow int32 with in_features=70000"),
        (ONEDNN_INT8, PRESETS["w4a8"], {}, "not in groups of 128"),
        (ONEDNN_INT8, REFERENCE_ONLY_SCHEMES["asym_weight"], {}, "needs a symmetric weight"),
        (ONEDNN_INT8, REFERENCE_ONLY_SCHEMES["asym_token"], {}, "no zero point per token"),
    ],
)
def test_the_reason_is_told(kernel: Kernel, scheme: Scheme, changes: dict[str, object], reason: str) -> None:
    asked = query(scheme, **changes)
    assert select_kernel(asked) is not kernel
    assert re.search(reason, str(dict(explain(asked))[kernel.name]))


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize(
    ("probe", "value", "scheme", "reason"),
    [
        ("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT", "w4a16", "no vector code"),
        ("vlaquant.kernels.torch_cpu._has_vnni", lambda: False, "w8a8", "needs an x86 CPU with VNNI"),
        ("vlaquant.kernels.torch_cpu._sums_exactly", lambda: False, "w8a8", "saturates sums of products"),
    ],
)
def test_a_cpu_without_the_instructions(
    monkeypatch: pytest.MonkeyPatch, probe: str, value: object, scheme: str, reason: str
) -> None:
    monkeypatch.setattr(probe, value)
    asked = query(PRESETS[scheme])
    assert select_kernel(asked) is REFERENCE
    assert any(why is not None and reason in why for _, why in explain(asked))


@pytest.mark.usefixtures("without_native")
def test_an_older_torch_cannot_tell_about_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_cpu._has_vnni.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    try:
        assert select_kernel(query(PRESETS["w8a8"])) is REFERENCE
    finally:
        torch_cpu._has_vnni.cache_clear()


@needs_int4pack
@needs_onednn
@pytest.mark.usefixtures("without_native")
def test_the_fast_kernels_of_torch_are_chosen() -> None:
    assert dict(explain(query(PRESETS["w4a16"])))["native"] == "was not built"
    assert select_kernel(query(PRESETS["w4a16"])) is INT4PACK
    assert select_kernel(query(PRESETS["w8a8"], dtype=torch.float32)) is ONEDNN_INT8


def test_the_first_without_objection_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    never = dataclasses.replace(REFERENCE, name="never", why_not=lambda _: "never runs")
    monkeypatch.setattr(kernels, "KERNELS", (never, REFERENCE))
    assert select_kernel(query(PRESETS["w4a16"])) is REFERENCE
    assert explain(query(PRESETS["w4a16"])) == [("never", "never runs"), ("reference", None)]


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLAQUANT_KERNEL", "reference")
    for scheme in PRESETS.values():
        assert select_kernel(query(scheme)) is REFERENCE
        assert explain(query(scheme))[0] == (KERNELS[0].name, "VLAQUANT_KERNEL=reference is set")
    monkeypatch.setenv("VLAQUANT_KERNEL", "fastest")
    with pytest.raises(VlaquantError, match=r"VLAQUANT_KERNEL='fastest'.*'reference'"):
        select_kernel(query(PRESETS["w4a16"]))


def test_unpack_reads_every_layout() -> None:
    group_sizes: list[int | str] = [8, "channel", "tensor"]
    for bits, group_size, symmetric in itertools.product([3, 4, 8], group_sizes, [True, False]):
        for preset in ("w4a16", "w8a8"):
            scheme = PRESETS[preset].with_weight(bits=bits, group_size=group_size, symmetric=symmetric)
            weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(bits))
            quantized = quantize_weight(weight, scheme.weight, scale_dtype=torch.float32)
            layer = from_quantized(quantized, scheme, None, dtype=torch.float32)
            again = unpack(layer.stored(), layer.query())
            assert_same(again, quantized)


def assert_same(got: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert got.spec == wanted.spec
    assert torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.scale, wanted.scale)
    assert (got.zero is None) == (wanted.zero is None)
    assert got.zero is None or wanted.zero is None or torch.equal(got.zero, wanted.zero)


def test_a_static_scale_that_underflowed_gives_no_nan() -> None:
    layer = layer_of(PRESETS["w8a8_static"], 16, 32)
    stored: Stored = layer.stored()._replace(input_scale=torch.zeros(1))
    codes, scale, _ = quantize_input(torch.zeros(2, 32), stored, layer.scheme.activation)  # type: ignore[arg-type]
    assert torch.isfinite(scale).all()
    assert (codes == -20).all()
