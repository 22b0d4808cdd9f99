"""π0 as transformers has it: what a sample becomes, what runs, what does not matter, and what is refused."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pi0 import CHUNK, PADDED, STEPS, pi0, robot_observations, save_pi0
from torch import Tensor, nn
from transformers import PI0Config

import vlaquant
from vlaquant.errors import CalibrationError
from vlaquant.families import family_of_config, family_of_model, find_folds
from vlaquant.families.pi0 import PI0
from vlaquant.passes.fold import fold_norm_

CONFIGS = Path(__file__).parent.parent / "configs"


def _run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return PI0.run(model, inputs)


def test_found_by_model_and_by_config() -> None:
    model = pi0()
    assert family_of_model(model) is PI0
    assert family_of_config(model.config.to_dict()) is PI0


def test_building_gives_what_loading_gives_without_weights(tmp_path: Path) -> None:
    directory = save_pi0(tmp_path / "source", pi0(dtype=torch.bfloat16))
    built, loaded = PI0.build(directory), PI0.load(directory)
    for (name, empty), full in zip(built.named_parameters(), loaded.parameters(), strict=True):
        assert empty.is_meta, name
        assert (empty.shape, empty.dtype) == (full.shape, full.dtype), name
    for (name, buffer), other in zip(built.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert isinstance(built.processor, type(loaded.processor))


def test_a_sample_becomes_the_same_inputs_whenever_it_is_taken() -> None:
    model, seen = pi0(), robot_observations(2)
    first = PI0.inputs(model, seen[0])
    torch.rand(3)
    assert PI0.inputs(model, seen[1])["noise"].sum() != first["noise"].sum()
    for name, tensor in PI0.inputs(model, seen[0]).items():
        assert torch.equal(tensor, first[name]), name
    assert first["pixel_values"].shape == (1, 2, 3, 28, 28)
    assert 0 < float(first["timestep"]) <= 1
    # Standardized by the processor's statistics, then padded
    assert np.allclose(first["state"][0, :5], (seen[0].state - 0.1) / 0.5, atol=1e-5)  # type: ignore[operator]
    assert float(first["state"][0, 5:].abs().sum()) == 0


def test_inputs_have_the_dtype_of_the_model() -> None:
    model = pi0(dtype=torch.bfloat16)
    inputs = PI0.inputs(model, robot_observations(1)[0])
    assert {name: tensor.dtype for name, tensor in inputs.items() if tensor.is_floating_point()} == dict.fromkeys(
        ("pixel_values", "state", "actions", "noise"), torch.bfloat16
    ) | {"timestep": torch.float32}
    assert bool(_run(model, inputs).isfinite().all())


def test_a_short_chunk_goes_on_with_its_last_action() -> None:
    model, seen = pi0(), robot_observations(1)[0]
    assert seen.action is not None
    short = PI0.inputs(model, replace(seen, action=seen.action[:2]))["actions"]
    whole = PI0.inputs(model, seen)["actions"]
    assert torch.equal(short[:, :2], whole[:, :2])
    assert torch.equal(short[:, 2:], whole[:, 1:2].expand(1, CHUNK - 2, PADDED))
    without = PI0.inputs(model, replace(seen, action=None))
    assert "actions" not in without
    assert torch.equal(_run(model, without), _run(model, PI0.inputs(model, seen))[:, :CHUNK])


def test_run_is_the_sampling_path_and_the_training_step_over_one_prefix() -> None:
    model: Any = pi0()
    inputs = PI0.inputs(model, robot_observations(1)[0])
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count(name))
    output = _run(model, inputs)
    for name, number in calls.items():
        seeing = PI0.part_of(name) in {"vision", "projector", "language"}
        assert number == (1 if seeing else STEPS + 1), name
    assert len(calls) == sum(isinstance(module, nn.Linear) for module in model.modules())
    with torch.inference_mode():
        training = model(**inputs).logits
        sampled = model.sample_actions(**{key: inputs[key] for key in inputs if key not in {"actions", "timestep"}})
    assert torch.equal(output, torch.cat([sampled, training], dim=1))


def test_act_is_in_units_of_the_robot() -> None:
    model: Any = pi0()
    inputs = PI0.inputs(model, robot_observations(1)[0])
    assert PI0.act is not None
    with torch.inference_mode():
        action, normalized = PI0.act(model, inputs), PI0.run(model, inputs)[0, :CHUNK]
        model.processor = None
        assert torch.equal(PI0.act(model, inputs), normalized)
    assert action.shape == (CHUNK, 4)
    assert torch.allclose(action[:, 1], normalized[:, 1] * 1.5 - 0.3, atol=1e-5)


def test_padding_and_masked_cameras_reach_no_action() -> None:
    """So their tokens have no place in statistics, and that is what the masks say."""
    model = pi0()
    inputs = PI0.inputs(model, robot_observations(1, cameras=1)[0])
    dummy = torch.randn_like(inputs["pixel_values"])
    slots = inputs | {
        "pixel_values": torch.cat([dummy, inputs["pixel_values"]], dim=1),
        "pixel_attention_mask": torch.tensor([[False, True]]),
    }
    masks = PI0.token_masks(model, slots)
    assert masks["vision"].tolist() == masks["projector"].tolist() == [False, True]
    assert masks["language"].shape == slots["input_ids"].shape
    output = _run(model, slots)
    assert torch.allclose(output, _run(model, inputs), atol=1e-5)
    noise = slots["pixel_values"].clone()
    noise[0, 0].normal_()
    assert torch.equal(_run(model, slots | {"pixel_values": noise}), output)
    noise[0, 1].normal_()
    assert not torch.equal(_run(model, slots | {"pixel_values": noise}), output)
    padding = ~masks["language"]
    assert bool(padding.any())
    assert torch.equal(_run(model, slots | {"input_ids": slots["input_ids"].masked_fill(padding, 7)}), output)


def test_a_missing_camera_is_left_out() -> None:
    model, seen = pi0(), robot_observations(1)[0]
    inputs = PI0.inputs(model, replace(seen, images=(None, seen.images[1])))
    alone = PI0.inputs(model, replace(seen, images=(seen.images[1],)))
    assert all(torch.equal(inputs[name], alone[name]) for name in alone)
    assert inputs["pixel_values"].shape[1] == 1


def test_observations_that_cannot_be_used() -> None:
    model: Any = pi0()
    seen = robot_observations(1)[0]
    with pytest.raises(CalibrationError, match="episode 0, 'push the robot': no camera has an image"):
        PI0.inputs(model, replace(seen, images=(None, None)))
    with pytest.raises(CalibrationError, match="the robot's state was not recorded"):
        PI0.inputs(model, replace(seen, state=None))
    model.processor = None
    with pytest.raises(CalibrationError, match=r"no processor_config\.json"):
        PI0.inputs(model, seen)


def test_what_is_called_dead_moves_no_action() -> None:
    model = pi0()
    inputs = PI0.inputs(model, robot_observations(1)[0])
    dead = PI0.dead(model)
    assert len(dead) == 5
    before = _run(model, inputs)
    for name in dead:
        nn.init.normal_(model.get_submodule(name).weight)  # type: ignore[arg-type]
    assert torch.equal(_run(model, inputs), before)
    last = "model.vlm.language_model.layers.1.self_attn."
    for name in ("k_proj", "v_proj"):
        other = copy.deepcopy(model)
        nn.init.normal_(other.get_submodule(last + name).weight)  # type: ignore[arg-type]
        assert not torch.equal(_run(other, inputs), before)


def test_a_blind_policy_is_refused() -> None:
    model: Any = pi0()
    inputs = PI0.inputs(model, robot_observations(1)[0])
    PI0.check(model, inputs)
    with pytest.raises(CalibrationError, match="all cameras are masked out"):
        PI0.check(model, inputs | {"pixel_attention_mask": torch.zeros(1, 2, dtype=torch.bool)})
    words = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.vlm_config.image_token_id, 5)
    with pytest.raises(CalibrationError, match="no place for an image"):
        PI0.check(model, inputs | {"input_ids": words})
    projector = model.model.vlm.multi_modal_projector.linear
    kept = projector.weight.clone()
    nn.init.zeros_(projector.weight)
    with pytest.raises(CalibrationError, match="the image does not reach the action"):
        PI0.check(model, inputs)
    projector.weight.data = kept
    nn.init.constant_(model.action_out_proj.bias, float("nan"))
    with pytest.raises(CalibrationError, match="velocities are NaN"):
        PI0.check(model, inputs)


@pytest.mark.parametrize("values", [1, 2])
def test_folds_keep_the_function(values: int) -> None:
    """Every one of them, with scales that a wrong rule would not survive."""
    model = pi0(dtype=torch.float64, values=values)
    inputs = PI0.inputs(model, robot_observations(1)[0])
    before = _run(model, inputs)
    folds = find_folds(model, PI0.folds)
    kinds = {re.sub(r".*layers\.\d+\.", "", fold.source) for fold in folds}
    # Values are read by the expert's output projection too, so there is no fold between them
    assert kinds == {"layer_norm1", "layer_norm2", "input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
    assert len(folds) == 2 * 2 + 2 * 3 + 2 * 3
    for fold in folds:
        source = model.get_submodule(fold.source)
        targets: list[Any] = [model.get_submodule(name) for name in fold.targets]
        scale = torch.rand(targets[0].in_features, dtype=torch.float64) + 0.5
        if isinstance(source, nn.Linear):
            source.weight.data /= scale.unsqueeze(-1)
            for target in targets:
                target.weight.data *= scale
        else:
            fold_norm_(source, scale, targets, offset=0.0 if isinstance(source, nn.LayerNorm) else 1.0)
    # Gemma's norms compute in float32
    assert torch.allclose(_run(model, inputs), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("pi0_*.yaml")), ids=lambda path: path.stem)
def test_plan_of_the_full_size(tmp_path: Path, recipe: Path) -> None:
    PI0Config(dtype="bfloat16").save_pretrained(tmp_path)
    model = PI0.build(tmp_path)
    plan = vlaquant.plan(tmp_path, recipe)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(plan.layers) == len(linears) == 420
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 3.50e9 < parameters < 3.51e9
    assert plan.bytes_before == 2 * parameters
    kept = [layer for layer in plan.layers if layer.scheme is None]
    assert {layer.part for layer in kept} == {"action"}
    assert len(kept) == 5
    assert sum(layer.dead for layer in plan.layers) == 5
    # By hand: bits a weight, with the scales of groups of 128; those of rows are few enough to leave out
    bits = {"language": 8.0, "expert": 8.0, "vision": 8.0, "projector": 8.0, "action": 16.0}
    four = "w4a16" in recipe.name
    if four:
        bits |= {"language": 4.125, "expert": 4.125}
    weights = {part: sum(math.prod(layer.shape) for layer in plan.layers if layer.part == part) for part in bits}
    words = sum(tensor.numel() for name, tensor in model.named_parameters() if "embed_tokens" in name)
    rest = parameters - sum(weights.values()) - words
    by_hand = sum(weights[part] * bits[part] / 8 for part in bits) + words * (1 if four else 2) + 2 * rest
    assert plan.bytes_after == pytest.approx(by_hand, rel=0.002)
    assert plan.bytes_after / 1e9 == pytest.approx(2.397 if four else 4.2985, abs=0.001)
