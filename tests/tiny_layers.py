"""Packed layers of every scheme, all from one float weight and bias."""

import pytest
import torch
from torch import Tensor

from vlaquant.linear import QuantLinear, from_quantized
from vlaquant.numerics import QuantizedWeight, quantize_weight
from vlaquant.scheme import PRESETS, Scheme

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


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


every_scheme = pytest.mark.parametrize("name", SCHEMES)
