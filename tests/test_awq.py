"""AWQ's scales and clipping against naive searches over tokens, and the losses that they are searched with."""

import types

import pytest
import torch
from oracles import (
    correlated_inputs,
    mutant,
    naive_awq_loss,
    naive_awq_scales,
    naive_clip,
    naive_hessian,
    naive_output_error,
    random_weight,
)
from torch import Tensor

from vlaquant.calibrate.statistics import ActStats, no_stats, row_keys
from vlaquant.errors import CalibrationError
from vlaquant.passes import awq as real
from vlaquant.passes import loss as real_loss
from vlaquant.passes import search as real_search
from vlaquant.passes.awq import awq_clip, awq_scales, hessian_observer
from vlaquant.passes.gptq import gptq
from vlaquant.passes.loss import output_loss, weight_loss
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.passes.search import best_scale
from vlaquant.scheme import Granularity, QuantSpec

GROUPED = [
    QuantSpec(bits=b, granularity=Granularity.GROUP, group_size=32, symmetric=s) for b in (3, 4) for s in (True, False)
]
CLIP_RATIOS = [1.0 - 0.05 * step for step in range(15)]


def stats_of(x: Tensor) -> ActStats:
    running = no_stats(x.shape[1], hessian=True, sample_rows=64, device=x.device)
    running.add_(x, row_keys(len(x), seed=0, sample=0, call=0))
    return running.stats()


def rounding(spec: QuantSpec):
    def quantize(weight: Tensor) -> Tensor:
        return round_to_nearest(weight, spec, scale_dtype=torch.float32).dequantize()

    return quantize


def search(
    weights: list[Tensor],
    stats: ActStats,
    quantize,
    *,
    grid: int = 20,
    module: types.ModuleType = real,
    chooser: types.ModuleType = real_search,
):
    """AWQ's search with the error of rounded weights, as the pipeline calls it for weight-only schemes."""
    hessian = stats.hessian
    assert hessian is not None

    def loss(scale: Tensor) -> float:
        return sum((weight_loss(quantize(w * scale) / scale - w, hessian) for w in weights), 0.0)

    return chooser.best_scale(module.awq_scales(stats.mean_abs, grid), loss)


def check_weight_loss(module: types.ModuleType) -> None:
    # More columns than two strips hold, and more rows than a slice
    x, delta = correlated_inputs(50, 600, seed=0), random_weight(19, 600, seed=0)
    hessian = naive_hessian(x).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_VALUES", 4800)
        assert module.weight_loss(delta, hessian) == pytest.approx(naive_output_error(delta, x), rel=1e-4)
    by_row = [naive_output_error(row.unsqueeze(0), x) for row in delta]
    assert module.row_losses(delta, hessian).tolist() == pytest.approx(by_row, rel=1e-4)


def check_output_loss(module: types.ModuleType) -> None:
    x, weight = correlated_inputs(50, 24, seed=1), random_weight(6, 24, seed=1)
    rounded_x, rounded = (x * 4).round() / 4, (weight * 64).round() / 64
    outputs = [weight.double() @ a.double() - rounded.double() @ b.double() for a, b in zip(x, rounded_x, strict=True)]
    wanted = sum(float(error.square().sum()) for error in outputs) / 50
    assert module.output_loss(x, weight, rounded_x, rounded) == pytest.approx(wanted, rel=1e-4)


def check_scale(module: types.ModuleType, spec: QuantSpec, seed: int, chooser: types.ModuleType = real_search) -> None:
    """The same loss and scale as a search that runs every token through the layers."""
    x = correlated_inputs(60, 64, seed)
    x[:, 9] = 0.0
    weights = [random_weight(n, 64, seed + n) for n in (5, 12)]
    candidates = module.awq_scales(stats_of(x).mean_abs, 8)
    assert [ratio for ratio, _ in candidates] == pytest.approx([step / 8 for step in range(8)])
    for (_, scale), wanted in zip(candidates, naive_awq_scales(x, grid=8), strict=True):
        torch.testing.assert_close(scale, torch.tensor(wanted), rtol=1e-4, atol=0.0)
    # At the same scales to the last bit: the largest value of a symmetric group lies halfway between two codes.
    losses = [naive_awq_loss(weights, x, rounding(spec), scale) for _, scale in candidates]
    result = search(weights, stats_of(x), rounding(spec), grid=8, module=module, chooser=chooser)
    assert result.loss_rtn == pytest.approx(losses[0], rel=1e-3)
    assert result.loss == pytest.approx(min(losses), rel=1e-3)
    # Two ratios may be equally good, so the naive loss of the chosen one decides.
    assert losses[round(result.strength * 8)] == pytest.approx(min(losses), rel=1e-3)


def check_clip(module: types.ModuleType, spec: QuantSpec, seed: int) -> None:
    x, weight = correlated_inputs(80, 64, seed), random_weight(6, 64, seed)
    result = module.awq_clip(weight, naive_hessian(x).float(), spec, scale_dtype=torch.float32).dequantize()
    wanted = naive_clip(weight, x, spec, CLIP_RATIOS)
    # Two ratios may tie: then the rounded values of a group differ where its errors do not.
    assert (result != wanted).any(dim=1).sum() <= 1
    for columns in torch.arange(64).split(spec.group_size or 64):
        inputs = x[:, columns].double().T
        errors = [((found - weight)[:, columns].double() @ inputs).square().mean(dim=1) for found in (result, wanted)]
        torch.testing.assert_close(*errors, rtol=1e-3, atol=0.0)


def test_weight_loss_is_the_output_error() -> None:
    check_weight_loss(real_loss)


def test_output_loss_is_the_output_error() -> None:
    check_output_loss(real_loss)


def test_losses_agree_for_float_activations() -> None:
    x, weight = correlated_inputs(50, 24, seed=2), random_weight(6, 24, seed=2)
    rounded = (weight * 64).round() / 64
    by_hessian = weight_loss(rounded - weight, naive_hessian(x).float())
    assert output_loss(x, weight, x, rounded) == pytest.approx(by_hessian, rel=1e-4)
    scale = torch.rand(24) + 0.5
    assert output_loss(x, weight, x / scale, rounded * scale) == pytest.approx(by_hessian, rel=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        (
            "delta[:, strip] @ hessian[strip, start:]",
            "delta[:, strip] @ hessian[strip, start:].abs()",
            check_weight_loss,
        ),
        ("2.0 * products.sum(dim=-1)", "products.sum(dim=-1)", check_weight_loss),
        ("- products[:, :_STRIP].sum(dim=-1)", "", check_weight_loss),
        ("losses += ", "losses = ", check_weight_loss),
        ("min(start + step, n)", "start + step - 1", check_weight_loss),
        ("rounded_x @", "x @", check_output_loss),
        (".sum(dim=-1).mean()", ".mean()", check_output_loss),
    ],
)
def test_oracles_notice_a_broken_loss(old: str, new: str, check) -> None:
    with pytest.raises(AssertionError):
        check(mutant(real_loss, old, new))


@pytest.mark.parametrize("spec", GROUPED, ids=str)
def test_scale_matches_naive_search(spec: QuantSpec) -> None:
    for seed in range(3):
        check_scale(real, spec, seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scale / (low * high).sqrt()", "scale / (low * high)"),
        ("mean_abs.pow(step / grid)", "mean_abs.pow(-step / grid)"),
        ("scale[active].aminmax()", "scale.aminmax()"),
    ],
)
def test_oracle_notices_broken_scales(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_scale(mutant(real, old, new), GROUPED[0], 0)


def test_oracle_notices_a_broken_search() -> None:
    with pytest.raises(AssertionError):
        check_scale(real, GROUPED[0], 0, chooser=mutant(real_search, "min(tried", "max(tried"))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, None])
def test_scale_beats_rounding(bits: int, group_size: int | None) -> None:
    granularity = Granularity.GROUP if group_size else Granularity.CHANNEL
    spec = QuantSpec(bits=bits, granularity=granularity, group_size=group_size)
    for seed in range(4):
        result = search([random_weight(32, 128, seed)], stats_of(correlated_inputs(256, 128, seed)), rounding(spec))
        assert result.loss < 0.85 * result.loss_rtn
        assert result.strength > 0.0


def test_no_scale_where_none_helps() -> None:
    """Rounding that is finer for columns that are small makes every scale worse than none."""
    stats = stats_of(correlated_inputs(64, 16, seed=0))

    def quantize(weight: Tensor) -> Tensor:
        return weight if torch.equal(weight, original) else weight + 1.0

    original = random_weight(4, 16, seed=0)
    result = search([original], stats, quantize)
    assert (result.strength, result.loss, result.loss_rtn) == (0.0, 0.0, 0.0)
    assert torch.equal(result.scale, torch.ones(16))


def test_losses_that_are_not_finite_never_win() -> None:
    stats, original = stats_of(correlated_inputs(64, 16, seed=0)), random_weight(4, 16, seed=0)
    result = search([original], stats, lambda w: w + 1 if torch.equal(w, original) else w * torch.nan)
    assert result.strength == 0.0
    with pytest.raises(CalibrationError, match="without a scale is nan"):
        search([original], stats, lambda w: w * torch.nan)


def test_estimate_chooses_and_loss_decides() -> None:
    mean_abs, calls = stats_of(correlated_inputs(64, 16, seed=0)).mean_abs, []

    def loss(scale: Tensor) -> float:
        calls.append(scale)
        return float((scale - good).square().sum()) + 1.0

    candidates = awq_scales(mean_abs, 20)
    good = candidates[7][1]
    whole = best_scale(candidates, loss)
    assert (whole.strength, whole.loss) == (0.35, 1.0)
    calls.clear()
    quick = best_scale(candidates, loss, estimate=lambda scale: 100.0 * float((scale - good).abs().max()))
    assert len(calls) == 4
    assert (quick.strength, quick.loss, quick.loss_rtn) == (whole.strength, whole.loss, whole.loss_rtn)
    assert torch.equal(quick.scale, good)
    nearly = best_scale(candidates, loss, estimate=lambda scale: float((scale - candidates[8][1]).abs().max()))
    assert nearly.strength == whole.strength
    misled = best_scale(candidates, loss, estimate=lambda scale: -float((scale - good).abs().max()))
    assert misled.loss <= misled.loss_rtn == whole.loss_rtn
    spoilt = best_scale(candidates, loss, estimate=lambda scale: 0.0 if torch.equal(scale, good) else float("nan"))
    assert spoilt.strength == whole.strength


def test_dead_input_gets_no_scale() -> None:
    assert [ratio for ratio, _ in awq_scales(torch.zeros(4))] == [0.0]
    for _, scale in awq_scales(torch.tensor([0.0, 1.0, 4.0])):
        assert scale[0] == 1.0
        assert scale[1:].log().sum().abs() < 1e-6


@pytest.mark.parametrize("spec", [*GROUPED, QuantSpec(bits=3, granularity=Granularity.CHANNEL)], ids=str)
def test_clip_matches_naive_search(spec: QuantSpec) -> None:
    for seed in range(2):
        check_clip(real, spec, seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("diagonal(dim1=0, dim2=2).permute(2, 0, 1)", "permute(0, 2, 1, 3)[0]"),
        ("(delta @ blocks).mul_(delta)", "delta.square()"),
        ("groups.to(torch.float32).transpose(0, 1)", "groups.to(torch.float32).flip(1).transpose(0, 1)"),
        ("1.0 - step * _CLIP_STEP", "1.0 + step * _CLIP_STEP"),
        ("spec, dtype, ratios)", "spec, dtype, ratios[:1])"),
    ],
)
def test_oracle_notices_a_broken_clip(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_clip(mutant(real, old, new), GROUPED[0], 0)


def test_oracle_notices_rows_judged_by_their_size() -> None:
    broken = mutant(real, "row_losses(delta.reshape(-1, len(hessian)), hessian)", "delta.square().sum(dim=-1)")
    with pytest.raises(AssertionError):
        check_clip(broken, QuantSpec(bits=3, granularity=Granularity.CHANNEL), 0)


@pytest.mark.parametrize("granularity", list(Granularity)[:3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clip_is_never_worse_by_its_own_loss(granularity: Granularity, bits: int) -> None:
    spec = QuantSpec(bits=bits, granularity=granularity, group_size=16 if granularity is Granularity.GROUP else None)
    for seed in range(3):
        weight, hessian = random_weight(6, 48, seed), naive_hessian(correlated_inputs(200, 48, seed)).float()
        block = torch.block_diag(*real._diagonal_blocks(hessian, spec.group_size or 48))
        clipped = awq_clip(weight, hessian, spec, scale_dtype=torch.float16)
        plain = round_to_nearest(weight, spec, scale_dtype=torch.float16)
        assert clipped.scale.shape == plain.scale.shape
        before = weight_loss(plain.dequantize() - weight, block)
        assert weight_loss(clipped.dequantize() - weight, block) <= before * (1 + 1e-5)


def test_clip_beats_rounding_and_gptq_beats_clip() -> None:
    for spec in GROUPED:
        for seed in range(3):
            weight, hessian = random_weight(32, 128, seed), naive_hessian(correlated_inputs(512, 128, seed)).float()
            plain, clipped, solved = (
                weight_loss(w.dequantize() - weight, hessian)
                for w in (
                    round_to_nearest(weight, spec, scale_dtype=torch.float32),
                    awq_clip(weight, hessian, spec, scale_dtype=torch.float32),
                    gptq(weight, hessian, spec, scale_dtype=torch.float32).weight,
                )
            )
            assert solved < 0.5 * clipped < 0.4 * plain


def test_clip_observer_refuses_part_of_a_weight() -> None:
    with pytest.raises(AssertionError, match="whole weight"):
        hessian_observer(torch.eye(64))(torch.ones(4, 1, 32), GROUPED[0], torch.float32)
