"""What a probe run proves about units: which a cache can stand in for, why not others, and how long outputs last."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flowing
import pytest
import torch
from tiny import llama
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.calibrate import flow as flow_module
from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.probing import probe
from vlaquant.calibrate.provenance import Provenance
from vlaquant.calibrate.units import find_units


def flow_of(kind: str, *, inference: bool = True) -> Flow:
    model, samples, run = flowing.made(kind)
    with torch.inference_mode(inference):
        return probe(model, lambda: run(model, samples[0])).flow


@pytest.mark.parametrize("mode", ["inference", "grad"])
@pytest.mark.parametrize("kind", flowing.REPLAYABLE)
def test_units_that_only_return_are_replayable(kind: str, mode: str) -> None:
    flow = flow_of(kind, inference=mode == "inference")
    assert flow.replayable == {stage.unit for stage in flow.stages} - flow.dead
    assert set(flow.reasons) == flow.dead
    assert str(flow).startswith("replay: all ")


REASONS = {
    "changing": ("blocks.0", "changes in place a tensor that it did not make"),
    "keeping": ("blocks.1", "code outside of the blocks reads a tensor that blocks.1 made and did not return"),
    "caching": ("blocks.0", "blocks.1 reads a tensor that blocks.0 made and did not return"),
    "looping": ("blocks.1", "its forward runs 3 times a sample"),
    "piecewise": ("blocks.2", "its forward never runs; its layers are called one by one"),
    "wrapping": ("blocks.0", "its forward returns a Output, which cannot be stored"),
    "noisy": ("blocks.3", "it draws random numbers"),
    "aliasing": ("blocks.1", "memory is known elsewhere too, and code outside of the blocks changes it"),
    "outside_layer": ("blocks.1", "its layer blocks.1.gate is called outside of its forward"),
}


@pytest.mark.parametrize("mode", ["inference", "grad"])
@pytest.mark.parametrize("kind", REASONS)
def test_other_units_have_a_reason(kind: str, mode: str) -> None:
    unit, reason = REASONS[kind]
    flow = flow_of(kind, inference=mode == "inference")
    assert reason in flow.reasons[unit]
    assert unit not in flow.replayable
    assert "head" in flow.replayable
    assert "run again" in str(flow)


def test_openvla_has_its_dead_units_last() -> None:
    flow = flow_of("openvla")
    assert [stage.unit for stage in flow.stages[-3:]] == [
        "vision_backbone.featurizer.blocks.2",
        "vision_backbone.fused_featurizer.blocks.2",
        "vision_backbone.fused_featurizer.attn_pool",
    ]
    assert flow.dead == {stage.unit for stage in flow.stages[-3:]}


NEEDED: dict[str, dict[str, int | None]] = {
    "plain": {"embed": 1, "blocks.0": 2, "blocks.3": 5, "head": 5},
    "skipping": {"embed": 1, "blocks.0": 4, "blocks.1": 5, "blocks.2": 4},
    "between": {"blocks.0": 2, "blocks.1": 3},
    "encoder_decoder": {"encoder.blocks.1": 3, "encoder.head": 10, "mix.0.0": 5},
    "towers": {"left.head": 8, "right.head": 8, "left.blocks.0": 2},
    "selecting": {"embed": 1, "blocks.0": None},
    "looping": {"embed": 1, "blocks.0": 3},
    "piecewise": {"tower.embed": 2, "tower.head": 10},
    "ending": {"embed": 2, "blocks.0": 2},
    "idling": {"blocks.0": 2, "blocks.1": 3},
}


@pytest.mark.parametrize("kind", NEEDED)
def test_outputs_are_needed_as_long_as_they_are_read(kind: str) -> None:
    flow = flow_of(kind)
    assert {unit: flow.needed_until[unit] for unit in NEEDED[kind]} == NEEDED[kind]


def test_no_more_is_kept_of_a_deep_model_than_of_a_shallow_one() -> None:
    """All blocks look at the same positions and mask, by views; that makes none of them depend on all before it."""
    kept = {}
    for layers in (3, 6):
        model, ids = llama(layers=layers), torch.arange(20).reshape(1, 20)
        with torch.inference_mode():
            flow = probe(model, lambda model=model, ids=ids: model(input_ids=ids, use_cache=False)).flow  # type: ignore[misc]
        assert all(len(flow.kept(index)) == 1 for index in range(layers))
        kept[layers] = flow.bytes_per_sample
    assert kept[3] == kept[6]


def test_flow_knows_whose_output_is_touched() -> None:
    assert flow_of("plain").touched == set()
    assert flow_of("skipping").touched == {f"blocks.{index}" for index in range(4)}
    # Only a block that runs again reads the first
    assert flow_of("looping").touched == {"blocks.0"}


def test_flow_knows_how_much_is_kept() -> None:
    flow = flow_of("skipping")
    assert flow.kept(0) == ("embed",)
    assert flow.kept(3) == ("blocks.0", "blocks.1", "blocks.2")
    assert flow.kept(5) == ()
    assert flow.bytes_per_sample == 3 * 2 * 3 * flowing.WIDTH * 4


def test_without_following_the_code_between_blocks_outputs_go_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Provenance._dependence
    monkeypatch.setattr(Provenance, "_dependence", lambda self, tensors: real(self, list(tensors)[:1]))
    with pytest.raises(AssertionError):
        test_outputs_are_needed_as_long_as_they_are_read("skipping")


def test_without_new_tensors_for_outputs_a_leak_stays_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaquant.calibrate.provenance.torch.ops.aten.alias.default", lambda tensor: tensor)
    with pytest.raises((AssertionError, KeyError)):
        test_other_units_have_a_reason("keeping", "inference")


@pytest.mark.parametrize("name", ["_see", "_write"])
def test_without_its_witnesses_everything_looks_replayable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Provenance, name, lambda self, *args: None)
    with pytest.raises(KeyError):
        test_other_units_have_a_reason({"_see": "caching", "_write": "changing"}[name], "inference")


def test_without_the_order_of_calls_nothing_is_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flow_of("outside_layer").interleaved == {"blocks.1"}
    assert flow_of("looping").interleaved == set()
    real = flow_module._interleaved
    monkeypatch.setattr(flow_module, "_interleaved", lambda stages, order: real(stages, list(dict.fromkeys(order))))
    assert flow_of("outside_layer").interleaved == set()


@contextmanager
def weights_on_demand(model: nn.Module) -> Iterator[None]:
    """Weights and buffers of each unit come in new tensors when the unit is about to run, and go when the next does."""
    real = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded: list[str] = []

    def put(name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        parameter = leaf in model.get_submodule(owner)._parameters
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor) if parameter else tensor)

    def bring(unit: str) -> None:
        if unit not in loaded:
            names = [name for name in real if name.startswith(f"{unit}.")]
            for name in names:
                tensor = real[name].clone()
                assert bool(tensor.isfinite().all())
                put(name, tensor)
            for other in [name for old in loaded for name in real if name.startswith(f"{old}.")]:
                put(other, real[other].to("meta"))
            loaded[:] = [unit]

    handles = []
    for stage in find_units(model):
        for name in (name for name in real if name.startswith(f"{stage.unit}.")):
            put(name, real[name].to("meta"))
        handles += [
            module.register_forward_pre_hook(lambda *_, unit=stage.unit: bring(unit))
            for module in model.get_submodule(stage.unit).modules()
        ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["llama", "openvla", "skipping", "piecewise", "caching"])
def test_weights_that_come_on_demand_change_nothing(kind: str) -> None:
    model, samples, run = flowing.made(kind)
    with torch.inference_mode():
        wanted = probe(model, lambda: run(model, samples[0]))
        with weights_on_demand(model):
            found = probe(model, lambda: run(model, samples[0]))
    assert found == wanted


def test_weights_that_come_on_demand_are_known_when_they_are_used_elsewhere() -> None:
    model: Any = nn.Sequential(flowing.Layer(), nn.Linear(flowing.WIDTH, 3))

    def use() -> object:
        x = model(torch.randn(1, 2, flowing.WIDTH))
        return F.linear(x, model[1].weight.T)

    with weights_on_demand(model):
        assert probe(model, use).functional == ("1",)
