"""Bias correction against means over tokens, and what it leaves to a quantizer."""

import types
from dataclasses import replace

import pytest
import torch
from oracles import correlated_inputs, mutant, naive_hessian, random_weight
from torch import Tensor, nn

import vlaquant
from vlaquant.calibrate import ActStats
from vlaquant.calibrate.statistics import no_stats, row_keys
from vlaquant.linear import W4A16Linear
from vlaquant.numerics import QuantizedWeight
from vlaquant.passes import bias as real
from vlaquant.passes.bias import centered
from vlaquant.passes.layer import Work, quantize_layers
from vlaquant.recipe import Gptq, Rtn
from vlaquant.scheme import PRESETS

SCHEME = PRESETS["w3a16"].with_weight(group_size=32)


def shifted_inputs(seed: int = 0) -> Tensor:
    """Tokens whose channels are far from 0 on average, as after a GELU or a LayerNorm with a bias."""
    x = correlated_inputs(300, 64, seed)
    return x + 2.0 * torch.randn(64, generator=torch.Generator().manual_seed(seed)) * x.std(dim=0)


def stats_of(x: Tensor, *, hessian: bool = True) -> ActStats:
    running = no_stats(x.shape[1], hessian=hessian, sample_rows=32, device=x.device)
    running.add_(x, row_keys(len(x), seed=0, sample=0, call=0))
    return running.stats()


def work_of(stats: ActStats | None) -> Work:
    return Work(random_weight(24, 64, seed=1), random_weight(24, 1, seed=2).flatten(), SCHEME, stats, torch.float32)


def mean_error(work: Work, rounded: QuantizedWeight, bias: Tensor, x: Tensor) -> Tensor:
    """[n], how far the output lies from that of the float layer, averaged over tokens one by one."""
    assert work.bias is not None
    total = torch.zeros(24, dtype=torch.float64)
    for token in x.double():
        wanted = work.weight.double() @ token + work.bias.double()
        total += rounded.dequantize().double() @ token + bias.double() - wanted
    return total / len(x)


def check_bias(module: types.ModuleType) -> None:
    x = shifted_inputs()
    work = work_of(stats_of(x))
    rounded, _ = quantize_layers({"a": work}, Rtn())["a"]
    before = replace(work)
    module.correct_bias_(work, rounded)
    assert work.bias is not None
    assert before.bias is not None
    uncorrected = mean_error(before, rounded, before.bias, x)
    assert mean_error(before, rounded, work.bias, x).norm() < 1e-4 * uncorrected.norm()


def check_centered(module: types.ModuleType) -> None:
    x = shifted_inputs()
    wanted = naive_hessian(x.double() - x.double().mean(dim=0))
    found = module.centered(stats_of(x)).hessian
    torch.testing.assert_close(found.double(), wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))


def test_the_mean_output_is_that_of_the_float_layer() -> None:
    check_bias(real)


def test_centered_hessian_is_the_covariance() -> None:
    check_centered(real)
    assert centered(stats_of(shifted_inputs(), hessian=False)).hessian is None


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("work.bias + (work.weight", "work.bias - (work.weight", check_bias),
        ("work.stats.mean", "work.stats.mean_abs", check_bias),
        ("alpha=-1.0", "alpha=1.0", check_centered),
        ("stats.mean, stats.mean,", "stats.mean_abs, stats.mean_abs,", check_centered),
    ],
)
def test_means_notice_a_broken_copy(old: str, new: str, check) -> None:
    with pytest.raises(AssertionError):
        check(mutant(real, old, new))


def test_a_channel_that_is_constant_has_no_negative_variance() -> None:
    x = shifted_inputs()
    x[:, 5] = 0.1
    hessian = centered(stats_of(x)).hessian
    assert hessian is not None
    assert 0.0 <= hessian[5, 5] < 1e-7


def test_layers_without_bias_or_data_stay_as_they_are() -> None:
    for work in (work_of(None), replace(work_of(stats_of(shifted_inputs())), bias=None)):
        before = work.bias
        rounded, _ = quantize_layers({"a": work}, Rtn())["a"]
        real.correct_bias_(work, rounded)
        assert work.bias is before


def test_what_is_left_to_the_quantizer_pays() -> None:
    """With the bias to take the mean error, GPTQ on the covariance has a smaller error than on the Hessian."""
    errors = []
    for center in (False, True):
        x = shifted_inputs(seed=3)
        work = work_of(stats_of(x))
        assert work.stats is not None
        assert work.bias is not None
        rounded, _ = quantize_layers({"a": replace(work, stats=centered(work.stats)) if center else work}, Gptq())["a"]
        wanted = x @ work.weight.T + work.bias
        real.correct_bias_(work, rounded)
        assert work.bias is not None
        errors.append(float((x @ rounded.dequantize().T + work.bias - wanted).square().mean()))
    assert errors[1] < 0.9 * errors[0]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)
        self.fc1.weight.data, self.fc2.weight.data = random_weight(96, 64, seed=5), random_weight(32, 96, seed=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_recipe_asks_for_it(quantizer: str) -> None:
    x = shifted_inputs(seed=4)
    errors: dict[bool, float] = {}
    for correction in (False, True):
        torch.manual_seed(0)
        model = TwoLayers()
        wanted = model.fc1(x).detach()
        recipe = {
            "rules": [{"pattern": "*", "scheme": "w3a16", "group_size": 32}],
            "quantizer": {"kind": quantizer},
            "bias_correction": correction,
        }
        vlaquant.quantize(model, recipe, samples=list(x.split(50)), run=lambda model, sample: model(sample))
        assert isinstance(model.fc1, W4A16Linear)
        assert model.fc2.bias is None
        errors[correction] = float((model.fc1(x) - wanted).mean(dim=0).norm() / wanted.norm())
    assert errors[True] < 1e-3 * errors[False]
