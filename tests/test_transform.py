"""One fold: its record against errors computed token by token, what it changes, and what it leaves alone."""

import types
from typing import Any

import pytest
import torch
from oracles import correlated_inputs, mutant, random_weight
from torch import Tensor, nn

from vlaquant.calibrate import observe
from vlaquant.families import FoldGroup
from vlaquant.numerics import fake_quantize, qparams, quantize_weight
from vlaquant.passes import fold
from vlaquant.passes import transform as real
from vlaquant.passes.awq import awq_scales
from vlaquant.passes.layer import Work
from vlaquant.passes.smoothquant import smooth_scale
from vlaquant.passes.transform import TransformRecord
from vlaquant.recipe import Awq, SmoothQuant, Transform
from vlaquant.scheme import PRESETS, Scheme

SCHEMES = {
    "w4a16": PRESETS["w4a16"].with_weight(group_size=32),
    "w8a8": PRESETS["w8a8"],
    "w8a8_static": PRESETS["w8a8_static"],
}
TRANSFORMS: dict[str, Transform] = {
    "awq": Awq(grid=8),
    "smoothquant": SmoothQuant(alpha=0.5),
    "search": SmoothQuant(alpha="search"),
}
#: ``b`` and ``c`` read ``norm``; ``d`` reads ``c``.
NORM, LINEAR = FoldGroup("norm", ("b", "c")), FoldGroup("c", ("d",))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.b, self.c, self.d = nn.LayerNorm(32), nn.Linear(32, 12), nn.Linear(32, 64), nn.Linear(64, 8)
        for seed, linear in enumerate((self.b, self.c, self.d)):
            linear.weight.data = random_weight(linear.out_features, linear.in_features, seed=seed)
        # Channels of very different size are what scales are for
        self.norm.weight.data = correlated_inputs(1, 32, seed=5)[0].abs() + 0.1
        self.norm.weight.data[:2] *= 8.0
        self.c.weight.data *= correlated_inputs(1, 64, seed=6)[0].abs().unsqueeze(-1) + 0.1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x)
        return self.b(normed), self.d(self.c(normed))


def made(scheme: Scheme, module: types.ModuleType = real) -> tuple[Layers, dict[str, Work], Tensor]:
    """The layers, work on them, and the tokens that calibration saw; all of them are in its sample."""
    torch.manual_seed(0)
    model, x = Layers(), correlated_inputs(100, 32, seed=0)
    names = ["b", "c", "d"]
    with torch.no_grad(), observe(model, names, hessian_for=names, sample_rows=200) as observation:
        model(x)
    works, stats = {}, observation.stats()
    for name in names:
        linear: Any = model.get_submodule(name)
        works[name] = module.Work(linear.weight.detach(), linear.bias.detach(), scheme, stats[name], torch.float32)
    return model, works, x


def losses(record: TransformRecord) -> tuple[float, float]:
    assert record.loss_before is not None
    assert record.loss_after is not None
    return record.loss_before, record.loss_after


def _mean_abs(work: Work) -> Tensor:
    assert work.stats is not None
    return work.stats.mean_abs


def outputs(model: Layers, works: dict[str, Work], x: Tensor) -> dict[str, Tensor]:
    """What every Linear would compute with its working weight, in float64."""
    normed = model.norm(x).detach().double()
    results: dict[str, Tensor] = {}
    for name, source in (("b", normed), ("c", normed), ("d", None)):
        inputs = results["c"] if source is None else source
        bias = works[name].bias
        assert bias is not None
        results[name] = inputs @ works[name].weight.double().T + bias.double()
    return results


def naive_loss(works: dict[str, Work], group: FoldGroup, scale: Tensor) -> float:
    """Error of the group's outputs with one scale, as a share of their square."""
    error = power = 0.0
    for name in group.targets:
        work = works[name]
        assert work.stats is not None
        rounded = quantize_weight(work.weight * scale, work.scheme.weight, scale_dtype=torch.float32).dequantize()
        scaled, spec = work.stats.sample / scale, work.scheme.activation
        for token, inputs in zip(work.stats.sample, scaled, strict=True):
            seen = inputs
            if spec is not None:
                low, high = inputs.aminmax() if spec.dynamic else scaled.aminmax()
                seen = fake_quantize(inputs, *qparams(low, high, spec, torch.float32), spec)
            wanted = work.weight.double() @ token.double()
            error += float((wanted - rounded.double() @ seen.double()).square().sum())
            power += float(wanted.square().sum())
    return error / power


def naive_best(works: dict[str, Work], group: FoldGroup, kind: str) -> float:
    """The least error of all scales that the transform tries."""
    stats, weights = works[group.targets[0]].stats, [works[name].weight for name in group.targets]
    assert stats is not None
    scales = [smooth_scale(stats.absmax, weights, 0.5)]
    if kind == "search":
        scales = [torch.ones(()), *(smooth_scale(stats.absmax, weights, step / 20) for step in range(21))]
    if kind == "awq":
        scales = [scale for _, scale in awq_scales(stats.mean_abs, grid=8)]
    return min(naive_loss(works, group, scale) for scale in scales)


def check(module: types.ModuleType, scheme: str, kind: str, group: FoldGroup) -> None:
    model, works, x = made(SCHEMES[scheme], module)
    before, no_scale = outputs(model, works, x), torch.ones(())
    loss, best = naive_loss(works, group, no_scale), naive_best(works, group, kind)
    record = module.transform_group_(model, group, works, TRANSFORMS[kind])
    assert record.loss_before == pytest.approx(loss, rel=1e-3)
    assert record.loss_after == pytest.approx(best, rel=1e-3)
    assert (record.kind, record.source, record.targets) == (TRANSFORMS[kind].kind, group.source, group.targets)
    assert record.kept == (record.loss_after < record.loss_before)
    assert record.reverted is None
    after = outputs(model, works, x)
    for name in {"b", "c", "d"} - {group.source}:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)
    if record.kept:
        assert record.loss_after == pytest.approx(naive_loss(works, group, no_scale), rel=1e-3)


@pytest.mark.parametrize("group", [NORM, LINEAR], ids=["norm", "linear"])
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_record_and_function(scheme: str, kind: str, group: FoldGroup) -> None:
    check(real, scheme, kind, group)


@pytest.mark.parametrize(
    ("old", "new", "scheme", "group"),
    [
        ("rounded.div_(scale).sub_(weight)", "rounded.sub_(weight)", "w4a16", NORM),
        ("(stats.sample / scale, work.scheme", "(stats.sample, work.scheme", "w8a8", NORM),
        ("(stats.channel_high / scale).max()", "stats.high", "w8a8_static", NORM),
        ("min_max(x)", "x.aminmax()", "w8a8", NORM),
        ("kept = best.loss < best.loss_rtn", "kept = best.loss > best.loss_rtn", "w4a16", LINEAR),
    ],
)
def test_check_notices_a_broken_copy(old: str, new: str, scheme: str, group: FoldGroup) -> None:
    broken = mutant(real, old, new)
    with pytest.raises(AssertionError):
        check(broken, scheme, "awq", group)


@pytest.mark.parametrize(
    ("old", "new", "group"),
    [
        ("weight * columns.to(weight), bias", "weight / columns.to(weight), bias", NORM),
        ("work.stats = scaled[id(work.stats)]", "pass", NORM),
        ("return weight / scale.unsqueeze(-1)", "return weight * scale.unsqueeze(-1)", LINEAR),
        ("None if bias is None else bias / scale", "bias", LINEAR),
    ],
)
def test_check_notices_a_broken_fold(old: str, new: str, group: FoldGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "apply_fold_", mutant(fold, old, new).apply_fold_)
    with pytest.raises(AssertionError):
        check(real, "w4a16", "awq", group)


@pytest.mark.parametrize(
    ("scheme", "kind"), [("w4a16", "awq"), ("w8a8_static", "smoothquant"), ("w8a8_static", "search")]
)
def test_a_scale_that_helps_is_kept(scheme: str, kind: str) -> None:
    model, works, _ = made(SCHEMES[scheme])
    record = real.transform_group_(model, NORM, works, TRANSFORMS[kind])
    assert record.kept
    assert losses(record)[1] < 0.9 * losses(record)[0]
    assert 0.0 < record.strength <= 1.0


def test_targets_go_on_sharing_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, works, _ = made(SCHEMES["w4a16"])
    before = works["b"].stats
    assert real.transform_group_(model, NORM, works, TRANSFORMS["awq"]).kept
    assert works["b"].stats is works["c"].stats is not before
    apart = mutant(fold, "if id(work.stats) not in scaled:", "if True:")
    monkeypatch.setattr(real, "apply_fold_", apart.apply_fold_)
    model, works, _ = made(SCHEMES["w4a16"])
    real.transform_group_(model, NORM, works, TRANSFORMS["awq"])
    assert works["b"].stats is not works["c"].stats


@pytest.mark.parametrize("scheme", SCHEMES)
def test_search_by_some_rows_measures_its_choice_on_all(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every third row the scale is nearly as good as the best, and the record is that of all rows."""
    model, works, _ = made(SCHEMES[scheme])
    naive = [naive_loss(works, NORM, scale) for _, scale in awq_scales(_mean_abs(works["b"]), grid=8)]
    searched: list[int] = []
    round_weight = vars(real)["round_weight"]

    def noted(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        searched.append(len(weight))
        return round_weight(weight, *args, **kwargs)

    monkeypatch.setattr(real, "_SEARCHED_ROWS", 30)
    monkeypatch.setattr(real, "round_weight", noted)
    record = real.transform_group_(model, NORM, works, TRANSFORMS["awq"])
    assert searched == [4 + 22] * 7 + [12, 64] * 4
    assert record.loss_before == pytest.approx(naive[0], rel=1e-3)
    assert record.loss_after == pytest.approx(naive[round(record.strength * 8)], rel=1e-3)
    assert losses(record)[1] < min(naive) + 0.2 * (naive[0] - min(naive))


def test_targets_of_different_schemes_are_each_rounded_by_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1024, 30):
        monkeypatch.setattr(real, "_SEARCHED_ROWS", rows)
        model, works, _ = made(SCHEMES["w4a16"])
        works["b"].scheme = works["b"].scheme.with_weight(group_size="tensor", bits=8)
        naive = [naive_loss(works, NORM, scale) for _, scale in awq_scales(_mean_abs(works["b"]), grid=8)]
        record = real.transform_group_(model, NORM, works, TRANSFORMS["awq"])
        assert record.loss_before == pytest.approx(naive[0], rel=1e-3)
        assert record.loss_after == pytest.approx(naive[round(record.strength * 8)], rel=1e-3)


def test_a_scale_that_does_not_help_changes_nothing() -> None:
    model, works, _ = made(SCHEMES["w4a16"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: work.weight.clone() for name, work in works.items()}
    stats = {name: work.stats for name, work in works.items()}
    record = real.transform_group_(model, NORM, works, SmoothQuant(alpha=1.0))
    assert not record.kept
    assert losses(record)[1] >= losses(record)[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(work.weight, weights[name]) for name, work in works.items())
    assert all(work.stats is stats[name] for name, work in works.items())
