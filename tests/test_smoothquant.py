"""SmoothQuant's scale against its formula, and what it is for."""

import types

import pytest
import torch
from oracles import correlated_inputs, mutant, naive_smooth_scale, random_weight
from torch import Tensor

from vlaquant.numerics import fake_quantize, qparams
from vlaquant.passes import smoothquant as real
from vlaquant.passes.loss import output_loss
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.passes.smoothquant import smooth_scale
from vlaquant.scheme import PRESETS


def check_formula(module: types.ModuleType, alpha: float) -> None:
    x = correlated_inputs(64, 20, seed=0)
    weights = [random_weight(n, 20, seed=n) for n in (3, 8)]
    absmax = x.abs().amax(dim=0)
    wanted = torch.tensor(naive_smooth_scale(absmax, weights, alpha))
    torch.testing.assert_close(module.smooth_scale(absmax, weights, alpha), wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_matches_the_formula(alpha: float) -> None:
    check_formula(real, alpha)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("activation.pow(alpha)", "activation.pow(1.0 - alpha)"),
        ("/ weight.pow", "* weight.pow"),
        ("for w in weights]).amax(dim=0)", "for w in weights])[0]"),
        ("torch.maximum(-low, high)", "high"),
    ],
)
def test_formula_notices_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_formula(mutant(real, old, new), 0.7)


def check_candidates(module: types.ModuleType) -> None:
    absmax, weights = (
        correlated_inputs(64, 20, seed=0).abs().amax(dim=0),
        [random_weight(n, 20, seed=n) for n in (3, 8)],
    )
    (none, ones), *others = module.smooth_scales(absmax, weights, 4)
    assert none == 0.0
    assert torch.equal(ones, torch.ones(20))
    assert [alpha for alpha, _ in others] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for alpha, scale in others:
        torch.testing.assert_close(scale, torch.tensor(naive_smooth_scale(absmax, weights, alpha)))


def test_candidates_are_no_scale_and_every_alpha() -> None:
    check_candidates(real)


@pytest.mark.parametrize(
    ("old", "new"), [("range(grid + 1)", "range(grid)"), ("torch.ones_like(activation)", "activation")]
)
def test_formula_notices_broken_candidates(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_candidates(mutant(real, old, new))


def test_one_half_gives_both_sides_the_same_range() -> None:
    x, weight = correlated_inputs(64, 20, seed=1), random_weight(8, 20, seed=1)
    scale = smooth_scale(x.abs().amax(dim=0), [weight], 0.5)
    torch.testing.assert_close((x / scale).abs().amax(dim=0), (weight * scale).abs().amax(dim=0))


def test_channels_without_activation_or_weight_are_left_alone() -> None:
    absmax = torch.tensor([0.0, 2.0, 0.0, 8.0])
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    for alpha in (0.0, 0.5, 1.0):
        scale = smooth_scale(absmax, [weight], alpha)
        assert scale[:3].tolist() == [1.0, 1.0, 1.0]
        assert scale[3] != 1.0


def test_scale_is_bounded_and_float32() -> None:
    absmax = torch.tensor([1e-20, 1e20], dtype=torch.float64)
    scale = smooth_scale(absmax, [torch.tensor([[1e10, 1e-10]], dtype=torch.float64)], 0.5)
    assert scale.dtype is torch.float32
    torch.testing.assert_close(scale, torch.tensor([1e-4, 1e4]))


def test_takes_weights_with_gradients_and_16_bits() -> None:
    absmax, weight = torch.rand(20) + 0.1, random_weight(8, 20, seed=2).bfloat16().requires_grad_()
    scale = smooth_scale(absmax, [weight])
    assert not scale.requires_grad
    torch.testing.assert_close(scale, smooth_scale(absmax, [weight.detach().float()]))


def w8a8_static_error(x: Tensor, weight: Tensor, scale: Tensor) -> float:
    scheme = PRESETS["w8a8_static"]
    assert scheme.activation is not None
    smooth = x / scale
    step, zero = qparams(smooth.min(), smooth.max(), scheme.activation, torch.float32)
    rounded = round_to_nearest(weight * scale, scheme.weight, scale_dtype=torch.float32).dequantize()
    return output_loss(x, weight, fake_quantize(smooth, step, zero, scheme.activation), rounded)


@pytest.mark.parametrize("seed", range(4))
def test_lowers_the_output_error_with_outlier_channels(seed: int) -> None:
    x, weight = correlated_inputs(256, 128, seed), random_weight(32, 128, seed)
    scale = smooth_scale(x.abs().amax(dim=0), [weight], 0.5)
    assert w8a8_static_error(x, weight, scale) < 0.5 * w8a8_static_error(x, weight, torch.ones(128))
    # The wrong way round is worse than nothing.
    assert w8a8_static_error(x, weight, 1.0 / scale) > w8a8_static_error(x, weight, torch.ones(128))
