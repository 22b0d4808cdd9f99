"""After a fold a stage is compared with before: right folds stay, wrong ones are found and undone without a trace."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_folds as tiny
import torch
from oracles import mutant
from tiny_pi0 import pi0, robot_observations
from torch import Tensor, nn

from vlaquant import QuantizationResult, quantize
from vlaquant.engine.fold_check import FoldCheck, relative_change
from vlaquant.engine.run import RunOptions
from vlaquant.families import FAMILIES, MODULE, FoldGroup, find_folds
from vlaquant.families.folds import Fold, llama_folds
from vlaquant.passes import fold as fold_module
from vlaquant.passes import transform as transform_module

RULES = [{"pattern": "blocks.*.modulation", "scheme": "float"}, {"part": "model", "scheme": "w8a16"}]
AWQ = {"kind": "awq", "grid": 8}
SMOOTH = {"kind": "smoothquant"}
LAYER_SCALE = {"kind": "layerscale"}

#: Folds that do not hold, by what is wrong with them.
ONE_READER_MISSING = Fold(tiny.BLOCK, "{block}.norm1", ("{block}.attn.q_proj", "{block}.attn.v_proj"))
OTHER_CHUNKS = replace(tiny.ADAPTIVE, chunks=("shift", "scale", "gate"))
NOT_LINEAR_BETWEEN = Fold(tiny.BLOCK, "{block}.fc1", ("{block}.fc2",))


def run(
    monkeypatch: pytest.MonkeyPatch,
    folds: tuple[Fold, ...],
    *transforms: dict[str, Any],
    block: type[tiny.Block] = tiny.Block,
    dtype: torch.dtype = torch.float32,
    rules: list[dict[str, Any]] = RULES,
    mode: Any = "replay",
    propagate: str = "quantized",
) -> tuple[QuantizationResult, Tensor]:
    """A run on the little transformer, and what the model gives for its first sample afterwards."""
    monkeypatch.setitem(FAMILIES, "toy", replace(MODULE, name="toy", folds=folds))
    model, samples = tiny.model(block, dtype), tiny.samples(dtype=dtype)
    recipe = {
        "family": "toy",
        "rules": rules,
        "transforms": list(transforms),
        "quantizer": {"kind": "rtn"},
        "propagate": propagate,
    }
    result = quantize(model, recipe, samples=samples, run=lambda model, x: model(x), options=RunOptions(mode=mode))
    with torch.inference_mode():
        return result, model(samples[0])


def same_bits(left: QuantizationResult, right: QuantizationResult) -> bool:
    a, b = left.model.state_dict(), right.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def float_output(dtype: torch.dtype = torch.float32, block: type[tiny.Block] = tiny.Block) -> Tensor:
    with torch.inference_mode():
        return tiny.model(block, dtype)(tiny.samples(dtype=dtype)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_folds_are_kept(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    result, output = run(monkeypatch, tiny.FOLDS, LAYER_SCALE, AWQ, SMOOTH, dtype=dtype)
    assert [record.reverted for record in result.transforms] == [None] * (2 + 2 * 2 * 5)
    kept = {record.source.partition(".")[2].partition(".")[2] for record in result.transforms if record.kept}
    assert len(kept & {"norm1", "attn.v_proj", "attn.o_proj", "modulation", "up", "norm3"}) >= 5
    assert {record.loss_before is None for record in result.transforms} == {True, False}
    assert relative_change(float_output(dtype), output) < 0.05


def _gemma_as_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, "norm_offset", lambda norm: 0.0)


def _other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query head h reads value head h % KV."""

    def spread(scale: Tensor, columns: int, head_dim: int | None) -> Tensor:
        return scale.repeat(columns // len(scale))

    monkeypatch.setattr(fold_module, "spread", spread)


def _any_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the probe's word on who reads what."""
    monkeypatch.setattr("vlaquant.engine.stage._eligible", lambda *_: True)


def _nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


WRONG: dict[str, tuple[Fold, type[tiny.Block], Callable[[pytest.MonkeyPatch], None]]] = {
    "a reader is missing": (ONE_READER_MISSING, tiny.Block, _any_reader),
    "also read without a Linear": (tiny.NORM, tiny.Leaking, _nothing),
    "values that others read": (tiny.VALUES, tiny.Remembering, _nothing),
    "order of chunks": (OTHER_CHUNKS, tiny.Block, _nothing),
    "Gemma as Llama": (tiny.NORM, tiny.Block, _gemma_as_llama),
    "query heads in another order": (tiny.VALUES, tiny.Block, _other_heads),
    "GELU between": (NOT_LINEAR_BETWEEN, tiny.Block, _nothing),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_fold_is_undone(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    fold, block, plant = WRONG[kind]
    plain, wanted = run(monkeypatch, (), AWQ, block=block, dtype=dtype)
    plant(monkeypatch)
    result, output = run(monkeypatch, (fold,), AWQ, block=block, dtype=dtype)
    # The last block's values are read by nobody else
    last = ["blocks.1"] if kind == "values that others read" else []
    wrong = [record for record in result.transforms if record.source.partition(".attn")[0] not in last]
    assert wrong
    assert not any(record.kept for record in wrong)
    assert all(record.reverted is not None and "changed the output of" in record.reverted for record in wrong)
    assert all(f"taken back: awq of {record.source}" in str(result) for record in wrong)
    if not last:
        assert same_bits(plain, result)
        assert torch.equal(wanted, output)


def test_a_fold_that_the_probe_speaks_against_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run(monkeypatch, (ONE_READER_MISSING,), AWQ)
    assert result.transforms == ()


@pytest.mark.parametrize("mode", ["replay", "rerun"])
@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_right_folds_beside_wrong_ones(monkeypatch: pytest.MonkeyPatch, mode: str, propagate: str) -> None:
    """Whatever comes before and after a wrong fold is as if it were not in the table."""
    right = (tiny.NORM, tiny.GATED, tiny.LAYER_NORM)
    only, wanted = run(monkeypatch, right, SMOOTH, AWQ, propagate=propagate)
    mixed = (tiny.NORM, OTHER_CHUNKS, tiny.GATED, NOT_LINEAR_BETWEEN, tiny.LAYER_NORM)
    result, output = run(monkeypatch, mixed, SMOOTH, AWQ, mode=mode, propagate=propagate)
    sources = {record.source.partition(".")[2].partition(".")[2] for record in result.transforms if record.reverted}
    assert sources == {"modulation", "fc1"}
    assert tuple(r for r in result.transforms if r.source.rpartition(".")[2] not in sources) == only.transforms
    assert same_bits(only, result)
    assert torch.equal(wanted, output)


def test_a_check_that_only_looks_at_the_unit_misses_what_goes_through_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a unit that acts in other ways than by what it returns is followed to the end of the run."""
    result, _ = run(monkeypatch, (tiny.VALUES,), AWQ, block=tiny.Remembering)
    assert [record.kept for record in result.transforms] == [False, True]
    assert "the whole run (0)" in str(result.transforms[0].reverted)


def test_the_values_of_a_policy_whose_expert_attends_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """π0: neither the language model's values nor the expert's may be scaled for their own ``o_proj`` alone."""
    folds = llama_folds(r".*\.(language_model|dit)\.layers\.\d+")
    monkeypatch.setitem(FAMILIES, "pi0", replace(FAMILIES["pi0"], folds=folds))
    model: Any = pi0(dtype=torch.bfloat16)
    recipe = {
        "rules": [{"part": part, "scheme": "w8a16", "group_size": 32} for part in ("language", "expert")],
        "transforms": [SMOOTH],
    }
    result = quantize(model, recipe, samples=robot_observations(4))
    undone = {record.source for record in result.transforms if record.reverted is not None}
    assert undone == {f"model.{part}.0.self_attn.v_proj" for part in ("vlm.language_model.layers", "dit.layers")} | {
        "model.dit.layers.1.self_attn.v_proj"
    }


def test_readers_that_stay_float_are_scaled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"pattern": f"blocks.*.{name}", "scheme": "float"} for name in ("k_proj", "v_proj", "up", "modulation")]
    result, output = run(monkeypatch, tiny.FOLDS[:2] + tiny.FOLDS[3:], AWQ, rules=[*rules, RULES[1]])
    before, after = tiny.model().state_dict(), result.model.state_dict()
    kept = [record for record in result.transforms if record.kept]
    scaled = {name for record in kept for name in (record.source, *record.targets)} - result.plan.quantized.keys()
    for name in ("attn.k_proj", "attn.v_proj", "up", "modulation"):
        assert any(layer.endswith(name) for layer in scaled)
    for name in scaled:
        assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    assert relative_change(float_output(), output) < 0.02


def test_layers_that_share_a_weight_are_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last reader stays float, as its weight is another module's too; a scale would part them."""

    class Tied(tiny.Block):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Embedding(1, tiny.WIDTH)
            self.again.weight = self.norm3.weight

    result, _ = run(monkeypatch, tiny.FOLDS, AWQ, block=Tied)
    assert not any("norm3" in record.source for record in result.transforms)
    assert any("norm1" in record.source for record in result.transforms)


def test_scales_of_value_heads_are_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that took the first head's statistics for all would choose other scales, and a worse error."""
    chosen = {}
    for name in ("mean(dim=0)", "select(0, 0)"):
        module = mutant(transform_module, "head_dim).mean(dim=0)", f"head_dim).{name}")
        monkeypatch.setattr("vlaquant.engine.stage.transform_group_", module.transform_group_)
        result, _ = run(monkeypatch, (tiny.VALUES,), AWQ)
        chosen[name] = [record.loss_after for record in result.transforms]
        assert all(record.kept for record in result.transforms)
    assert chosen["mean(dim=0)"] != chosen["select(0, 0)"]


def test_relative_change() -> None:
    x = torch.tensor([3.0, 4.0, -torch.inf])
    assert relative_change(x, x) == 0.0
    assert relative_change(x, torch.tensor([3.0, 4.5, 0.0])) == pytest.approx(0.1)
    assert relative_change(x, torch.tensor([3.0, torch.nan, 0.0])) == torch.inf
    assert relative_change(x, torch.tensor([3.0, torch.inf, 0.0])) == torch.inf
    assert relative_change(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_change(torch.zeros(2), torch.tensor([0.0, 1e-9])) == torch.inf
    assert relative_change(x, None) == relative_change(x, x[:2]) == torch.inf


class Cancelling(nn.Module):
    """Large terms that nearly cancel, so that rounding alone moves the output much."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(16, 32, generator=generator)
        self.layer = nn.Linear(64, 16, bias=False)
        self.layer.weight.data = torch.cat([weight, 1e-4 * torch.randn(16, 32, generator=generator) - weight], dim=1)

    def look(self) -> dict[str, Tensor]:
        x = torch.linspace(1.0, 2.0, 32).repeat(2)
        with torch.inference_mode():
            return {"layer": self.layer(x)}


@pytest.mark.parametrize(("factor", "fine"), [(1.0, True), (1.1, False)])
def test_the_bound_is_what_rounding_does_in_this_model(factor: float, fine: bool) -> None:  # noqa: FBT001
    model = Cancelling()
    check = FoldCheck(model, model.look)
    weight, scale = model.layer.weight.detach().clone(), torch.linspace(1.1, 3.7, 64)
    folded = (weight * scale) / scale * factor
    model.layer.weight.data = folded
    assert str(check.objection(())).endswith("rounding: 1e-05")
    model.layer.weight.data = weight
    noise = check.noise([model.layer])
    assert torch.equal(model.layer.weight, weight)
    model.layer.weight.data = folded
    assert (check.objection((), noise) is None) == fine
    assert check.objection(["layer"]) is None


def test_a_difference_of_a_hundredthousandth_is_seen() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.ones(8)
    check = FoldCheck(layer, lambda: {"layer": layer(x).detach()})
    weight = layer.weight.detach().clone()
    layer.weight.data = weight * (1.0 + 5e-6)
    assert check.objection(()) is None
    layer.weight.data = weight * (1.0 + 2e-5)
    assert str(check.objection(())).startswith("changed the output of layer by 2e-05 of its size")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_places_are_tried_without_a_trace(dtype: torch.dtype) -> None:
    """Scales that only change exponents leave every bit of the output, unless the fold is wrong."""
    model, x = tiny.model(dtype=dtype), tiny.samples(dtype=dtype)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, output = dict(model.named_parameters()), model(x)
    folds = find_folds(model, (*tiny.FOLDS, NOT_LINEAR_BETWEEN))
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output.clone()))

    def look() -> dict[str, Tensor]:
        model(x)
        return {name: seen[name] for name in seen if isinstance(model.get_submodule(name), nn.Linear)}

    check = FoldCheck(model, look)
    wrong = [fold for fold, why in zip(folds, check.wrong_places(model, folds), strict=True) if why is not None]
    assert {fold.source.partition(".")[2].partition(".")[2] for fold in wrong} == {"fc1"}
    assert len(wrong) == 2
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    exact = [fold for fold in folds if fold not in wrong and fold_module.only_exponents(model, fold)]
    assert {fold.source.rpartition(".")[2] for fold in exact} == {"v_proj", "o_proj", "up", "norm3"}
    for fold in exact:
        fold_module.try_fold_(model, fold)
    assert torch.equal(model(x), output)
    assert not torch.equal(model.blocks[0].up.weight, before["blocks.0.up.weight"])


def test_two_norms_of_one_modulation_are_told_apart() -> None:
    """The folds have the same source; only one of them is wrong."""
    modulation, x = nn.Linear(8, 32), torch.randn(5, 8)
    model = nn.ModuleDict({"modulation": modulation, "a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})

    def look() -> dict[str, Tensor]:
        scale_a, shift_a, scale_b, shift_b = modulation(x).chunk(4, dim=-1)
        return {"a": model["a"](x * (1 + scale_a) + shift_a), "b": model["b"](x * (1 + scale_b) + shift_b)}

    folds = [
        FoldGroup("modulation", ("a",), chunks=("scale", "shift", "-", "-")),
        FoldGroup("modulation", ("b",), chunks=("-", "-", "shift", "scale")),
    ]
    with torch.inference_mode():
        fine, wrong = FoldCheck(model, look).wrong_places(model, folds)
    assert fine is None
    assert str(wrong).startswith("changed the output of b")


def test_the_coarsest_dtype_of_a_unit_counts() -> None:
    unit = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4).bfloat16())
    outputs = {"x": torch.ones(100)}
    check = FoldCheck(unit, lambda: {name: tensor.clone() for name, tensor in outputs.items()})
    eps = torch.finfo(torch.bfloat16).eps
    outputs["x"] = torch.full((100,), 1.0 + 1.9 * eps)
    assert check.objection(()) is None
    outputs["x"] = torch.full((100,), 1.0 + 2.1 * eps)
    assert check.objection(()) is not None
