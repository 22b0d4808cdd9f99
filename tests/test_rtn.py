"""Round to nearest against one value at a time."""

import pytest
import torch
from oracles import naive_rtn, random_weight
from torch import Tensor

from vlaquant import numerics
from vlaquant.numerics import OBSERVERS, quantize_weight
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.scheme import Granularity, QuantSpec

SPECS = [
    QuantSpec(bits=bits, granularity=granularity, symmetric=symmetric, group_size=group_size)
    for bits in (2, 3, 4, 8)
    for granularity, group_size in ((Granularity.TENSOR, None), (Granularity.CHANNEL, None), (Granularity.GROUP, 8))
    for symmetric in (True, False)
]


def spec_name(spec: QuantSpec) -> str:
    return f"w{spec.bits}_{spec.granularity}{'' if spec.symmetric else '_asym'}"


@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_matches_one_value_at_a_time(spec: QuantSpec) -> None:
    weight = random_weight(6, 24, seed=0)
    result = round_to_nearest(weight, spec, scale_dtype=torch.float32)
    assert result.codes.tolist() == naive_rtn(weight, spec)
    assert result.codes.dtype is torch.int8


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_clip_names_an_observer(clip: str) -> None:
    weight, spec = random_weight(6, 24, seed=1), SPECS[0]
    result = round_to_nearest(weight, spec, scale_dtype=torch.bfloat16, clip=clip)
    wanted = quantize_weight(weight, spec, scale_dtype=torch.bfloat16, observer=OBSERVERS[clip])
    assert torch.equal(result.codes, wanted.codes)
    assert torch.equal(result.scale, wanted.scale)
    assert result.scale.dtype is torch.bfloat16


def test_mse_clip_is_not_ignored() -> None:
    weight, spec = random_weight(16, 64, seed=2), QuantSpec(bits=3, granularity=Granularity.CHANNEL)

    def error(clip: str) -> Tensor:
        return (round_to_nearest(weight, spec, scale_dtype=torch.float32, clip=clip).dequantize() - weight).norm()

    assert error("mse") < 0.95 * error("minmax")


def test_does_not_modify_its_input() -> None:
    weight = random_weight(6, 24, seed=3).requires_grad_()
    before = weight.detach().clone()
    result = round_to_nearest(weight, SPECS[0], scale_dtype=torch.float32)
    assert torch.equal(weight.detach(), before)
    assert not result.scale.requires_grad


@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_oracle_notices_truncation(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        return torch.trunc(x / scale + zero).clamp(spec.qmin, spec.qmax)

    monkeypatch.setattr(numerics, "to_codes", truncated)
    weight = random_weight(6, 24, seed=0)
    assert round_to_nearest(weight, spec, scale_dtype=torch.float32).codes.tolist() != naive_rtn(weight, spec)
