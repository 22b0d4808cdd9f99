"""Ranges with a sign: symmetric codes reach one further down than up, and which side that is, is searched."""

import types

import pytest
import torch
from oracles import correlated_inputs, mutant, naive_full_range, naive_hessian, naive_rtn, random_weight
from torch import Tensor

from vlaquant import numerics as real
from vlaquant.numerics import OBSERVERS, Observer, min_max, qparams, quantize_weight
from vlaquant.passes.awq import hessian_observer
from vlaquant.scheme import Granularity, QuantSpec


def spec_of(bits: int, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(bits=bits, granularity=Granularity.GROUP, group_size=16, symmetric=symmetric)


def naive_mse(weight: Tensor, spec: QuantSpec) -> float:
    """Least squared error of a weight, each group with the best of 80 ranges and both signs, one after the other."""
    total = 0.0
    for group in weight.reshape(-1, 16):
        ranges, errors = [naive_full_range(group, spec)], []
        for step in range(80):
            ratio = 1.0 - 0.01 * step
            scale, zero = qparams(group.min() * ratio, group.max() * ratio, spec, torch.float32)
            ranges += [(scale, zero), (-scale, zero)] if spec.symmetric else [(scale, zero)]
        for scale, zero in ranges:
            codes = torch.round(group.double() / scale.double() + zero).clamp(spec.qmin, spec.qmax)
            errors.append(float(((codes - zero) * scale.double() - group.double()).square().sum()))
        total += min(errors)
    return total


def check_mse(module: types.ModuleType, spec: QuantSpec) -> None:
    weight = random_weight(20, 64, seed=0)
    rounded = module.quantize_weight(weight, spec, scale_dtype=torch.float32, observer=module.mse_observer).dequantize()
    assert float((rounded - weight).double().square().sum()) == pytest.approx(naive_mse(weight, spec), rel=1e-3)


@pytest.mark.parametrize("spec", [*map(spec_of, (2, 3, 4)), spec_of(2, symmetric=False)], ids=str)
def test_mse_matches_naive_search(spec: QuantSpec) -> None:
    check_mse(real, spec)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("yield -scale, zero", "yield scale, zero"),
        ("better = found < best", "better = found > best"),
        ("low * ratio, high * ratio", "low * ratio, high"),
        ("(1.0 - _MSE_SMALLEST) * step", "0.1 * step"),
    ],
)
def test_naive_search_notices_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_mse(mutant(real, old, new), spec_of(2))


def observers(weight: Tensor) -> list[Observer]:
    x = correlated_inputs(200, weight.shape[1], seed=0)
    return [OBSERVERS["minmax"], OBSERVERS["mse"], hessian_observer(naive_hessian(x).float())]


def check_full(module: types.ModuleType) -> None:
    for bits in (2, 3, 4, 8):
        weight = random_weight(20, 64, seed=2)
        assert module.quantize_weight(weight, spec_of(bits), scale_dtype=torch.float32).codes.tolist() == naive_rtn(
            weight, spec_of(bits)
        )


def test_full_range_matches_naive_rounding() -> None:
    check_full(real)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.where(high > -low, -scale, scale)", "scale"),
        (".to(torch.float32) / -spec.qmin", ".to(torch.float32) / spec.qmax"),
        ("spec.qmin + spec.qmax < 0", "True"),
    ],
)
def test_naive_rounding_notices_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_full(mutant(real, old, new))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_full_range_beats_one_that_has_room_on_both_sides(bits: int) -> None:
    """Half a step for either side, as most packages have it, makes every step larger."""

    def roomy(groups: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return qparams(*min_max(groups), spec, dtype)

    def error(observer: Observer) -> float:
        weight = random_weight(200, 64, seed=3)
        rounded = quantize_weight(weight, spec_of(bits), scale_dtype=torch.bfloat16, observer=observer)
        return float((rounded.dequantize() - weight).square().sum())

    assert error(OBSERVERS["minmax"]) < 0.95 * error(roomy)


def test_the_longer_side_gets_the_longer_half_of_the_codes() -> None:
    weight = torch.tensor([[0.02, -1.0, 0.5, -0.5] * 4, [0.02, 1.0, 0.5, -0.5] * 4])
    for observer in observers(weight):
        quantized = quantize_weight(weight, spec_of(2), scale_dtype=torch.float32, observer=observer)
        assert (quantized.scale.sign().flatten() == torch.tensor([1.0, -1.0])).all()
        assert (quantized.codes[:, 1] == -2).all()
        torch.testing.assert_close(quantized.dequantize()[0, 1], -quantized.dequantize()[1, 1])


def test_codes_with_as_much_on_both_sides_need_no_sign() -> None:
    weight = random_weight(20, 64, seed=1)
    for bits, symmetric in ((8, True), (4, False)):
        for observer in observers(weight):
            quantized = quantize_weight(
                weight, spec_of(bits, symmetric=symmetric), scale_dtype=torch.float32, observer=observer
            )
            assert (quantized.scale > 0).all()
