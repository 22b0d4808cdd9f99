"""Tokens that count for more or less than 1: statistics, gradients that weigh them, and runs with them."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import correlated_inputs, mutant
from staged import differing, in_memory, make_source, recipe_for, samples_for, skip_verification, streamed, written
from tiny import llama, observations, openvla
from tiny_families import TINY, family_of
from torch import Tensor, nn
from watched import Block, linear_names

import vlaquant
from vlaquant.calibrate import observe
from vlaquant.calibrate import statistics as real_statistics
from vlaquant.calibrate import token_weights as real_token_weights
from vlaquant.calibrate.masks import counted_weights
from vlaquant.calibrate.statistics import RunningStats, no_stats, row_keys
from vlaquant.engine.run import RunOptions
from vlaquant.errors import CalibrationError, PlanError, RecipeError
from vlaquant.families import family_of_model
from vlaquant.families.objectives import random_direction, roots, sampled_surprise
from vlaquant.passes.gptq import gptq
from vlaquant.passes.loss import output_loss, weight_loss
from vlaquant.scheme import get_scheme

CPU = torch.device("cpu")
TYPES = {"kind": "types", "image": 0.25, "text": 1.0, "action": 8.0}
GRADIENT = {"kind": "gradient"}


def weighted_stats(rows: Tensor, weights: Tensor, *, parts: int = 3, module: types.ModuleType = real_statistics) -> Any:
    running = module.no_stats(rows.shape[1], hessian=True, sample_rows=16, device=CPU)
    for index, (x, w) in enumerate(zip(rows.chunk(parts), weights.chunk(parts), strict=True)):
        running.add_(x, module.row_keys(len(x), seed=0, sample=index, call=0), w)
    return running


def check_weighted(module: types.ModuleType) -> None:
    torch.manual_seed(0)
    rows, weights = correlated_inputs(90, 530, seed=0), torch.rand(90) * 3.0
    stats, shares = weighted_stats(rows, weights, module=module).stats(), (weights / weights.sum()).double()
    wanted = torch.einsum("t,ti,tj->ij", shares, rows.double(), rows.double())
    torch.testing.assert_close(stats.hessian.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.mean_abs.double(), shares @ rows.double().abs(), rtol=1e-5, atol=1e-7)
    assert torch.equal(stats.channel_low, rows.amin(dim=0)), "ranges are those of all tokens"
    where = [int((rows == row).all(dim=1).nonzero()) for row in stats.sample]
    assert torch.equal(stats.sample_weights, weights[where]), "each sampled token kept its weight"


def test_weighted_means_match_the_definition() -> None:
    check_weighted(real_statistics)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weights.sqrt().unsqueeze(-1)", "weights.unsqueeze(-1)"),
        ("self.abs_sum += weights @ rows.abs()", "self.abs_sum += rows.abs().sum(dim=0)"),
        ("self.weight += weights.sum(dtype=torch.float64)", "self.weight += len(rows)"),
        ("torch.cat([self.sample_weights, weights])[kept]", "torch.cat([self.sample_weights, weights])[: len(kept)]"),
    ],
)
def test_the_definition_notices_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_weighted(mutant(real_statistics, old, new))


def test_a_weight_of_two_is_the_token_twice_and_of_zero_is_none() -> None:
    rows = correlated_inputs(40, 8, seed=1)
    weights = torch.tensor([2.0, 1.0, 0.0, 1.0] * 10)
    found = weighted_stats(rows, weights).stats()
    times = rows.repeat_interleave(weights.long(), dim=0)
    wanted = weighted_stats(times, torch.ones(len(times))).stats()
    torch.testing.assert_close(found.hessian, wanted.hessian)
    torch.testing.assert_close(found.mean_abs, wanted.mean_abs)


def test_weights_of_one_change_no_bit() -> None:
    rows = correlated_inputs(70, 8, seed=2)
    with_ones, without = (
        weighted_stats(rows, torch.ones(70)).stats(),
        no_stats(8, hessian=True, sample_rows=16, device=CPU),
    )
    for index, x in enumerate(rows.chunk(3)):
        without.add_(x, row_keys(len(x), seed=0, sample=index, call=0))
    found = without.stats()
    assert found.hessian is not None
    assert torch.equal(with_ones.hessian, found.hessian)
    assert found.sample_weights is None


def test_tokens_that_all_weigh_nothing_make_no_nan() -> None:
    stats = weighted_stats(torch.randn(12, 4), torch.zeros(12)).stats()
    assert bool((stats.hessian == 0).all())
    assert bool((stats.mean_abs == 0).all())


def test_losses_of_searches_are_weighted_alike() -> None:
    x, weights = correlated_inputs(50, 16, seed=3), torch.rand(50)
    w, rounded = torch.randn(6, 16), torch.randn(6, 16)
    hessian = weighted_stats(x, weights).stats().hessian
    assert output_loss(x, w, x, rounded, weights) == pytest.approx(weight_loss(w - rounded, hessian), rel=1e-4)


def test_gptq_spends_its_error_where_tokens_weigh_little() -> None:
    torch.manual_seed(4)
    x, w = correlated_inputs(400, 64, seed=4), torch.randn(32, 64)
    spec = get_scheme("w3a16").with_weight(group_size=32).weight
    important = torch.arange(400) < 20
    weights = torch.where(important, 50.0, 1.0)
    errors = []
    for each in (weights, torch.ones(400)):
        hessian = weighted_stats(x, each).stats().hessian
        delta = gptq(w, hessian, spec, scale_dtype=torch.float32)
        errors.append(float((x[important] @ (delta.weight.dequantize() - w).T).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_weights_of_calls_are_taken_in_turn_and_masked() -> None:
    model, x = nn.ModuleList([nn.Linear(4, 2)]), torch.randn(1, 6, 4)
    mask = torch.tensor([[True, True, False, True, True, False]])
    turns = [torch.rand(1, 6), torch.rand(1, 6)]
    with observe(model, ["0"], hessian_for=["0"]) as observation:
        observation.begin_sample({"0": mask}, weights={"0": turns})
        for _ in range(3):
            model[0](x)
    kept, rows = mask[0], x[0, mask[0]].repeat(3, 1)
    weights = torch.cat([turns[call % 2][0, kept] for call in range(3)])
    wanted = weighted_stats(rows, weights, parts=1).stats()
    torch.testing.assert_close(observation.stats()["0"].hessian, wanted.hessian)
    assert observation.stats()["0"].tokens == 12


def test_layers_that_read_the_same_but_weigh_it_otherwise_part() -> None:
    model, x = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)]), torch.randn(1, 6, 4)
    first, second = torch.rand(1, 6), torch.rand(1, 6)
    with observe(model, ["0", "1", "2"], hessian_for=["0", "1", "2"]) as observation:
        observation.begin_sample(weights={"0": [first], "1": [first.clone()], "2": [second]})
        for layer in model:
            layer(x)
    assert observation.shared() == {"0": "0", "1": "0", "2": "2"}
    for name, weights in (("1", first), ("2", second)):
        wanted = weighted_stats(x[0], weights[0], parts=1).stats()
        torch.testing.assert_close(observation.stats()[name].hessian, wanted.hessian)


@pytest.mark.parametrize("weights", [torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, torch.nan]]), torch.ones(1, 3)])
def test_bad_weights_are_refused(weights: Tensor) -> None:
    with pytest.raises(CalibrationError, match="token weights"):
        counted_weights("one", torch.randn(1, 2, 4), None, weights)


@torch.no_grad()
def oracle_gradients(block: Block, x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """∂L/∂y by finite differences of an addition to each layer's output."""
    found = {}
    for name in linear_names(block):
        layer = block.get_submodule(name)
        shape = (*x.shape[:-1], layer.out_features)
        moved = torch.zeros(shape)
        gradient = torch.zeros(shape)
        hook = layer.register_forward_hook(lambda _m, _a, output, moved=moved: output + moved)
        for place in range(moved.numel()):
            ends = []
            for step in (1e-4, -1e-4):
                moved.flatten()[place] = step
                block.calls = 0
                ends.append(float((block(x) * direction).sum()))
            moved.flatten()[place] = 0.0
            gradient.flatten()[place] = (ends[0] - ends[1]) / 2e-4
        hook.remove()
        found[name] = gradient
    return found


def check_gradients(module: types.ModuleType) -> None:
    torch.manual_seed(0)
    block, x, direction = Block(4).double(), torch.randn(1, 3, 4).double(), torch.randn(1, 3, 4).double()
    torch.set_default_dtype(torch.float64)
    try:
        gradients = oracle_gradients(block, x, direction)
    finally:
        torch.set_default_dtype(torch.float32)
    layers = [name for name in linear_names(block) if name != "unused"]
    block.calls = 0
    found = module.gradient_weights(
        block, layers, lambda: torch.sum(block(x) * direction), shared=[("q", "k", "v"), ("gate", "up")]
    )
    sizes = {name: gradients[name].square().sum(dim=-1) for name in layers}
    for names in (("q", "k", "v"), ("gate", "up"), ("o",), ("down",), ("odd",)):
        wanted = torch.stack([sizes[name] for name in names]).sum(dim=0).float()
        for name in names:
            torch.testing.assert_close(found[name], [wanted], rtol=1e-4, atol=1e-6)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.parameters())


def test_weights_are_squared_gradients_of_outputs() -> None:
    check_gradients(real_token_weights)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gradient.float().square().sum(dim=-1)", "gradient.float().abs().sum(dim=-1)"),
        (".sum(dim=0)\n", ".mean(dim=0)\n"),
        ("parameter.requires_grad = True", "parameter.requires_grad = False"),
    ],
)
def test_finite_differences_notice_a_broken_copy(old: str, new: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_gradients(mutant(real_token_weights, old, new))


def test_layers_that_the_decision_does_not_depend_on_are_named() -> None:
    block, x = Block(4), torch.randn(1, 3, 4)
    with pytest.raises(CalibrationError, match="no gradient of the action reaches unused"):
        real_token_weights.gradient_weights(block, linear_names(block), lambda: block(x).sum())
    with pytest.raises(CalibrationError, match="reaches no layer"):
        real_token_weights.gradient_weights(block, ["q"], x.sum)
    with pytest.raises(CalibrationError, match="is nan"):
        real_token_weights.gradient_weights(block, ["q"], lambda: block(x).sum() * torch.nan)


def squared_gradients(values: Tensor, scalar: Any, draws: int) -> Tensor:
    total = torch.zeros_like(values)
    for _ in range(draws):
        leaf = values.clone().requires_grad_()
        scalar(leaf).backward()
        assert leaf.grad is not None
        total += leaf.grad.square()
    return total / draws


def test_squared_gradients_of_surprise_are_the_fisher_information() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5) * 2.0
    p = logits.softmax(dim=-1)
    found = squared_gradients(logits, sampled_surprise, 4000)
    torch.testing.assert_close(found, p * (1 - p), rtol=0.2, atol=0.01)


def test_squared_gradients_of_a_random_direction_are_one_for_every_number() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 4)
    assert torch.equal(squared_gradients(values, random_direction, 5), torch.ones(3, 4))
    found = squared_gradients(values, lambda v: random_direction(roots((v - 2.0).square())), 5)
    torch.testing.assert_close(found, torch.ones(3, 4))


def parts_of(name: str) -> list[str]:
    return [part for part in TINY[name].parts if part not in {"action", "head"}]


@pytest.mark.parametrize("name", TINY)
def test_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Weights fit what its layers read, and change what is made of them."""
    directory, samples = TINY[name].save(tmp_path / "model", monkeypatch), TINY[name].samples()
    family = family_of(directory)
    recipe: dict[str, Any] = {
        "rules": [{"part": part, "scheme": "w4a16", "group_size": 32} for part in parts_of(name)],
        "on_indivisible": "channel",
        "quantizer": {"kind": "gptq"},
    }
    plain = vlaquant.quantize(family.load(directory), recipe, samples=samples)
    for weights in (TYPES, GRADIENT):
        model, asked = family.load(directory), recipe | {"token_weights": weights}
        if name == "hf: llama" and weights is TYPES:
            with pytest.raises(CalibrationError, match="no tokens of different types"):
                vlaquant.quantize(model, asked, samples=samples)
            continue
        weighted = vlaquant.quantize(model, asked, samples=samples)
        pairs = codes(plain.model, weighted.model)
        parts = {family.part_of(layer) for layer, (one, other) in pairs.items() if not torch.equal(one, other)}
        assert "language" in parts
        if weights is TYPES:
            assert "projector" not in parts, "it reads tokens of one type only"


def codes(*models: nn.Module | None) -> dict[str, tuple[Tensor, ...]]:
    tensors = [model.state_dict() for model in models if model is not None]
    return {key: tuple(each[key] for each in tensors) for key in tensors[0] if key.endswith("weight_packed")}


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_types_of_openvla_say_what_each_position_is(decoding: str) -> None:
    model, sample = openvla(parallel=decoding == "parallel"), observations(1)[0]
    family = family_of_model(model)
    inputs = family.inputs(model, sample)
    kinds = family.token_types(model, inputs)["language"][0].tolist()
    width = family.run(model, inputs).shape[1]
    assert len(kinds) == width
    images = model.image_tokens
    assert kinds[1 : 1 + images] == [0] * images
    assert kinds[0] == 1
    actions = kinds.count(3)
    assert sample.action is not None
    assert actions == (sample.action.size if decoding == "autoregressive" else len(model.config.action_query_token_ids))
    assert kinds[-actions:] == [3] * actions


@pytest.mark.parametrize("weights", [TYPES, GRADIENT], ids=["types", "gradient"])
def test_streamed_equals_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any]) -> None:
    skip_verification(monkeypatch)
    source = make_source(tmp_path / "source", "openvla")
    recipe = recipe_for("openvla", "awq + gptq", "w4a16", token_weights=weights)
    samples = samples_for("openvla")
    streamed(source, recipe, samples, tmp_path / "out")
    assert differing(written(tmp_path / "out"), in_memory(source, recipe, samples)) == []


def test_gradients_take_the_whole_model_and_say_so_where_it_does_not_fit(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    recipe = recipe_for("llama", "gptq", "w4a16", token_weights=GRADIENT)
    with pytest.raises(PlanError, match="needs the whole float model at once"):
        vlaquant.quantize(
            source, recipe, samples=samples_for("llama"), output=tmp_path / "out", options=RunOptions(max_memory=1)
        )


def test_a_function_that_runs_samples_cannot_be_weighed() -> None:
    recipe = recipe_for("llama", "gptq", "w4a16", token_weights=GRADIENT)
    with pytest.raises(CalibrationError, match="token_weights"):
        vlaquant.quantize(llama(), recipe, samples=samples_for("llama"), run=lambda model, ids: model(ids))


def test_power_levels_weights_out() -> None:
    def heaviest(power: float) -> float:
        recipe = recipe_for("llama", "gptq", "w4a16", token_weights={"kind": "gradient", "power": power})
        seen: list[Tensor] = []
        add = RunningStats.add_

        def noted(self: RunningStats, rows: Tensor, keys: Tensor, weights: Tensor | None = None) -> None:
            assert weights is not None
            seen.append(weights)
            add(self, rows, keys, weights)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunningStats, "add_", noted)
            vlaquant.quantize(llama(), recipe, samples=samples_for("llama"))
        first = torch.cat(seen[:1])
        return float(first.max() / first.mean())

    assert heaviest(0.25) < 0.8 * heaviest(1.0)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "types", "image": -1.0}, "image"),
        ({"kind": "types", "image": 0.0, "text": 0.0, "state": 0.0, "action": 0.0}, "weighs all tokens 0"),
        ({"kind": "gradients"}, "gradient"),
        ({"kind": "gradient", "power": 0.0}, "power"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        vlaquant.quantize(llama(), recipe_for("llama", "gptq", "w4a16", token_weights=section))


def test_they_need_data() -> None:
    with pytest.raises(RecipeError, match="token_weights"):
        vlaquant.quantize(llama(), recipe_for("llama", "rtn", "w4a16", token_weights=TYPES))
