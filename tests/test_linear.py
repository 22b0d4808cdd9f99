"""Packed layers in use: what a user of ``nn.Linear`` expects, and what ``weight`` answers."""

import copy
import pickle
import shutil
from typing import Any

import pytest
import torch
from tiny_layers import SCHEMES, K, N, every_scheme, layer_of, quantized, relative_error, tokens
from torch import Tensor, nn
from torch.nn import functional

from vlaquant.errors import PackedWeightError
from vlaquant.kernels import explain, select_kernel
from vlaquant.linear import QuantLinear


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_what_its_float_weight_would(name: str, dtype: torch.dtype) -> None:
    x = tokens(5, dtype=dtype)
    for bias in (True, False):
        layer = layer_of(name, bias=bias, dtype=dtype)
        assert (layer.bias is not None) == bias
        added = 0.0 if layer.bias is None else layer.bias.double()
        wanted = x.double() @ layer.dequantize().double().T + added
        got = layer(x)
        assert got.dtype == dtype
        # Activations of 8 bits cost about 1 %; narrow floats cost their rounding
        assert relative_error(got, wanted) < (0.02 if layer.scheme.activation else 3 * torch.finfo(dtype).eps)


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
def test_any_float_dtype_and_no_tokens(name: str) -> None:
    layer = layer_of(name, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        got = layer(tokens(3, dtype=dtype))
        assert got.dtype == dtype
        assert relative_error(got, layer(tokens(3))) < 0.02
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
    assert relative_error(layer(x.bfloat16()), wanted) < 0.02
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
    assert relative_error(x.grad, wanted) < 1e-6
    _, pull_back = torch.func.vjp(layer, x.detach())  # type: ignore[misc]
    assert relative_error(pull_back(torch.ones(2, 3, N))[0], torch.ones(2, 3, N) @ layer.dequantize()) < 1e-6
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


def read_dtype(layer: QuantLinear, x: Tensor) -> Tensor:
    """As policies do: cast the activation to whatever the weight is."""
    return layer(x.to(layer.weight.dtype))


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
    kernel = select_kernel(layer.query()).name
    if kernel == "int4pack":
        assert layer.resident_bytes == stored + N * K // 2 + 2 * N * 2 * 2
    elif kernel == "native":  # in place of the codes; rows in blocks of 32, a scale a group, and a struct
        rows = -(-N // 32) * 32
        assert layer.resident_bytes == stored - N * K // 2 + rows * K // 2 + rows * 2 * 4 + 80
    layer.release_()
    assert layer.resident_bytes == stored


def test_repr_names_scheme_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("w4_group", dtype=torch.bfloat16)
    kernel = select_kernel(layer.query()).name
    assert repr(layer) == f"W4A16Linear(in_features=64, out_features=48, bias=True, scheme=w4a16_g32, kernel={kernel})"
    monkeypatch.setenv("VLAQUANT_KERNEL", "reference")
    assert "bias=False, scheme=w8a8, kernel=reference" in repr(layer_of("w8a8", bias=False))
    assert explain(layer.query())[-1] == ("reference", None)


def test_an_exchanged_bias_is_used() -> None:
    layer, x = layer_of("w4_group"), tokens(2)
    before = layer(x)
    layer.bias = torch.nn.Parameter(torch.ones(N), requires_grad=False)
    after = layer(x)
    layer.bias = None
    assert not torch.allclose(before, after)
    assert torch.allclose(after, layer(x) + 1.0, atol=1e-6)


@every_scheme
def test_codes_that_a_layout_holds_are_in_the_state(name: str) -> None:
    layer = layer_of(name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    float_weight = layer.dequantize()
    wanted = layer(tokens(2))
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):  # float64 has the reference kernel only
        layer(tokens(2, dtype=dtype))
        assert torch.equal(layer.dequantize(), float_weight)
    assert torch.equal(layer(tokens(2)), wanted)
    assert torch.equal(copy.deepcopy(layer)(tokens(2)), wanted)
    with torch.inference_mode():
        layer(tokens(2))
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) and not after[key].is_inference() for key, tensor in before.items())
    layer.load_state_dict(before)
    assert torch.equal(layer(tokens(2)), wanted)
