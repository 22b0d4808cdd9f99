"""Packed layers: what a user of ``nn.Linear`` expects, what ``weight`` answers, and the real reader of the format."""

import copy
import pickle
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaquant.errors import PackedWeightError, PlanError
from vlaquant.kernels import explain, select_kernel
from vlaquant.linear import (
    QuantLinear,
    W4A16Linear,
    W8A8Linear,
    empty_linear,
    from_quantized,
    is_replaceable,
    replace_module_,
)
from vlaquant.numerics import QuantizedWeight, quantize_weight
from vlaquant.scheme import PRESETS, Granularity, Scheme

GROUPED = PRESETS["w4a16"].with_weight(group_size=32)
SCHEMES: dict[str, Scheme] = {
    "w4_group": GROUPED,
    "w4_group_asym": GROUPED.with_weight(symmetric=False),
    "w3_channel_asym": PRESETS["w3a16"].with_weight(group_size="channel", symmetric=False),
    "w8_tensor": PRESETS["w8a16"].with_weight(group_size="tensor"),
    "w5_tensor_asym": PRESETS["w8a16"].with_weight(bits=5, group_size="tensor", symmetric=False),
    "w8a8": PRESETS["w8a8"],
    "w8a8_tensor": PRESETS["w8a8"].with_weight(group_size="tensor"),
    "w8a8_asym": PRESETS["w8a8"].with_weight(symmetric=False),
    "w8a8_static": PRESETS["w8a8_static"],
    "w4a8": PRESETS["w4a8"].with_weight(group_size=32),
}
N, K = 48, 64


def quantized(scheme: Scheme, n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.1
    return quantize_weight(weight, scheme.weight, scale_dtype=dtype)


def layer_of(name: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantLinear:
    scheme = SCHEMES[name]
    static: dict[str, Tensor] = {}
    if name == "w8a8_static":
        static = {"input_scale": torch.tensor(0.03), "input_zero": torch.tensor(11.0)}
    bias_values = torch.randn(N, generator=torch.Generator().manual_seed(1)) if bias else None
    return from_quantized(quantized(scheme, dtype=dtype), scheme, bias_values, dtype=dtype, **static)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2)).to(dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


every_scheme = pytest.mark.parametrize("name", SCHEMES)


@every_scheme
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_what_its_float_weight_would(name: str, bias: bool, dtype: torch.dtype) -> None:  # noqa: FBT001
    layer = layer_of(name, bias=bias, dtype=dtype)
    x = tokens(5, dtype=dtype)
    wanted = functional.linear(x.double(), layer.dequantize().double(), None if not bias else layer.bias.double())  # type: ignore[union-attr]
    got = layer(x)
    assert got.dtype == dtype
    # Activations of 8 bits cost about 1 %; narrow floats cost their rounding
    assert error(got, wanted) < (0.02 if layer.scheme.activation else 3 * torch.finfo(dtype).eps)


@every_scheme
def test_dequantize_is_the_quantized_weight(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wanted = quantized(SCHEMES[name], dtype=dtype).dequantize(dtype)
        assert torch.equal(layer_of(name, dtype=dtype).dequantize(), wanted)


@every_scheme
def test_any_leading_shape(name: str) -> None:
    layer = layer_of(name)
    x = tokens(2, 3, 4)
    wanted = layer(x.reshape(-1, K))
    views = {
        "blocks": (x, wanted.reshape(2, 3, 4, N)),
        "one token": (x[0, 0, 0], wanted[0]),
        "transposed": (x.transpose(0, 1), wanted.reshape(2, 3, 4, N).transpose(0, 1)),
        "strided": (x[:, ::2], wanted.reshape(2, 3, 4, N)[:, ::2]),
        "expanded": (x[0, 0, 0].expand(3, K), wanted[0].expand(3, N)),
    }
    for view, (given, output) in views.items():
        assert layer(given).shape == output.shape, view
        assert torch.allclose(layer(given), output, rtol=1e-5, atol=1e-6), view


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_and_no_tokens(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name, dtype=torch.bfloat16)
    got = layer(tokens(3, dtype=dtype))
    assert got.dtype == dtype
    assert error(got, layer(tokens(3))) < 0.02
    for shape in [(0,), (2, 0)]:
        empty = layer(torch.empty(*shape, K, dtype=dtype))
        assert empty.shape == (*shape, N)
        assert empty.dtype == dtype


def test_a_wrong_input_is_refused() -> None:
    layer = layer_of("w4_group")
    with pytest.raises(ValueError, match=r"in_features=64.*got an input of shape \(3, 63\), wanted \[\.\.\., 64\]"):
        layer(torch.zeros(3, 63))
    with pytest.raises(ValueError, match="got an input of shape"):
        layer(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"torch\.int64, wanted a floating point dtype"):
        layer(torch.zeros(3, 64, dtype=torch.int64))


BUFFERS: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "w4_group": {
        "weight_packed": (torch.int32, (48, 8)),
        "weight_scale": (torch.bfloat16, (48, 2)),
        "weight_shape": (torch.int64, (2,)),
    },
    "w3_channel_asym": {
        "weight_packed": (torch.int32, (48, 6)),
        "weight_scale": (torch.bfloat16, (48, 1)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (5, 1)),
    },
    "w5_tensor_asym": {
        "weight_packed": (torch.int32, (48, 10)),
        "weight_scale": (torch.bfloat16, (1,)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int8, (1,)),
    },
    "w8a8": {"weight": (torch.int8, (48, 64)), "weight_scale": (torch.bfloat16, (48, 1))},
    "w8a8_tensor": {"weight": (torch.int8, (48, 64)), "weight_scale": (torch.bfloat16, (1,))},
    "w8a8_asym": {
        "weight": (torch.int8, (48, 64)),
        "weight_scale": (torch.bfloat16, (48, 1)),
        "weight_zero_point": (torch.int8, (48, 1)),
    },
    "w8a8_static": {
        "weight": (torch.int8, (48, 64)),
        "weight_scale": (torch.bfloat16, (48, 1)),
        "input_scale": (torch.bfloat16, (1,)),
        "input_zero_point": (torch.int8, (1,)),
    },
    "w4a8": {"weight": (torch.int8, (48, 64)), "weight_scale": (torch.bfloat16, (48, 2))},
}


@pytest.mark.parametrize("name", BUFFERS)
def test_the_state_dict_is_the_format(name: str) -> None:
    wanted = {**BUFFERS[name], "bias": (torch.bfloat16, (48,))}
    layer = layer_of(name, dtype=torch.bfloat16)
    empty = empty_linear(K, N, SCHEMES[name], bias=True, dtype=torch.bfloat16)
    for module in (layer, empty):
        assert {key: (value.dtype, tuple(value.shape)) for key, value in module.state_dict().items()} == wanted
    assert all(value.is_contiguous() for value in layer.state_dict().values())
    assert type(layer) is (W8A8Linear if SCHEMES[name].activation else W4A16Linear)


@every_scheme
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_state_dict_round_trip(name: str, assign: bool) -> None:  # noqa: FBT001
    layer = layer_of(name)
    x = tokens(3)
    wanted = layer(x)
    with torch.device("meta" if assign else "cpu"):
        other = empty_linear(K, N, SCHEMES[name], bias=True, dtype=torch.float32)
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(other(x), wanted)
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_a_state_dict_of_another_width_is_refused() -> None:
    """63 and 64 columns of 4 bits take as many words, so only ``weight_shape`` can tell."""
    channel = PRESETS["w4a16"].with_weight(group_size="channel")
    narrow = from_quantized(quantized(channel, k=63), channel, None, dtype=torch.float32)
    wide = from_quantized(quantized(channel, k=64), channel, None, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"weight_shape is \[48, 63\] in the checkpoint, wanted \[48, 64\]"):
        wide.load_state_dict(narrow.state_dict())


def test_loading_other_values_drops_the_kernel_layout() -> None:
    dtype = torch.bfloat16
    for name in ("w4_group", "w8a8"):
        layer, x = layer_of(name, dtype=dtype), tokens(3, dtype=dtype)
        before = layer(x)
        other = from_quantized(
            quantize_weight(torch.randn(N, K), SCHEMES[name].weight, scale_dtype=dtype),
            SCHEMES[name],
            torch.zeros(N),
            dtype=dtype,
        )
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        assert not torch.equal(layer(x), before)


@every_scheme
def test_copies_and_pickles(name: str) -> None:
    layer, x = layer_of(name, dtype=torch.bfloat16), tokens(3, dtype=torch.bfloat16)
    wanted = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), wanted)
        assert other.weight_scale.data_ptr() != layer.weight_scale.data_ptr()


@every_scheme
def test_to_another_dtype_keeps_the_codes(name: str) -> None:
    layer, x = layer_of(name), tokens(3)
    codes = {key: value for key, value in layer.state_dict().items() if not value.is_floating_point()}
    wanted = layer(x)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.weight_scale.dtype == torch.bfloat16
    assert error(layer(x.bfloat16()), wanted) < 0.02
    for key, value in codes.items():
        assert torch.equal(layer.state_dict()[key], value)
    assert layer.half().dequantize().dtype == torch.float16


@every_scheme
def test_to_meta(name: str) -> None:
    layer = layer_of(name)
    layer(tokens(2))
    layer.to("meta")
    assert layer.weight.device.type == "meta"
    assert layer(tokens(2).to("meta")).shape == (2, N)
    assert select_kernel(layer.query()).name == "reference"


def test_autocast_works_as_for_a_float_layer() -> None:
    for name in ("w4_group", "w8a8"):
        layer = layer_of(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(tokens(2)).dtype == nn.Linear(K, N)(tokens(2)).dtype == torch.bfloat16
        assert layer(tokens(2)).dtype == torch.float32


@every_scheme
def test_the_gradient_is_that_of_the_float_layer(name: str) -> None:
    layer = layer_of(name)
    x = tokens(2, 3).requires_grad_()
    (layer(x) ** 2).sum().backward()
    wanted = (2 * layer(x.detach())) @ layer.dequantize()
    assert x.grad is not None
    assert error(x.grad, wanted) < 1e-6
    _, pull_back = torch.func.vjp(layer, x.detach())  # type: ignore[misc]
    assert error(pull_back(torch.ones(2, 3, N))[0], torch.ones(2, 3, N) @ layer.dequantize()) < 1e-6
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("name", ["w4_group", "w3_channel_asym", "w8a8", "w8a8_static"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_torch_compile(name: str, warm: bool) -> None:  # noqa: FBT001
    torch.compiler.reset()
    layer, x = layer_of(name, dtype=torch.bfloat16), tokens(3, dtype=torch.bfloat16)
    network = nn.Sequential(nn.LayerNorm(K, dtype=torch.bfloat16), layer, nn.Tanh())
    with torch.no_grad():
        wanted = network(x)
        if not warm:
            layer.release_()
        compiled = torch.compile(network, backend="aot_eager", fullgraph=warm)
        assert all(torch.equal(compiled(x), wanted) for _ in range(3))
        assert torch.equal(compiled(x[:2]), network(x[:2]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend of torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["w4_group", "w8a8"])
def test_torch_compile_with_its_default_backend(name: str) -> None:
    """It has rules of its own for some of the operators that kernels call."""
    torch.compiler.reset()
    layer, x = layer_of(name, dtype=torch.bfloat16), tokens(3, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = layer(x)
        assert torch.allclose(torch.compile(layer, fullgraph=True)(x), wanted, rtol=2**-7, atol=1e-3)


def read_dtype(layer: nn.Module, x: Tensor) -> Tensor:
    """As policies do: cast the activation to whatever the weight is."""
    return layer(x.to(layer.weight.dtype))  # type: ignore[no-any-return, arg-type]


def test_torch_compile_reads_the_dtype_of_the_weight() -> None:
    torch.compiler.reset()
    layer = layer_of("w4_group", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = read_dtype(layer, tokens(3))
        assert torch.equal(torch.compile(read_dtype, backend="eager", fullgraph=True)(layer, tokens(3)), wanted)


def test_torch_compile_cannot_compute_with_the_weight_either() -> None:
    torch.compiler.reset()
    for compute in (lambda w, x: functional.linear(x, w), lambda w, x: x @ w.T, lambda w, x: x.T[:N] + w):
        compiled = torch.compile(lambda layer, x, compute=compute: compute(layer.weight, x), backend="eager")
        with pytest.raises(PackedWeightError):
            compiled(layer_of("w4_group"), tokens(K))
    sizes = torch.compile(lambda layer: layer.weight.size(0) + layer.weight.numel(), backend="eager")
    assert sizes(layer_of("w4_group")) == N + N * K


@pytest.mark.parametrize("name", ["w4_group", "w8a8"])
def test_weight_answers_as_the_float_weight(name: str) -> None:
    layer = layer_of(name, dtype=torch.bfloat16)
    weight, wanted = layer.weight, nn.Linear(K, N, dtype=torch.bfloat16).weight
    for attribute in ("dtype", "device", "shape", "ndim", "itemsize", "nbytes", "is_cuda", "is_meta", "layout"):
        assert getattr(weight, attribute) == getattr(wanted, attribute), attribute
    for method in ("size", "numel", "dim", "is_floating_point", "element_size", "stride", "is_contiguous", "__len__"):
        assert getattr(weight, method)() == getattr(wanted, method)(), method
    assert weight.size(0) == N
    assert not weight.requires_grad
    assert isinstance(weight, Tensor)
    assert repr(weight) == str(weight) == "PackedWeight(shape=(48, 64), dtype=torch.bfloat16, device=cpu)"
    assert torch.zeros(2).to(weight).dtype == torch.bfloat16


COMPUTATIONS: dict[str, Any] = {
    "linear": lambda w: functional.linear(torch.zeros(1, K), w),
    "matmul": lambda w: torch.zeros(1, N) @ w,
    "add": lambda w: w + 1,
    "add from the left": lambda w: 1 + w,
    "equal": lambda w: torch.equal(w, w),
    "comparison": lambda w: w == 0,
    "cast": lambda w: w.to(torch.float64),
    "float": lambda w: w.float(),
    "transpose": lambda w: w.T,
    "index": lambda w: w[0],
    "iterate": list,
    "norm": lambda w: w.norm(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "set data": lambda w: setattr(w, "data", torch.zeros(N, K)),
    "clone": lambda w: w.clone(),
    "copy_": lambda w: w.copy_(torch.zeros(N, K)),
    "init": nn.init.normal_,
    "parameter": lambda w: nn.Parameter(w, requires_grad=False),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "numpy": lambda w: w.numpy(),
    "tolist": lambda w: w.tolist(),
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "share_memory_": lambda w: w.share_memory_(),
}


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("name", ["w4_group", "w8a8"])
def test_weight_cannot_be_computed_with(name: str, computation: str) -> None:
    with pytest.raises(PackedWeightError, match=r"was called with the weight of a packed linear.*dequantize\(\)"):
        COMPUTATIONS[computation](layer_of(name, dtype=torch.bfloat16).weight)


def test_weight_cannot_be_replaced_by_a_float_one() -> None:
    for name in ("w4_group", "w8a8"):
        layer = layer_of(name)
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = nn.Parameter(torch.zeros(N, K))  # type: ignore[misc, assignment]


@every_scheme
def test_another_default_device_does_no_harm(name: str) -> None:
    layer, x = layer_of(name, dtype=torch.bfloat16), tokens(2, dtype=torch.bfloat16)
    with torch.device("meta"):
        got = layer(x)
    assert torch.equal(got, layer(x))


def test_resident_bytes_count_what_kernels_made() -> None:
    layer = layer_of("w4_group", dtype=torch.bfloat16)
    stored = N * K // 2 + N * 2 * 2 + 2 * 8 + N * 2
    assert layer.resident_bytes == stored
    layer(tokens(2, dtype=torch.bfloat16))
    if select_kernel(layer.query()).name == "int4pack":
        assert layer.resident_bytes == stored + N * K // 2 + 2 * N * 2 * 2
    layer.release_()
    assert layer.resident_bytes == stored


def test_repr_names_scheme_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("w4_group", dtype=torch.bfloat16)
    kernel = select_kernel(layer.query()).name
    assert repr(layer) == f"W4A16Linear(in_features=64, out_features=48, bias=True, scheme=w4a16_g32, kernel={kernel})"
    monkeypatch.setenv("VLAQUANT_KERNEL", "reference")
    assert "bias=False, scheme=w8a8, kernel=reference" in repr(layer_of("w8a8", bias=False))
    assert explain(layer.query())[-1] == ("reference", None)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(PlanError, match="in_features=960 is not a multiple of group_size=128"):
        empty_linear(960, 32, PRESETS["w4a16"], bias=False, dtype=torch.float32)


def test_codes_need_their_own_scale() -> None:
    with pytest.raises(AssertionError):
        from_quantized(quantized(GROUPED, dtype=torch.bfloat16), GROUPED, None, dtype=torch.float32)
    with pytest.raises(AssertionError):
        from_quantized(quantized(GROUPED), PRESETS["w4a16"], None, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="input_scale"):
        from_quantized(quantized(PRESETS["w8a8_static"]), PRESETS["w8a8_static"], None, dtype=torch.float32)


class Tied(nn.Module):
    """One Linear under two names, and all the kinds that must not be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, N)
        self.blocks = nn.ModuleList([nn.ModuleDict({"again": self.first}), nn.Linear(K, N)])
        self.attention = nn.MultiheadAttention(K, 2)
        self.encoder = nn.TransformerEncoderLayer(K, 2)
        self.bilinear = nn.Bilinear(K, K, N)
        self.normed = nn.Linear(K, N)
        self.lazy = nn.utils.parametrizations.weight_norm(nn.Linear(K, N))


def test_replace_module_everywhere_it_stands() -> None:
    root = Tied().eval()
    layer = layer_of("w4_group")
    replace_module_(root, "blocks.0.again", layer)
    assert root.first is root.get_submodule("blocks.0.again") is layer
    assert not layer.training
    replace_module_(root, "blocks.1", layer_of("w8a8"))
    assert isinstance(root.blocks[1], W8A8Linear)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("attention.out_proj", "is a NonDynamicallyQuantizableLinear, and only exactly nn.Linear"),
        ("encoder.linear1", "belongs to a TransformerEncoderLayer"),
        ("bilinear", "is a Bilinear"),
        ("lazy", "is a ParametrizedLinear"),
        ("", "is a Tied"),
    ],
)
def test_what_cannot_be_replaced(name: str, reason: str) -> None:
    root = Tied()
    assert reason in str(is_replaceable(root, name))
    with pytest.raises(PlanError, match=f"{name or 'the model'} cannot be replaced: it {reason}"):
        replace_module_(root, name, layer_of("w8a8"))


def test_what_else_cannot_be_replaced() -> None:
    root = Tied()
    assert is_replaceable(root, "first") is None
    with pytest.raises(PlanError, match=r"blocks\.7 cannot be replaced: Tied has no such module"):
        replace_module_(root, "blocks.7", layer_of("w8a8"))
    root.attention.inside = root.first
    assert "belongs to a MultiheadAttention" in str(is_replaceable(root, "first"))
    assert "whole model" in str(is_replaceable(nn.Linear(2, 2), ""))
    del root.normed.weight
    assert "computes its weight" in str(is_replaceable(root, "normed"))


def quantization_arguments(spec: Any) -> dict[str, Any]:
    if spec is None:
        return {}
    group = {"group_size": spec.group_size} if spec.granularity is Granularity.GROUP else {}
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity.value,
        "dynamic": spec.dynamic,
        **group,
    }


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compressed_tensors_reads_the_same_weight(name: str, dtype: torch.dtype) -> None:
    """The package that owns the format decompresses our buffers to our ``dequantize()``, bit for bit."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = SCHEMES[name]
    theirs = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**quantization_arguments(scheme.weight)),
        input_activations=quantization.QuantizationArgs(**quantization_arguments(scheme.activation))
        if scheme.activation
        else None,
    )
    layer = layer_of(name, dtype=dtype)
    kind = "pack-quantized" if scheme.activation is None else "int-quantized"
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    decompressed = compressor.decompress(dict(layer.state_dict()), theirs)["weight"]
    assert decompressed.dtype == dtype
    assert torch.equal(decompressed, layer.dequantize())
    tensors = {key for key in layer.state_dict() if key.startswith("weight")}
    assert tensors == set(compressor.compression_param_names(theirs))


@every_scheme
def test_the_real_reader_notices_other_codes(name: str) -> None:
    """The comparison above can fail: one changed code shows."""
    layer = layer_of(name)
    before = layer.dequantize()
    state = layer.state_dict()
    key = "weight_packed" if "weight_packed" in state else "weight"
    state[key] = state[key].clone()
    state[key][0, 0] ^= 1
    layer.load_state_dict(state)
    assert (layer.dequantize() != before).sum() == 1
