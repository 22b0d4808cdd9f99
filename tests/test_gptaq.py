"""GPTAQ against least squares over the tokens, against the paper's own steps, and against broken copies of itself."""

import types
from typing import Any

import pytest
import torch
from oracles import (
    drifted_inputs,
    mutant,
    naive_gptq,
    naive_hessian,
    naive_shifted_weight,
    naive_two_output_error,
    random_weight,
)
from torch import Tensor

from vlaquant.calibrate.statistics import ActStats, no_stats, row_keys
from vlaquant.numerics import minmax_observer
from vlaquant.passes import gptaq as real
from vlaquant.passes import gptq as solver
from vlaquant.passes import layer, loss
from vlaquant.passes.gptq import gptq
from vlaquant.passes.layer import LayerRecord, Work, quantize_layers
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.recipe import Gptaq, Gptq
from vlaquant.scheme import Granularity, QuantSpec, Scheme, get_scheme

SPECS = [
    QuantSpec(bits=3, granularity=Granularity.CHANNEL),
    QuantSpec(bits=2, granularity=Granularity.GROUP, group_size=12, symmetric=False),
    QuantSpec(bits=4, granularity=Granularity.GROUP, group_size=16),
]
FINE = QuantSpec(bits=8, granularity=Granularity.CHANNEL)


def moments(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and cross term [k, k], from the tokens."""
    cross = (x - seen).double().T @ seen.double() / len(x)
    return naive_hessian(seen).float(), cross.float()


def stats_of(x: Tensor, seen: Tensor) -> ActStats:
    running = no_stats(x.shape[1], hessian=True, sample_rows=8, device=x.device, paired=True)
    running.add_(torch.cat([seen, x], dim=1), row_keys(len(x), seed=0, sample=0, call=0))
    return running.stats()


def check_oracle(spec: QuantSpec, *, act_order: bool, alpha: float) -> None:
    """Equal codes, but for near-ties, to the naive GPTQ of the weight that least squares shifts; one input is dead."""
    for seed in range(2):
        weight, (x, seen) = random_weight(12, 48, seed), drifted_inputs(300, 48, seed)
        seen[:, 5] = 0.0
        hessian, cross = moments(x, seen)
        options: dict[str, Any] = {"scale_dtype": torch.bfloat16, "damp": 0.01, "act_order": act_order}
        result = gptq(weight, hessian, spec, cross=cross, alpha=alpha, **options).weight
        target = weight + alpha * (naive_shifted_weight(weight, x, seen, 0.01) - weight)
        codes, rounded = naive_gptq(target, hessian, spec, observer=minmax_observer, **options)
        assert (result.codes != codes).double().mean() < 0.01
        error = naive_two_output_error(weight, x, rounded, seen)
        assert naive_two_output_error(weight, x, result.dequantize(), seen) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"w{spec.bits}_{spec.granularity}")
def test_is_gptq_on_the_weight_that_least_squares_gives(spec: QuantSpec, act_order, alpha: float) -> None:
    check_oracle(spec, act_order=act_order, alpha=alpha)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rows @ cross", "rows @ cross.T"),
        ("alpha=alpha", "alpha=-alpha"),
        ("alpha=alpha", "alpha=1.0"),
        ("pivots.square()", "pivots"),
        ("moved[place].T", "moved.T"),
        (".T[order]", ".T"),
        ("L.T, moved, upper=True", "L, moved, upper=False"),
        ("torch.add(rows, moved", "torch.add(0.0 * rows, moved"),
    ],
)
def test_oracle_notices_a_broken_copy(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    monkeypatch.setattr(solver, "shifted_weight", mutant(real, old, new).shifted_weight)
    with pytest.raises(AssertionError):
        check_oracle(SPECS[0], act_order=True, alpha=0.5)


@pytest.mark.parametrize("rows", [1, 5, 4096])
def test_slices_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(real, "_ROWS", rows)
    check_oracle(SPECS[2], act_order=True, alpha=1.0)


def errors(spec: QuantSpec, seed: int) -> dict[str, float]:
    """Output error against the float layer: of GPTQ, of the paper's steps, of ours."""
    weight, (x, seen) = random_weight(24, 64, seed), drifted_inputs(512, 64, seed)
    hessian, cross = moments(x, seen)
    options: dict[str, Any] = {"scale_dtype": torch.float32, "damp": 0.01, "act_order": True}
    naive = options | {"observer": minmax_observer}
    rounded = {
        "gptq": gptq(weight, hessian, spec, **options).weight.dequantize(),
        "paper": naive_gptq(weight, hessian, spec, cross=cross, **naive)[1],
        "ours": gptq(weight, hessian, spec, cross=cross, **options).weight.dequantize(),
        "not rounded": naive_shifted_weight(weight, x, seen, 0.01),
    }
    return {name: naive_two_output_error(weight, x, each, seen) for name, each in rounded.items()}


@pytest.mark.parametrize("seed", range(3))
def test_with_codes_fine_enough_it_reaches_the_least_squares_optimum_and_the_papers_steps_do_not(seed: int) -> None:
    found = errors(FINE, seed)
    assert found["ours"] < 1.02 * found["not rounded"]
    assert found["not rounded"] < found["paper"] < found["gptq"]
    assert found["ours"] < 0.98 * found["paper"]


@pytest.mark.parametrize("bits", [2, 3])
def test_beats_gptq_and_the_papers_steps_with_few_bits(bits: int) -> None:
    spec = QuantSpec(bits=bits, granularity=Granularity.GROUP, group_size=32)
    found = [errors(spec, seed) for seed in range(4)]
    total = {name: sum(each[name] for each in found) for name in found[0]}
    assert total["ours"] < 0.6 * min(total["paper"], total["gptq"])


@pytest.mark.parametrize("act_order", [False, True])
def test_without_drift_or_alpha_it_is_gptq(act_order) -> None:
    weight, (x, seen) = random_weight(12, 48, 0), drifted_inputs(300, 48, 0)
    hessian, cross = moments(x, seen)
    plain = gptq(weight, hessian, SPECS[0], scale_dtype=torch.float32, act_order=act_order).weight
    for more in ({"cross": torch.zeros_like(cross)}, {"cross": cross, "alpha": 0.0}):
        same = gptq(weight, hessian, SPECS[0], scale_dtype=torch.float32, act_order=act_order, **more).weight
        assert torch.equal(same.codes, plain.codes)
        assert torch.equal(same.scale, plain.scale)


def solved(
    x: Tensor, seen: Tensor, scheme: Scheme, module: types.ModuleType = layer, **options: Any
) -> tuple[Tensor, Tensor, LayerRecord]:
    """Weight, rounded weight and record of one layer in a run with two chains."""
    weight = random_weight(24, x.shape[1], 3)
    work = Work(weight, None, scheme, stats_of(x, seen), torch.float32)
    codes, record = module.quantize_layers({"q": work}, Gptaq(**{"alpha": 1.0} | options))["q"]
    return weight, codes.dequantize(), record


def check_record(module: types.ModuleType = layer) -> None:
    x, seen = drifted_inputs(300, 64, 1)
    scheme = get_scheme("w8a16").with_weight(group_size=32)
    weight, rounded, record = solved(x, seen, scheme, module)
    power = naive_two_output_error(weight, x, torch.zeros_like(weight), seen)
    plain = round_to_nearest(weight, scheme.weight, scale_dtype=torch.float32).dequantize()
    wanted = [naive_two_output_error(weight, x, each, seen) / power for each in (rounded, plain)]
    assert (record.loss, record.loss_rtn) == pytest.approx(wanted, rel=1e-3)
    # Judged on x̂ alone, what moved the weight would look far worse than plain rounding to 8 bits
    assert record.loss is not None
    assert record.loss_rtn is not None
    assert record.loss < 0.9 * record.loss_rtn
    assert (record.quantizer, record.notes) == ("gptaq minmax", ())


def test_record_holds_the_error_against_the_float_model() -> None:
    check_record()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight @ cross", "weight @ cross.T"),
        ("alpha=2.0", "alpha=-2.0"),
        ("+ row_losses(weight, drift)", ""),
        ("row_losses(delta, hessian) + row", "row"),
    ],
)
def test_records_notice_a_broken_loss(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    monkeypatch.setattr(layer, "row_losses_of_two", mutant(loss, old, new).row_losses_of_two)
    with pytest.raises(AssertionError):
        check_record()


def test_what_is_worse_against_the_float_model_is_reverted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = drifted_inputs(300, 64, 1)
    scheme = get_scheme("w8a16").with_weight(group_size=32)

    def away(weight: Tensor, cross: Tensor, *args: Any) -> Tensor:
        return 2.0 * weight - real.shifted_weight(weight, cross, *args)

    monkeypatch.setattr(solver, "shifted_weight", away)
    _, _, record = solved(x, seen, scheme)
    assert record.quantizer == "rtn minmax"
    assert "gptaq reverted: " in record.notes[0]
    assert record.loss == record.loss_rtn


def test_layers_solved_together_are_as_alone() -> None:
    stats, scheme = stats_of(*drifted_inputs(300, 64, 1)), get_scheme("w3a16").with_weight(group_size=32)
    works = {f"{n}": Work(random_weight(n, 64, n), None, scheme, stats, torch.float32) for n in (70, 1, 13)}
    together = quantize_layers(works, Gptaq())
    for name, work in works.items():
        codes, record = quantize_layers({name: work}, Gptaq())[name]
        assert (together[name][0].codes != codes.codes).double().mean() < 0.01
        assert together[name][1].loss == pytest.approx(record.loss, rel=1e-2)


def test_a_hessian_that_cannot_be_factored_is_rounded_to_nearest_from_the_weight_itself() -> None:
    x, seen = drifted_inputs(300, 64, 1)
    _, rounded, record = solved(x, torch.zeros_like(seen), get_scheme("w4a16").with_weight(group_size=32))
    weight = random_weight(24, 64, 3)
    spec = get_scheme("w4a16").with_weight(group_size=32).weight
    assert torch.equal(rounded, round_to_nearest(weight, spec, scale_dtype=torch.float32).dequantize())
    assert any("every input is 0" in note for note in record.notes)
    assert record.loss == pytest.approx(1.0), "nothing of the float output is left"


def test_other_quantizers_do_not_look_at_the_cross_term() -> None:
    x, seen = drifted_inputs(300, 64, 1)
    scheme = get_scheme("w3a16").with_weight(group_size=32)
    work = Work(random_weight(24, 64, 3), None, scheme, stats_of(x, seen), torch.float32)
    codes, _ = quantize_layers({"q": work}, Gptq())["q"]
    assert work.stats is not None
    assert work.stats.hessian is not None
    plain = gptq(work.weight, work.stats.hessian, scheme.weight, scale_dtype=torch.float32).weight
    assert torch.equal(codes.codes, plain.codes)
