"""GPTQ against the naive column-by-column version, against rounding, and against broken copies of itself."""

import types
from typing import Any

import pytest
import torch
from oracles import correlated_inputs, mutant, naive_gptq, naive_hessian, random_weight
from torch import Tensor

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.numerics import OBSERVERS
from vlaquant.passes import gptq as real
from vlaquant.passes.awq import awq_clip, hessian_observer
from vlaquant.passes.gptq import MAX_DAMP, gptq
from vlaquant.passes.loss import weight_loss
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.scheme import Granularity, QuantSpec

CHANNEL, GROUP, TENSOR = Granularity.CHANNEL, Granularity.GROUP, Granularity.TENSOR


def channel(bits: int, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(bits=bits, granularity=CHANNEL, symmetric=symmetric)


def grouped(bits: int, group_size: int, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(bits=bits, granularity=GROUP, group_size=group_size, symmetric=symmetric)


def problem(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and the Hessian [k, k] of correlated inputs."""
    return random_weight(n, k, seed), naive_hessian(correlated_inputs(4 * k, k, seed)).float()


def relative_losses(module: types.ModuleType, spec: QuantSpec, *, act_order: bool, **kwargs) -> Tensor:
    """Output error as a share of that of plain rounding, for four seeds."""
    losses = []
    for seed in range(4):
        weight, hessian = problem(32, 128, seed)
        plain = round_to_nearest(weight, spec, scale_dtype=torch.float32)
        solved = module.gptq(weight, hessian, spec, scale_dtype=torch.float32, act_order=act_order, **kwargs).weight
        before = weight_loss(plain.dequantize() - weight, hessian)
        losses.append(weight_loss(solved.dequantize() - weight, hessian) / before)
    return torch.tensor(losses)


def check_oracle(
    module: types.ModuleType, spec: QuantSpec, *, act_order: bool, clip: str = "minmax", block_size: int = 16
) -> None:
    """Equal codes but for near-ties (the oracle is in float64), and so an equal output error."""
    for seed in range(2):
        weight, hessian = problem(12, 48, seed)
        hessian[5] = hessian[:, 5] = 0.0
        options: dict[str, Any] = {"scale_dtype": torch.bfloat16, "damp": 0.01, "act_order": act_order}
        result = module.gptq(weight, hessian, spec, clip=clip, block_size=block_size, **options).weight
        codes, rounded = naive_gptq(weight, hessian, spec, observer=OBSERVERS[clip], **options)
        assert (result.codes != codes).double().mean() < 0.01
        loss = weight_loss((rounded - weight).float(), hessian)
        assert weight_loss(result.dequantize() - weight, hessian) == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        channel(2),
        channel(4, symmetric=False),
        channel(8),
        grouped(3, 12),
        grouped(4, 16),
        grouped(4, 24, symmetric=False),
        grouped(5, 8, symmetric=False),
        QuantSpec(bits=4, granularity=TENSOR),
        QuantSpec(bits=6, granularity=TENSOR, symmetric=False),
    ],
    ids=lambda spec: f"w{spec.bits}_{spec.granularity}{spec.group_size or ''}{'' if spec.symmetric else '_asym'}",
)
def test_matches_naive_version(spec: QuantSpec, act_order) -> None:
    check_oracle(real, spec, act_order=act_order)


@pytest.mark.parametrize("block_size", [1, 7, 32, 48, 128])
def test_block_size_does_not_matter(block_size: int) -> None:
    check_oracle(real, grouped(4, 12), act_order=False, block_size=block_size)
    check_oracle(real, grouped(4, 12), act_order=True, block_size=block_size, clip="mse")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Like the historic slicing bug of mlx-lm: columns behind the block are made up for twice.
        ("slice(begin, end), slice(end, stop)", "slice(begin, end), slice(end, k)"),
        ("slice(start, stop), slice(stop, k)", "slice(start, stop), slice(stop + 1, k)"),
        ("L[behind, block].T", "L[behind, block].T.abs()"),
        ("columns.addmm_(L[behind, few].T, errors[behind])", "pass"),
        ("column.addmv_(errors[j + 1 :].T, factors[j, j + 1 :])", "pass"),
        ("value=-1.0", "value=1.0"),
        ("L /= pivots", "pass"),
        ("grid.group(column) for column in order", "grid.group(column) for column in range(k)"),
        ("solved[place].T", "solved.T"),
        ("float(diagonal[~dead].mean())", "100 * float(diagonal[~dead].mean())"),
        ("descending=True, stable=True", "stable=True"),
        ("H[start:, panel] -= H[start:, :start] @ H[panel, :start].T", "pass"),
        ("lower.T, H[rest, panel]", "lower, H[rest, panel]"),
    ],
)
def test_oracle_notices_a_broken_copy(old: str, new: str) -> None:
    broken = mutant(real, old, new)
    vars(broken)["_PANEL"] = 20
    with pytest.raises(AssertionError):
        check_oracle(broken, grouped(4, 12), act_order=True, block_size=40)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if grow:\n            grid", "if False:\n            grid"),
        ("_if_free(W[block], corrected, L[block, block])", "corrected"),
        ("stored[:, group] = values.flatten()", "pass"),
        ("        block_size = spec.group_size\n", "        pass\n"),
    ],
)
def test_oracle_notices_stale_group_scales(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_oracle(mutant(real, old, new), grouped(4, 12), act_order=False)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, None])
def test_beats_rounding_by_a_margin_that_the_slicing_bug_misses(bits: int, group_size: int | None) -> None:
    spec = grouped(bits, group_size) if group_size else channel(bits)
    buggy = mutant(real, "slice(begin, end), slice(end, stop)", "slice(begin, end), slice(end, k)")
    for act_order, most in ((True, 0.16), (False, 0.36)):
        good = relative_losses(real, spec, act_order=act_order, block_size=32)
        bad = relative_losses(buggy, spec, act_order=act_order, block_size=32)
        assert good.mean() < most
        # Over-propagation costs half of the gain, and still beats plain rounding: only a margin notices.
        assert most < bad.mean() < 1.0


def test_activation_order_helps() -> None:
    assert (
        relative_losses(real, channel(3), act_order=True) < relative_losses(real, channel(3), act_order=False)
    ).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_takes_ranges_that_were_searched_by_output_error(bits: int) -> None:
    spec = grouped(bits, 32)
    for seed in range(3):
        weight, hessian = problem(32, 128, seed)
        losses = {
            name: weight_loss(solved.dequantize() - weight, hessian)
            for name, solved in {
                "clip": awq_clip(weight, hessian, spec, scale_dtype=torch.float32),
                "gptq": gptq(weight, hessian, spec, scale_dtype=torch.float32).weight,
                "both": gptq(weight, hessian, spec, scale_dtype=torch.float32, clip=hessian_observer(hessian)).weight,
            }.items()
        }
        assert losses["both"] < losses["gptq"] < losses["clip"]


def test_hessian_observer_needs_activation_order() -> None:
    weight, hessian = problem(8, 32, 0)
    with pytest.raises(AssertionError, match="whole weight"):
        gptq(
            weight,
            hessian,
            grouped(4, 8),
            scale_dtype=torch.float32,
            clip=hessian_observer(hessian),
            act_order=False,
        )


def test_uncorrelated_inputs_leave_plain_rounding() -> None:
    weight = random_weight(8, 40, seed=0)
    spec = channel(4)
    result = gptq(weight, torch.eye(40), spec, scale_dtype=torch.float32).weight
    assert torch.equal(result.codes, round_to_nearest(weight, spec, scale_dtype=torch.float32).codes)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_size_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, hessian = problem(8, 48, 3)
    hessian[7] = hessian[:, 7] = 0.0
    wanted = gptq(weight, hessian, channel(4), scale_dtype=torch.float32)
    scaled = gptq(weight, hessian * factor, channel(4), scale_dtype=torch.float32)
    assert (wanted.weight.codes != scaled.weight.codes).double().mean() < 0.01


def test_dead_columns_are_rounded_to_nearest_and_counted() -> None:
    weight, hessian = problem(8, 48, 0)
    dead = [0, 13, 47]
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    for spec in (channel(4), grouped(4, 16, symmetric=False)):
        result = gptq(weight, hessian, spec, scale_dtype=torch.float32)
        assert result.dead_columns == 3
        assert result.fallback is None
        plain = round_to_nearest(weight, spec, scale_dtype=torch.float32)
        assert torch.equal(result.weight.codes[:, dead], plain.codes[:, dead])


def test_input_that_is_always_zero_falls_back() -> None:
    weight = random_weight(8, 48, 0)
    result = gptq(weight, torch.zeros(48, 48), channel(4), scale_dtype=torch.float32)
    assert result.fallback == "every input is 0; rounded to nearest"
    assert result.dead_columns == 48
    assert torch.equal(result.weight.codes, round_to_nearest(weight, channel(4), scale_dtype=torch.float32).codes)


def test_damping_grows_until_the_hessian_can_be_factored() -> None:
    weight, hessian = problem(8, 48, 1)
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * hessian.diagonal().mean()
    indefinite = vectors @ torch.diag(values) @ vectors.T
    result = gptq(weight, indefinite, channel(4), scale_dtype=torch.float32, damp=0.01)
    assert result.fallback is None
    assert result.damp == pytest.approx(0.1)
    assert gptq(weight, hessian, channel(4), scale_dtype=torch.float32, damp=0.01).damp == 0.01


def test_singular_hessian_without_damping_is_damped() -> None:
    weight = random_weight(8, 48, 1)
    x = torch.zeros(2, 48)
    x[0, :24] = 1.0
    x[1, 24:] = 1.0
    result = gptq(weight, x.T @ x, channel(4), scale_dtype=torch.float32, damp=0.0)
    assert result.fallback is None
    assert 0.0 < result.damp <= MAX_DAMP


def test_hopeless_hessian_falls_back_and_says_so() -> None:
    weight, hessian = problem(8, 48, 1)
    hessian[3, 3] = -100.0 * hessian.diagonal().mean()
    result = gptq(weight, hessian, channel(4), scale_dtype=torch.float32)
    assert result.fallback is not None
    assert "not positive definite, even with damping 1" in result.fallback
    assert result.dead_columns == 0
    assert result.damp == MAX_DAMP
    assert torch.equal(result.weight.codes, round_to_nearest(weight, channel(4), scale_dtype=torch.float32).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    weight, hessian = problem(8, 48, 1)
    spoilt_weight, spoilt_hessian = weight.clone(), hessian.clone()
    spoilt_weight[2, 3] = spoilt_hessian[4, 4] = bad
    with pytest.raises(CalibrationError, match=r"Hessian of a weight of shape \[8, 48\]"):
        gptq(weight, spoilt_hessian, channel(4), scale_dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"weight of shape \[8, 48\]"):
        gptq(spoilt_weight, hessian, channel(4), scale_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_any_float_and_leaves_its_arguments_alone(dtype: torch.dtype) -> None:
    weight, hessian = problem(8, 48, 2)
    with torch.inference_mode():
        given_hessian = hessian.clone()
    given = weight.to(dtype).requires_grad_()
    result = gptq(given, given_hessian, grouped(4, 16), scale_dtype=torch.float16).weight
    assert torch.equal(given.detach(), weight.to(dtype))
    assert torch.equal(given_hessian, hessian)
    assert result.codes.dtype is torch.int8
    assert result.scale.dtype is torch.float16
    assert result.scale.shape == (8, 3)
    assert not result.scale.requires_grad


def test_float32_is_enough() -> None:
    """Massive activations, fewer tokens than channels: the worst conditioned case that layers show."""
    x = correlated_inputs(60, 128, seed=0)
    x[:, :2] *= 300.0
    hessian = naive_hessian(x)
    factored = real._factor(hessian.float(), 0.01, act_order=False)
    assert factored.L is not None
    assert (factored.damp, factored.float64) == (0.01, False)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128)
    wanted = torch.linalg.cholesky(damped.flip(0, 1))
    wanted /= wanted.diagonal().clone()
    assert (factored.L.tril() - wanted).norm() < 1e-5 * wanted.norm()


def test_factor_is_the_inverse_of_the_papers() -> None:
    """R = U⁻¹ where H⁻¹ = UᵀU, here backwards and with a diagonal of 1."""
    hessian = naive_hessian(correlated_inputs(200, 24, seed=0))
    factored = real._factor(hessian.float(), 0.0, act_order=False)
    assert factored.L is not None
    U = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    R = torch.linalg.inv(U)
    torch.testing.assert_close(factored.L.tril().flip(0, 1).double(), R / R.diagonal(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("panel", [1, 7, 64, 100])
def test_panels_do_not_matter(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(real, "_PANEL", panel)
    hessian = naive_hessian(correlated_inputs(200, 64, seed=0))
    factored = hessian.clone()
    assert real._cholesky_(factored)
    torch.testing.assert_close(factored.tril(), torch.linalg.cholesky(hessian), rtol=1e-9, atol=1e-9)
    hessian[40, 40] = -1.0
    assert not real._cholesky_(hessian)
    order = torch.randperm(64)
    matrix = torch.randn(64, 64)
    assert torch.equal(real._gathered(matrix, order, torch.float64), matrix.double()[order][:, order])


def test_float64_comes_before_more_damping() -> None:
    """Integers that float32 holds, with eigenvalues from 1 to 10⁸: too far apart for float32 to factor them."""
    x = torch.randint(-1200, 1200, (20, 48), generator=torch.Generator().manual_seed(0)).double()
    hessian = (x.T @ x + torch.eye(48)).float()
    assert torch.equal(hessian.double(), x.T @ x + torch.eye(48))
    assert torch.linalg.cholesky_ex(hessian.flip(0, 1)).info > 0
    result = gptq(random_weight(8, 48, 0), hessian, channel(4), scale_dtype=torch.float32, damp=0.0, act_order=False)
    assert (result.damp, result.float64, result.fallback) == (0.0, True, None)
    single = mutant(real, "for dtype in (torch.float32, torch.float64)", "for dtype in (torch.float32,)")
    raised = single.gptq(random_weight(8, 48, 0), hessian, channel(4), scale_dtype=torch.float32, damp=0.0)
    assert raised.damp > 0.0


@pytest.mark.parametrize("spec", [channel(4), grouped(4, 12, symmetric=False), QuantSpec(bits=4, granularity=TENSOR)])
@pytest.mark.parametrize("act_order", [False, True])
def test_rows_may_be_solved_in_parts(monkeypatch: pytest.MonkeyPatch, spec: QuantSpec, act_order: bool) -> None:  # noqa: FBT001
    weight, hessian = problem(11, 48, 2)
    options: dict[str, Any] = {"scale_dtype": torch.bfloat16, "act_order": act_order}
    wanted = gptq(weight, hessian, spec, **options).weight
    monkeypatch.setattr(real, "_ROWS", 4)
    parts = gptq(weight, hessian, spec, **options).weight
    assert torch.equal(parts.codes, wanted.codes)
    assert torch.equal(parts.scale, wanted.scale)
    assert (parts.zero is None) == (wanted.zero is None)
    assert parts.zero is None or wanted.zero is None or torch.equal(parts.zero, wanted.zero)
