"""The family of LeRobot's policies, on look-alikes: who reads what, what nothing reads, what must be refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lookalikes import CAMERAS, observations, save
from torch import nn

import vlaquant
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families import find_folds, refused_folds
from vlaquant.families.lerobot import LEROBOT
from vlaquant.families.lerobot.processing import TOKEN_MASK
from vlaquant.families.lerobot.running import act, eager
from vlaquant.passes.fold import apply_fold_, channels_of

KINDS = ["smolvla", "pi05"]


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source") / request.param, request.param)


@pytest.fixture
def policy(source: Path) -> Any:
    return vlaquant.load(source)


@pytest.fixture
def inputs(policy: Any) -> dict[str, torch.Tensor]:
    return LEROBOT.inputs(policy, observations(1)[0])


def ran(policy: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return LEROBOT.run(policy, inputs)


def linears(policy: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in policy.named_modules() if type(module) is nn.Linear}


def test_a_run_is_all_denoising_steps_and_the_pass_of_training(policy, inputs):
    calls: dict[str, int] = dict.fromkeys(linears(policy), 0)
    for name, module in linears(policy).items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    assert ran(policy, inputs).shape == (1, 8 * 4 + 8 * 8)
    assert {name for name, count in calls.items() if count == 0} == {name for name in calls if "lm_head" in name}
    assert {calls[name] for name in calls if LEROBOT.part_of(name) == "expert"} == {3 + 1}
    assert {calls[name] for name in calls if LEROBOT.part_of(name) == "language"} == {2}
    assert LEROBOT.part_of("model.action_out_proj") == "action"
    assert {LEROBOT.part_of(name) for name in calls} == {"vision", "projector", "language", "expert", "action", "head"}


def test_noise_and_time_depend_on_the_sample_alone(policy, inputs):
    torch.manual_seed(5)
    again, other = (LEROBOT.inputs(policy, observations(1, seed)[0]) for seed in (0, 1))
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)
    assert not torch.equal(other["noise"], inputs["noise"])
    assert not torch.equal(other["time"], inputs["time"])
    assert torch.equal(ran(policy, inputs), ran(policy, again))


def test_only_what_changes_no_action_is_called_dead(policy, inputs):
    dead, before = LEROBOT.dead(policy), ran(policy, inputs)
    assert dead
    for name, module in linears(policy).items():
        weight = module.weight.detach().clone()
        module.weight.data.neg_()
        assert torch.equal(ran(policy, inputs), before) == (name in dead), name
        module.weight.data.copy_(weight)


def test_folds_keep_the_function(policy, inputs):
    before, groups = ran(policy, inputs), find_folds(policy, LEROBOT.folds)
    assert {"layer_norm1", "v_proj", "layer_norm2", "up_proj"} <= {group.source.rpartition(".")[2] for group in groups}
    assert all("vision" in group.source for group in groups if "v_proj" in group.source)
    assert not refused_folds(policy, LEROBOT.folds).keys() & {group.source for group in groups}
    for group in groups:
        apply_fold_(policy, group, 2 ** torch.empty(channels_of(policy, group)).uniform_(-2.0, 2.0), {})
    torch.testing.assert_close(ran(policy, inputs), before, rtol=1e-5, atol=1e-5)
    if policy.config.type == "smolvla":
        queries = [group.targets for group in groups if group.source.endswith("lm_expert.layers.1.input_layernorm")]
        assert queries == [("model.vlm_with_expert.lm_expert.layers.1.self_attn.q_proj",)]
    else:
        assert [group.chunks for group in groups if group.chunks] == [("scale", "shift", "gate")] * 6


def test_masks_are_those_of_the_policy(policy):
    seen = observations(1, wrist=False)[0]
    inputs = LEROBOT.inputs(policy, seen)
    masks = LEROBOT.token_masks(policy, inputs)
    images, cameras = policy.prepare_images(inputs)
    state = [policy.prepare_state(inputs)] if policy.config.type == "smolvla" else None
    _, real, _ = policy.model.embed_prefix(
        images, cameras, inputs["observation.language.tokens"], inputs[TOKEN_MASK], state
    )
    assert torch.equal(masks["language"], real)
    assert masks["vision"].tolist() == [True, False]
    assert not inputs[TOKEN_MASK].all()
    crossing = {name for name in masks if name.endswith(("k_proj", "v_proj"))}
    wanted = {f"model.vlm_with_expert.lm_expert.layers.{i}.self_attn.{x}_proj" for i in (1, 3) for x in "kv"}
    assert crossing == (wanted if policy.config.type == "smolvla" else set())


def test_padding_and_dummy_cameras_leave_no_trace_in_the_weights(source, policy):
    """Embeddings of padding are made huge: attention never sees them, only a calibration that forgot the mask would."""
    seen = observations(2, wrist=False)
    rules = [{"part": part, "scheme": "w4a16", "group_size": 16} for part in ("language", "expert")]
    recipe = {"rules": rules, "on_indivisible": "channel", "quantizer": {"kind": "gptq"}}
    packed = []
    for scale in (1.0, 50.0):
        one = vlaquant.load(source)
        name = next(name for name, _ in one.named_parameters() if name.endswith("embed_tokens.weight"))
        one.get_parameter(name).data[_padding(one, seen[0])] *= scale
        result = vlaquant.quantize(one, recipe, [LEROBOT.inputs(policy, sample) for sample in seen])
        packed.append({name: t for name, t in result.model.state_dict().items() if name.endswith("weight_packed")})
    assert packed[0]
    assert [name for name in packed[0] if not torch.equal(packed[0][name], packed[1][name])] == []


def _padding(policy: Any, sample: Any) -> int:
    inputs = LEROBOT.inputs(policy, sample)
    return int(inputs["observation.language.tokens"][~inputs[TOKEN_MASK]][0])


def test_a_batch_that_went_through_the_preprocessor_is_a_sample(policy, inputs):
    batch = policy.processors.before(_frame())
    again = LEROBOT.inputs(policy, batch)
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)
    del policy.processors
    assert torch.equal(LEROBOT.inputs(policy, batch)["noise"], inputs["noise"])
    with pytest.raises(CalibrationError, match="from memory, without its processors"):
        LEROBOT.inputs(policy, observations(1)[0])


def _frame() -> dict[str, Any]:
    one = observations(1)[0]
    assert one.state is not None
    assert one.action is not None
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in one.images]
    return dict(zip(CAMERAS, images, strict=True)) | {
        "observation.state": torch.from_numpy(one.state).float(),
        "action": torch.from_numpy(one.action).float().unsqueeze(0),
        "task": one.instruction,
    }


def test_actions_are_in_the_units_of_the_robot(policy, inputs):
    stats = load_file(policy.processors._directory / "stats.safetensors")
    normalized = policy.predict_action_chunk(dict(inputs), noise=inputs["noise"])[0]
    assert torch.equal(act(policy, inputs), normalized * stats["action.std"] + stats["action.mean"])
    assert torch.equal(policy.select_action(dict(inputs), noise=inputs["noise"])[0], normalized[0])


def test_a_blind_policy_is_refused(policy, inputs):
    LEROBOT.check(policy, inputs)
    for name, module in linears(policy).items():
        if LEROBOT.part_of(name) == "projector":
            nn.init.zeros_(module.weight)
    with pytest.raises(CalibrationError, match="the image does not reach it"):
        LEROBOT.check(policy, inputs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": (None, None)}, "no camera has an image"),
        ({"state": None}, "state was not recorded"),
        ({"images": (*observations(1)[0].images, None)}, "3 images, and the policy has the cameras"),
        ({"action": observations(1)[0].action[:, :2]}, "has 2 numbers, the policy's has 4"),  # type: ignore[index]
    ],
)
def test_observations_that_do_not_fit(policy, change, words):
    with pytest.raises(CalibrationError, match=words):
        LEROBOT.inputs(policy, replace(observations(1)[0], **change))


def test_a_short_chunk_goes_on_with_its_last_action(policy):
    one = observations(1)[0]
    assert one.action is not None
    short = LEROBOT.inputs(policy, replace(one, action=one.action[:3]))
    assert short["action"].shape == (1, 8, 4)
    assert torch.equal(short["action"][:, 3:], short["action"][:, 2:3].expand(-1, 5, -1))
    alone = LEROBOT.inputs(policy, replace(one, action=None))
    assert ran(policy, alone).shape == (1, 8 * 4)


def test_without_lerobot_the_error_says_how_to_get_it(source, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lerobot"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lerobot", None)
    with pytest.raises(CheckpointError, match=r"make lerobot.*vlaquant\[lerobot\]"):
        vlaquant.load(source)


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of ``source`` whose tensors went through ``change``."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    (target / "tokenizer").symlink_to(source / "tokenizer")
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.clone() for name, tensor in change(tensors).items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {n: x for n, x in t.items() if n != "model.action_out_proj.bias"},
            r"1 tensors .*action_out_proj.bias",
        ),
        (lambda t: t | {"model.more": torch.ones(1)}, "1 of the file have no place in it .model.more"),
        (lambda t: t | {"normalize_inputs.buffer.mean": torch.ones(1)}, "migrate_policy_normalization"),
        (lambda t: t | {"model.action_out_proj.bias": torch.ones(9)}, r"shape \[9\], wanted \[8\]"),
    ],
)
def test_files_that_do_not_fit(source, tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        vlaquant.load(changed(source, tmp_path / "changed", change))


def test_names_of_other_releases(source, policy, inputs, tmp_path):
    """As openpi wrote them: without ``model.``, other names of the time's MLP, and the head for the embedding."""

    def renamed(name: str) -> str:
        if name.endswith("paligemma.model.language_model.embed_tokens.weight"):
            return "paligemma_with_expert.paligemma.lm_head.weight"
        name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
        return name.replace("time_mlp", "action_time_mlp") if policy.config.type == "pi05" else name

    def openpi(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {renamed(name): tensor for name, tensor in tensors.items() if "paligemma.lm_head" not in name}

    directory = changed(source, tmp_path / "openpi", openpi)
    assert torch.equal(ran(vlaquant.load(directory), inputs), ran(policy, inputs))
    recipe = {"rules": [{"part": "language", "scheme": "w8a16"}]}
    result = vlaquant.quantize(directory, recipe, observations(2), output=tmp_path / "out")
    assert result.manifest["verification"]["output"] == "equal bit for bit"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_nothing_is_compiled_during_calibration(tmp_path):
    directory = save(tmp_path / "compiled", "pi05", compile_model=True)
    loaded: Any = vlaquant.load(directory)
    assert "sample_actions" not in loaded.model.__dict__
    compiled = loaded.model.sample_actions = torch.compile(loaded.model.sample_actions, backend="eager")
    with eager(loaded):
        assert "sample_actions" not in loaded.model.__dict__
    assert loaded.model.sample_actions is compiled
    assert json.loads((directory / "config.json").read_text())["compile_model"] is True


def test_precision_is_that_of_the_policy(tmp_path):
    loaded = vlaquant.load(save(tmp_path / "half", "pi05", dtype="bfloat16"))
    dtypes = {
        LEROBOT.part_of(name): module.weight.dtype for name, module in linears(loaded).items() if "norm" not in name
    }
    assert dtypes["vision"] == dtypes["projector"] == dtypes["action"] == torch.float32
    assert dtypes["language"] == dtypes["expert"] == torch.bfloat16
    assert {m.weight.dtype for name, m in linears(loaded).items() if "layernorm.dense" in name} == {torch.float32}
