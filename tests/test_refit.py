"""Refitted scales against least squares over tokens, row by row."""

import types

import pytest
import torch
from oracles import correlated_inputs, mutant, naive_hessian, random_weight
from torch import Tensor

from vlaquant.numerics import QuantizedWeight, quantize_weight, split_groups
from vlaquant.passes import refit as real
from vlaquant.passes.gptq import gptq
from vlaquant.passes.loss import weight_loss
from vlaquant.passes.refit import refit_scales
from vlaquant.scheme import Granularity, QuantSpec

SPECS = {
    "group": QuantSpec(bits=2, granularity=Granularity.GROUP, group_size=16),
    "asymmetric": QuantSpec(bits=3, granularity=Granularity.GROUP, group_size=16, symmetric=False),
    "channel": QuantSpec(bits=3, granularity=Granularity.CHANNEL),
}


def made(spec: QuantSpec, seed: int = 0) -> tuple[Tensor, Tensor, QuantizedWeight]:
    """Tokens [200, 64], a weight [10, 64] and its codes."""
    x, weight = correlated_inputs(200, 64, seed), random_weight(10, 64, seed)
    return x, weight, quantize_weight(weight, spec, scale_dtype=torch.float32)


def naive_scales(x: Tensor, weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Least squares for each row: the output over all tokens, and a thousandth of its weight on the old scales."""
    codes = split_groups(quantized.codes, quantized.spec).double()
    if quantized.zero is not None:
        codes -= quantized.zero.double().unsqueeze(-1)
    n, groups, size = codes.shape
    scales = torch.zeros(n, groups, dtype=torch.float64)
    for row in range(n):
        made_by = torch.stack([x[:, g * size : (g + 1) * size].double() @ codes[row, g] for g in range(groups)], dim=1)
        hold = 1e-3 * made_by.square().mean(dim=0).mean()
        left = torch.cat([made_by / len(x) ** 0.5, hold.sqrt() * torch.eye(groups, dtype=torch.float64)])
        right = torch.cat([x.double() @ weight[row].double() / len(x) ** 0.5, hold.sqrt() * quantized.scale[row]])
        scales[row] = torch.linalg.lstsq(left, right.unsqueeze(-1)).solution.flatten()
    return scales


def check(module: types.ModuleType, spec: QuantSpec) -> None:
    x, weight, quantized = made(spec)
    found = module.refit_scales(weight, quantized, naive_hessian(x).float())
    assert torch.equal(found.codes, quantized.codes)
    assert found.zero is quantized.zero
    torch.testing.assert_close(found.scale.double(), naive_scales(x, weight, quantized), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_matches_least_squares_over_tokens(name: str) -> None:
    check(real, SPECS[name])


@pytest.mark.parametrize("name", ["group", "asymmetric"])
def test_rows_in_slices_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "_VALUES", 3 * 4 * 64)
    check(real, SPECS[name])


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("b + hold * old", "b", "group"),
        ("_HOLD * A", "0.1 * A", "group"),
        ("codes -= quantized.zero", "codes += quantized.zero", "asymmetric"),
        ("weight.to(torch.float32)).to", "codes.flatten(1)).to", "group"),
        ("replace(quantized, scale=scale)", "quantized", "channel"),
    ],
)
def test_least_squares_notice_a_broken_copy(old: str, new: str, name: str) -> None:
    with pytest.raises(AssertionError):
        check(mutant(real, old, new), SPECS[name])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_error_falls(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        x, weight = correlated_inputs(300, 64, seed), random_weight(20, 64, seed)
        hessian = naive_hessian(x).float()
        solved = gptq(weight, hessian, SPECS[name], scale_dtype=dtype).weight
        refitted = refit_scales(weight, solved, hessian)
        assert refitted.scale.dtype == dtype
        before, after = (weight_loss(codes.dequantize() - weight, hessian) for codes in (solved, refitted))
        assert after < (0.97 if name == "group" else 1.0) * before


def test_rows_of_zeros_and_scales_per_tensor_stay() -> None:
    x, weight, quantized = made(SPECS["group"])
    quantized.codes[3] = 0
    found = refit_scales(weight, quantized, naive_hessian(x).float())
    torch.testing.assert_close(found.scale[3], quantized.scale[3])
    assert (found.scale[2] != quantized.scale[2]).any()
    whole = quantize_weight(weight, QuantSpec(bits=4, granularity=Granularity.TENSOR), scale_dtype=torch.float32)
    assert refit_scales(weight, whole, naive_hessian(x).float()) is whole


def test_scales_that_would_vanish_stay() -> None:
    x, weight, quantized = made(SPECS["channel"])
    weight[4] *= 1e-42
    found = refit_scales(weight, quantized, naive_hessian(x).float())
    assert found.scale.isfinite().all()
    assert (found.scale != 0).all()
