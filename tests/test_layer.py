"""Layers that read one tensor: solved as one they get the same bits as alone, and every layer's record is its own."""

import types
from dataclasses import replace
from typing import Literal

import pytest
import torch
from oracles import correlated_inputs, mutant, naive_output_error, random_weight
from torch import Tensor

from vlaquant.calibrate import ActStats
from vlaquant.calibrate.statistics import no_stats, row_keys
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.numerics import QuantizedWeight
from vlaquant.passes import gptq as real_gptq
from vlaquant.passes import layer as real
from vlaquant.passes.layer import Work, quantize_layers, solve_groups
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.recipe import Gptq, Quantizer, Rtn
from vlaquant.scheme import PRESETS, Scheme

GROUPED = PRESETS["w4a16"].with_weight(group_size=16)
SCHEMES: dict[str, Scheme] = {
    "group": GROUPED,
    "group_asym": GROUPED.with_weight(bits=3, symmetric=False),
    "channel": PRESETS["w8a8"],
    "tensor": GROUPED.with_weight(group_size="tensor"),
}
QUANTIZERS: dict[str, Quantizer] = {
    "gptq": Gptq(),
    "gptq in order": Gptq(act_order=False),
    "gptq mse": Gptq(clip="mse"),
    "gptq awq": Gptq(clip="awq"),
    "gptq refit": Gptq(refit=True),
    "rtn": Rtn(),
    "rtn mse": Rtn(clip="mse"),
    "rtn awq": Rtn(clip="awq"),
}
#: The same numbers of rows as few layers have, so that products of other shapes would show.
SIZES = {"q": 70, "k": 1, "v": 13}


def inputs(seed: int = 0, k: int = 64) -> Tensor:
    return correlated_inputs(300, k, seed)


def stats_of(x: Tensor, *, hessian: bool = True) -> ActStats:
    running = no_stats(x.shape[1], hessian=hessian, sample_rows=32, device=x.device)
    running.add_(x, row_keys(len(x), seed=0, sample=0, call=0))
    return running.stats()


def work_of(n: int, stats: ActStats | None, scheme: Scheme = GROUPED, *, seed: int = 0) -> Work:
    return Work(random_weight(n, 64, seed + n), None, scheme, stats, torch.bfloat16)


def together(scheme: Scheme = GROUPED) -> dict[str, Work]:
    stats = stats_of(inputs())
    return {name: work_of(n, stats, scheme) for name, n in SIZES.items()}


def assert_same_codes(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert (a.zero is None) == (b.zero is None)
    assert a.zero is None or b.zero is None or torch.equal(a.zero, b.zero)


def check_together(module: types.ModuleType, scheme: Scheme, quantizer: Quantizer) -> None:
    """Solved with others, a layer gets the bits that it gets alone, and all but the same record."""
    works = together(scheme)
    solved = module.quantize_layers(works, quantizer)
    assert list(solved) == list(works)
    for name, work in works.items():
        codes, record = module.quantize_layers({name: work}, quantizer)[name]
        assert_same_codes(solved[name][0], codes)
        losses = solved[name][1].loss, solved[name][1].loss_rtn
        assert losses == pytest.approx((record.loss, record.loss_rtn), rel=1e-5)
        assert replace(solved[name][1], loss=0.0, loss_rtn=0.0) == replace(record, loss=0.0, loss_rtn=0.0)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_together_is_as_alone(scheme: str, quantizer: str) -> None:
    if (scheme, quantizer) == ("tensor", "gptq in order"):
        quantizer = "gptq"
    check_together(real, SCHEMES[scheme], QUANTIZERS[quantizer])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("chosen.rows(part)", "chosen.rows(slice(0, part.stop - part.start))"),
        ("starts = [sum(counts[:i])", "starts = [sum(counts[:1])"),
        ("losses[part].sum()", "losses.sum()"),
        ("or spec.granularity is Granularity.TENSOR", ""),
    ],
)
def test_comparison_notices_a_broken_copy(old: str, new: str) -> None:
    broken = mutant(real, old, new)
    with pytest.raises(AssertionError):
        check_together(broken, SCHEMES["tensor"] if not new else GROUPED, Gptq())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_record_holds_the_errors_of_the_output(quantizer: str) -> None:
    x, works = inputs(), together()
    for name, (codes, record) in quantize_layers(works, QUANTIZERS[quantizer]).items():
        weight = works[name].weight
        power = naive_output_error(weight, x)
        plain = round_to_nearest(weight, GROUPED.weight, scale_dtype=torch.bfloat16)
        wanted = [naive_output_error(w.dequantize() - weight, x) / power for w in (codes, plain)]
        assert (record.loss, record.loss_rtn) == pytest.approx(wanted, rel=1e-3)
        assert (record.name, record.scheme) == (name, "w4a16_g16")
        used = QUANTIZERS[quantizer]
        reverted = len(record.notes) == 1
        assert record.quantizer == ("rtn minmax" if reverted else f"{used.kind} {used.clip}")
        # Ranges for the least error of weights may be worse for the output
        assert not reverted or quantizer == "rtn mse"


def test_only_what_can_be_solved_as_one_is() -> None:
    stats, same, other = stats_of(inputs()), stats_of(inputs()), stats_of(inputs(), hessian=False)
    works = {
        "q": work_of(8, stats),
        "o": work_of(8, same),
        "k": work_of(4, stats),
        "fine": work_of(8, stats, GROUPED.with_weight(bits=8)),
        "v": work_of(4, stats),
        "half": replace(work_of(8, stats), scale_dtype=torch.float16),
        "dead": work_of(8, None),
        "dead too": work_of(8, None),
        "ranges": work_of(8, other),
        "ranges too": work_of(8, other),
        "whole": work_of(8, stats, SCHEMES["tensor"]),
        "whole too": work_of(8, stats, SCHEMES["tensor"]),
        "int8 input": work_of(8, stats, replace(GROUPED, name="x", activation=PRESETS["w8a8"].activation)),
    }
    wanted = [("q", "k", "v", "int8 input"), ("o",), ("fine",), ("half",)]
    wanted += [(name,) for name in ("dead", "dead too", "ranges", "ranges too", "whole", "whole too")]
    assert solve_groups(works) == wanted
    assert list(quantize_layers(works, Gptq())) == list(works)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_weights_may_be_narrow(quantizer: str) -> None:
    narrow = {name: replace(work, weight=work.weight.bfloat16()) for name, work in together().items()}
    wide = {name: replace(work, weight=work.weight.float()) for name, work in narrow.items()}
    wanted = quantize_layers(wide, QUANTIZERS[quantizer])
    for name, (codes, record) in quantize_layers(narrow, QUANTIZERS[quantizer]).items():
        assert_same_codes(codes, wanted[name][0])
        assert record == wanted[name][1]


def test_one_factorization_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    factored: list[int] = []
    cholesky = real_gptq._cholesky_

    def counted(matrix: Tensor) -> bool:
        factored.append(len(matrix))
        return cholesky(matrix)

    monkeypatch.setattr(real_gptq, "_cholesky_", counted)
    quantize_layers(together(), Gptq())
    assert factored == [64]


def test_only_the_layer_that_got_worse_is_reverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of ``v`` are spoilt after solving: it alone goes back to plain rounding, and its record says so."""
    solve = vars(real)["gptq"]

    def spoilt(weight: Tensor, *args, **kwargs):
        result = solve(weight, *args, **kwargs)
        result.weight.codes[-SIZES["v"] :] *= -1
        return result

    works = together()
    right = quantize_layers(works, Gptq())
    monkeypatch.setattr(real, "gptq", spoilt)
    solved = quantize_layers(works, Gptq())
    for name in ("q", "k"):
        assert_same_codes(solved[name][0], right[name][0])
        assert solved[name][1] == right[name][1]
    codes, record = solved["v"]
    assert_same_codes(codes, round_to_nearest(works["v"].weight, GROUPED.weight, scale_dtype=torch.bfloat16))
    assert record.quantizer == "rtn minmax"
    assert record.loss == record.loss_rtn == right["v"][1].loss_rtn
    assert len(record.notes) == 1
    assert record.notes[0].startswith("gptq reverted: ")


@pytest.mark.parametrize("clip", ["minmax", "mse", "awq"])
def test_without_data_plain_rounding(clip: Literal["minmax", "mse", "awq"]) -> None:
    work = work_of(8, None)
    codes, record = quantize_layers({"a": work}, Gptq(clip=clip))["a"]
    used = "minmax" if clip == "minmax" else "mse"
    assert_same_codes(codes, round_to_nearest(work.weight, GROUPED.weight, scale_dtype=torch.bfloat16, clip=used))
    assert (record.quantizer, record.loss, record.loss_rtn, record.notes) == (f"rtn {used}", None, None, ())


def test_everything_out_of_the_ordinary_is_noted() -> None:
    weight = random_weight(8, 48, 0)
    x = torch.randint(-1200, 1200, (20, 48), generator=torch.Generator().manual_seed(0)).double()
    hessian = (x.T @ x + torch.eye(48)).float()

    def notes(hessian: Tensor, damp: float) -> tuple[str, ...]:
        work = Work(weight, None, GROUPED, replace(stats_of(inputs(k=48)), hessian=hessian), torch.float32)
        return quantize_layers({"a": work}, Gptq(damp=damp, act_order=False))["a"][1].notes

    assert notes(hessian, 0.01) == ()
    dead = hessian.clone()
    dead[3] = dead[:, 3] = 0.0
    assert notes(dead, 0.01) == ("1 input channels are always 0",)
    assert notes(torch.zeros(48, 48), 0.01) == (
        "48 input channels are always 0",
        "every input is 0; rounded to nearest",
    )
    hessian[3, 3] *= -1.0
    assert "not positive definite, even with damping 1" in notes(hessian, 0.01)[0]


def test_damping_and_float64_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    cholesky = real_gptq._cholesky_
    calls: list[torch.dtype] = []

    def late(matrix: Tensor) -> bool:
        calls.append(matrix.dtype)
        return len(calls) == 4 and cholesky(matrix)

    monkeypatch.setattr(real_gptq, "_cholesky_", late)
    record = quantize_layers(together(), Gptq(damp=0.01))["q"][1]
    assert calls == [torch.float32, torch.float64] * 2
    assert record.notes == ("damping raised to 0.1", "the Hessian was factored in float64")


def test_layers_with_bad_numbers_are_named() -> None:
    works = together()
    works["k"].weight[0, 3] = torch.inf
    with pytest.raises(CheckpointError, match=r"^k: the weight holds NaN or Inf"):
        quantize_layers(works, Gptq())
    works = together()
    stats = works["q"].stats
    assert stats is not None
    hessian = stats.hessian
    assert hessian is not None
    hessian[2, 2] = torch.nan
    with pytest.raises(CalibrationError, match=r"^q: the Hessian holds NaN or Inf"):
        quantize_layers(works, Rtn())


def test_record_says_nothing_of_time() -> None:
    """Two runs with the same result have the same manifest."""
    record = quantize_layers(together(), Gptq())["q"][1]
    assert set(record.to_dict()) == {"name", "scheme", "quantizer", "loss", "loss_rtn", "notes"}
    assert record == quantize_layers(together(), Gptq())["q"][1]
