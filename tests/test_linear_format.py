"""Packed layers in files: names, dtypes and shapes of the format, loading, and the real reader of the format."""

from typing import Any

import pytest
import torch
from tiny_layers import GROUPED, SCHEMES, K, N, every_scheme, layer_of, quantized, tokens
from torch import Tensor

from vlaquant.errors import PlanError
from vlaquant.linear import QuantLinear, W4A16Linear, W8A8Linear, empty_linear, from_quantized
from vlaquant.numerics import quantize_weight
from vlaquant.scheme import PRESETS, Granularity, QuantSpec

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


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(PlanError, match="in_features=960 is not a multiple of group_size=128"):
        empty_linear(960, 32, PRESETS["w4a16"], bias=False, dtype=torch.float32)


def test_codes_of_another_dtype_or_scheme_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"torch\.bfloat16, torch\.float32"):
        from_quantized(quantized(GROUPED, dtype=torch.bfloat16), GROUPED, None, dtype=torch.float32)
    with pytest.raises(AssertionError, match="group_size=32"):
        from_quantized(quantized(GROUPED), PRESETS["w4a16"], None, dtype=torch.float32)


def test_static_activations_need_their_scale() -> None:
    with pytest.raises(RuntimeError, match="input_scale"):
        from_quantized(quantized(PRESETS["w8a8_static"]), PRESETS["w8a8_static"], None, dtype=torch.float32)


def quantization_arguments(spec: QuantSpec) -> dict[str, Any]:
    group = {"group_size": spec.group_size} if spec.granularity is Granularity.GROUP else {}
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity.value,
        "dynamic": spec.dynamic,
        **group,
    }


def read_by_compressed_tensors(layer: QuantLinear) -> Tensor:
    """The float weight that the package makes of our buffers, all of which it has to know."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weight, activation = layer.scheme.weight, layer.scheme.activation
    theirs = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**quantization_arguments(weight)),
        input_activations=quantization.QuantizationArgs(**quantization_arguments(activation)) if activation else None,
    )
    kind = "pack-quantized" if activation is None else "int-quantized"
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    known = set(compressor.compression_param_names(theirs))
    assert {key for key in layer.state_dict() if key.startswith("weight")} == known
    found: Tensor = compressor.decompress(dict(layer.state_dict()), theirs)["weight"]
    return found


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compressed_tensors_reads_the_same_weight(name: str, dtype: torch.dtype) -> None:
    """The package that owns the format decompresses our buffers to our ``dequantize()``, bit for bit."""
    layer = layer_of(name, dtype=dtype)
    found = read_by_compressed_tensors(layer)
    assert found.dtype == dtype
    assert torch.equal(found, layer.dequantize())


@every_scheme
def test_compressed_tensors_notices_another_code(name: str) -> None:
    """The comparison above can fail: one changed code shows."""
    layer = layer_of(name)
    before = layer.dequantize()
    state = layer.state_dict()
    key = "weight_packed" if "weight_packed" in state else "weight"
    state[key] = state[key].clone()
    state[key][0, 0] ^= 1
    layer.load_state_dict(state)
    found = read_by_compressed_tensors(layer)
    assert (found != before).sum() == 1
    assert torch.equal(found, layer.dequantize())
