"""Packed layers on a CUDA device compute what they compute on the CPU. ``make test-gpu``."""

import pytest
import torch
from torch import nn

from vlaquant.linear import from_quantized
from vlaquant.numerics import quantize_weight
from vlaquant.scheme import PRESETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cuda_equals_cpu(preset: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scheme = PRESETS[preset]
    linear = nn.Linear(256, 96).to(dtype)
    codes = quantize_weight(linear.weight, scheme.weight, scale_dtype=dtype)
    static = scheme.activation is not None and not scheme.activation.dynamic
    layer = from_quantized(
        codes,
        scheme,
        linear.bias,
        dtype=dtype,
        input_scale=torch.tensor([0.03]) if static else None,
        input_zero=torch.tensor([3]) if static else None,
    )
    x = torch.randn(7, 256, dtype=dtype)
    with torch.inference_mode():
        expected = layer(x).float()
        found = layer.cuda()(x.cuda())
    assert found.device.type == "cuda"
    limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert float((found.cpu().float() - expected).norm() / expected.norm()) < limit
