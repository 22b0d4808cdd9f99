"""Folds keep the function exactly, and their statistics are those of the folded model."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import correlated_inputs, mutant, random_weight
from torch import Tensor, nn

from vlaquant.calibrate import observe
from vlaquant.errors import PlanError
from vlaquant.passes import fold as real
from vlaquant.passes.fold import fold_norm_, scaled_stats


class LlamaNorm(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k) + 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight

    def normed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


class GemmaNorm(LlamaNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * (1.0 + self.weight)


def layer_norm(k: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(k)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


NORMS: dict[str, tuple[Callable[[int], Any], float]] = {
    "layer": (layer_norm, 0.0),
    "llama": (LlamaNorm, 0.0),
    "gemma": (GemmaNorm, 1.0),
}


def some_scale(k: int, seed: int = 0) -> Tensor:
    return torch.exp(torch.randn(k, generator=torch.Generator().manual_seed(seed)))


def check_norm(module: types.ModuleType, kind: str) -> None:
    make, offset = NORMS[kind]
    norm, readers = make(16).double(), [nn.Linear(16, n).double() for n in (4, 9)]
    x = correlated_inputs(20, 16, seed=0).double()
    before = [reader(norm(x)) for reader in readers]
    normed = norm(x)
    scale = some_scale(16)
    module.fold_norm_(norm, scale, readers, offset=offset)
    torch.testing.assert_close(norm(x), normed / scale, rtol=1e-12, atol=1e-12)
    for reader, wanted in zip(readers, before, strict=True):
        torch.testing.assert_close(reader(norm(x)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_norm_fold_keeps_the_function(kind: str) -> None:
    check_norm(real, kind)


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("(old / scale.to(old) - offset)", "(old * scale.to(old) - offset)", "llama"),
        ("(old / scale.to(old) - offset)", "(_wide(weight) / scale.to(old))", "gemma"),
        ("bias.copy_(_wide(bias) / real)", "pass", "layer"),
        ("wide * scale.to(wide))", "wide / scale.to(wide))", "layer"),
        (
            "    for linear in linears:\n        _scale_columns_(linear, real)",
            "    _scale_columns_(linears[0], real)",
            "llama",
        ),
    ],
)
def test_equality_notices_a_broken_norm_fold(old: str, new: str, kind: str) -> None:
    with pytest.raises(AssertionError):
        check_norm(mutant(real, old, new), kind)


def test_wrong_kind_of_norm_changes_the_function() -> None:
    norm, x = GemmaNorm(16).double(), torch.randn(4, 16, dtype=torch.float64)
    before = norm(x)
    scale = some_scale(16)
    fold_norm_(norm, scale)
    assert (norm(x) * scale - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_returned_scale_makes_up_for_rounding(kind: str, dtype: torch.dtype) -> None:
    """With float32 readers nothing is lost but the rounding of a bias, whatever the norm's dtype."""
    make, offset = NORMS[kind]
    norm = make(64).to(dtype)
    if kind == "layer":
        norm.bias.data.zero_()
    old, asked = norm.weight.detach().float() + offset, some_scale(64) * 30.0
    scale = fold_norm_(norm, asked, offset=offset)
    assert norm.weight.dtype is dtype
    assert scale.dtype is torch.float32
    torch.testing.assert_close((norm.weight.detach().float() + offset) * scale, old, rtol=1e-6, atol=0.0)
    if kind != "gemma":
        torch.testing.assert_close(scale, asked, rtol=0.01, atol=0.0)


def test_weight_that_would_round_to_nothing_is_left_alone() -> None:
    norm = GemmaNorm(3)
    norm.weight.data = torch.tensor([0.5, -1.0, 0.5], dtype=torch.bfloat16)
    scale = fold_norm_(norm, torch.tensor([1e4, 2.0, 2.0]), offset=1.0)
    assert norm.weight[:2].tolist() == [0.5, -1.0]
    assert scale[:2].tolist() == [1.0, 2.0]
    assert scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_back_restores_up_to_rounding(dtype: torch.dtype) -> None:
    norm, reader = layer_norm(16).to(dtype), nn.Linear(16, 4).to(dtype)
    pair = nn.ModuleList([norm, reader])
    original = {name: p.detach().clone() for name, p in pair.named_parameters()}
    scale = fold_norm_(norm, some_scale(16), [reader])
    fold_norm_(norm, 1.0 / scale, [reader])
    step = torch.finfo(dtype).eps
    for name, parameter in pair.named_parameters():
        torch.testing.assert_close(parameter.detach(), original[name], rtol=2 * step, atol=0.0)


def test_parameters_stay_the_same_objects() -> None:
    norm, reader = layer_norm(16), nn.Linear(16, 4)
    parameters = [norm.weight, norm.bias, reader.weight, reader.bias]
    fold_norm_(norm, some_scale(16), [reader])
    assert all(a is b for a, b in zip(parameters, [norm.weight, norm.bias, reader.weight, reader.bias], strict=True))
    assert all(p.requires_grad and p.grad_fn is None for p in parameters)


def check_stats(module: types.ModuleType) -> None:
    """Analytic statistics equal those that a second calibration of the folded model sees."""
    norm, reader = layer_norm(16), nn.Linear(16, 4)
    model = nn.Sequential(norm, reader)
    x = correlated_inputs(200, 16, seed=3)

    def stats():
        with observe(model, ["1"], hessian_for=["1"], sample_rows=32, paired=True) as observation:
            observation.begin_sample()
            with observation.float_chain():
                model(x)
            model(x.roll(1, -1))
        return observation.stats()["1"]

    before, scale = stats(), some_scale(16)
    analytic = module.scaled_stats(before, scale)
    fold_norm_(norm, scale, [reader])
    measured = stats()
    for name in (
        "channel_low",
        "channel_high",
        "absmax",
        "low",
        "high",
        "mean_abs",
        "hessian",
        "cross",
        "drift",
        "sample",
    ):
        torch.testing.assert_close(getattr(analytic, name), getattr(measured, name), rtol=1e-4, atol=1e-6)
    assert analytic.tokens == measured.tokens


def test_scaled_stats_are_those_of_the_folded_model() -> None:
    check_stats(real)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(m / scale).div_(scale.unsqueeze(-1))", "m / scale"),
        ("        cross=cross,\n", ""),
        ("        drift=drift,\n", ""),
        ("stats.sample / scale", "stats.sample * scale"),
        ("stats.channel_low / scale", "stats.channel_low"),
    ],
)
def test_measurement_notices_broken_stats(old: str, new: str) -> None:
    broken = mutant(real, old, new)
    with pytest.raises(AssertionError):
        check_stats(broken)


def test_scaled_stats_without_hessian() -> None:
    linear = nn.Linear(4, 2)
    with observe(nn.ModuleList([linear]), ["0"]) as observation:
        linear(random_weight(5, 4, seed=0))
    assert scaled_stats(observation.stats()["0"], some_scale(4)).hessian is None


def test_misfits_are_refused_before_anything_changes() -> None:
    norm, reader = layer_norm(16), nn.Linear(16, 4)
    before = [p.detach().clone() for p in (norm.weight, norm.bias, reader.weight)]
    with pytest.raises(PlanError, match=r"shape \[15\]; it has 16 output channels"):
        fold_norm_(norm, torch.ones(15), [reader])
    with pytest.raises(PlanError, match="in_features=12"):
        fold_norm_(norm, torch.full((16,), 2.0), [reader, nn.Linear(12, 4)])
    with pytest.raises(PlanError, match="LayerNorm has no weight"):
        fold_norm_(nn.LayerNorm(16, elementwise_affine=False), torch.ones(16), [reader])
    with pytest.raises(PlanError, match="Linear has no weight"):
        fold_norm_(nn.Linear(16, 16), torch.ones(16))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        scale = torch.full((16,), 2.0)
        scale[3] = bad
        with pytest.raises(PlanError, match="positive and finite"):
            fold_norm_(norm, scale, [reader])
    assert all(torch.equal(a, b) for a, b in zip(before, (norm.weight, norm.bias, reader.weight), strict=True))
