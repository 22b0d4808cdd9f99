"""OpenVLA-OFT through the whole tool: quantized, written, loaded elsewhere, resumed, and the same policy."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import together
from make_synthetic_checkpoint import make_config
from safetensors.torch import load_file, save_file
from staged import QUANTIZERS, SCHEMES, differing, files_of, killed_after, skip_verification, streamed, written
from tiny import observations, openvla, save_openvla
from tiny_oft import CAMERAS, CHUNK, HEAD_FILE, PROPRIO_FILE, heads, images_of, oft_observations, save_oft
from torch import nn

import vlaquant
from vlaquant.checkpoint import read_config, read_manifest
from vlaquant.errors import CalibrationError, CheckpointError, ExportError
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.families import FAMILIES
from vlaquant.linear import W4A16Linear, W8A8Linear
from vlaquant.models.openvla import OpenVLAForActionPrediction

FAMILY = FAMILIES["openvla"]
SAMPLES = oft_observations(12)
PARTS = ("language", "vision", "projector", "action_head")
#: Mean distance of an action to the float policy's, as a share of how much the float policy's actions differ.
NEAR = {"w4a16": 0.5, "w8a8": 0.2}


def recipe(quantizer: str, scheme: str) -> dict[str, Any]:
    return {"rules": [{"part": part, **SCHEMES[scheme]} for part in PARTS], **QUANTIZERS[quantizer]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_oft(tmp_path_factory.mktemp("oft") / "source", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4-bit weights, not compared with a fresh process."""
    output = tmp_path_factory.mktemp("packed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        skip_verification(patch)
        streamed(source, recipe("rtn", "w4a16"), None, output)
    return output


def actions(model: nn.Module) -> np.ndarray:
    assert isinstance(model, OpenVLAForActionPrediction)
    return np.stack([model.predict_action(images_of(one), one.instruction, state=one.state) for one in SAMPLES])


@pytest.mark.parametrize(("quantizer", "scheme"), [("awq + gptq", "w4a16"), ("smoothquant", "w8a8")])
def test_the_written_policy_acts_as_the_one_in_memory_and_nearly_as_the_float_one(
    tmp_path: Path, source: Path, quantizer: str, scheme: str
) -> None:
    output = tmp_path / "out"
    result = streamed(source, recipe(quantizer, scheme), SAMPLES, output)
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    assert result.manifest["verification"]["output_values"] == CHUNK * 4
    in_memory = vlaquant.load(source)
    original = actions(in_memory)
    vlaquant.quantize(in_memory, recipe(quantizer, scheme), samples=SAMPLES)
    loaded = vlaquant.load(output)
    assert differing(file_tensors(in_memory), written(output)) == []
    assert np.array_equal(actions(loaded), actions(in_memory))
    spread = np.abs(original - original.mean(axis=0)).mean()
    distance = np.abs(actions(loaded) - original).mean()
    assert 0.0 < distance < NEAR[scheme] * spread
    kinds = {type(module) for name, module in loaded.named_modules() if name == "action_head.model.fc1"}
    assert kinds == {W4A16Linear if scheme == "w4a16" else W8A8Linear}


def act_in_a_fresh_process(directory: Path, target: Path) -> None:
    np.save(target, actions(vlaquant.load(directory)))


def test_another_process_acts_alike(packed: Path, tmp_path: Path) -> None:
    """One that has only the directory, and the tests' samples."""
    (ended,) = together(tmp_path / "log", 1, act_in_a_fresh_process, packed, tmp_path / "actions.npy")
    assert ended.code == 0, ended.err
    assert np.array_equal(np.load(tmp_path / "actions.npy"), actions(vlaquant.load(packed)))


def test_the_output_holds_no_pickle_and_says_what_the_files_did_not(source: Path, packed: Path) -> None:
    names = {path.name for path in packed.iterdir()}
    assert not [name for name in names if name.endswith(".pt")]
    assert "oft.json" not in names
    assert {"dataset_statistics.json", "tokenizer.json"} <= names
    config = read_config(packed)
    wanted = {"action_decoding": "regression", "action_chunk": CHUNK, "num_images_in_input": CAMERAS}
    wanted |= {"action_dim": 4, "action_head_blocks": 2, "proprio_dim": 5}
    assert {key: config[key] for key in wanted} == wanted
    assert {"model.safetensors", HEAD_FILE, PROPRIO_FILE} == read_manifest(packed)["source_sha256"].keys()
    stored = written(packed)["proprio_projector.fc1.weight"]
    assert torch.equal(stored, heads()[PROPRIO_FILE]["fc1.weight"].bfloat16())
    assert read_manifest(packed)["bytes_on_disk"]["source_weights"] == sum(
        (source / name).stat().st_size for name in ("model.safetensors", HEAD_FILE, PROPRIO_FILE)
    )


def test_weights_on_demand_give_the_very_files_of_a_model_in_memory(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_verification(monkeypatch)
    how = recipe("gptq", "w4a16")
    streamed(source, how, SAMPLES, tmp_path / "streamed")
    monkeypatch.setattr("vlaquant.engine.opening.names_differ", lambda *_: "of the test")
    streamed(source, how, SAMPLES, tmp_path / "whole")
    ours, theirs = (files_of(tmp_path / name) for name in ("streamed", "whole"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and name != "vlaquant.json"] == []


def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)
    how = recipe("gptq", "w4a16")
    streamed(source, how, SAMPLES, tmp_path / "whole")
    for stages in (3, 10):
        output = tmp_path / f"out{stages}"
        with killed_after(stages):
            streamed(source, how, SAMPLES, output)
        streamed(source, how, SAMPLES, output, resume=True)
        assert files_of(output) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("changed", [HEAD_FILE, "oft.json"])
def test_a_run_of_other_heads_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    skip_verification(monkeypatch)
    source, output = save_oft(tmp_path / "source"), tmp_path / "out"
    with killed_after(3):
        streamed(source, recipe("gptq", "w4a16"), SAMPLES, output)
    if changed == HEAD_FILE:
        torch.save(heads(seed=1)[HEAD_FILE], source / HEAD_FILE)
    else:
        said = {"action_chunk": CHUNK + 1, "num_images_in_input": CAMERAS}
        (source / "oft.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ExportError, match=changed.replace(".", r"\.")):
        streamed(source, recipe("gptq", "w4a16"), SAMPLES, output, resume=True)


def test_heads_in_the_weights_and_beside_them_are_refused(tmp_path: Path) -> None:
    source = save_oft(tmp_path / "source")
    tensors = load_file(source / "model.safetensors") | {"action_head.model.fc2.bias": torch.ones(4)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"action_head\.model\.fc2\.bias lies in the weights and beside them"):
        streamed(source, recipe("rtn", "w4a16"), None, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"tensors that the model has not: action_head\.model\.fc2\.bias"):
        vlaquant.load(source)


def test_the_plan_names_what_is_kept_and_what_no_action_depends_on(source: Path) -> None:
    rules = [{"part": part, "scheme": "w8a16"} for part in (*PARTS, "action", "proprio")]
    plan = vlaquant.plan(source, {"rules": rules})
    layers = {layer.name: layer for layer in plan.layers}
    kept = {name: layer.reason for name, layer in layers.items() if layer.scheme is None}
    assert kept.keys() == {"action_head.model.fc2", "proprio_projector.fc1", "proprio_projector.fc2"}
    assert "writes the action" in kept["action_head.model.fc2"]
    assert "one token an observation" in kept["proprio_projector.fc1"]
    assert "the action head reads the hidden states" in layers["language_model.lm_head"].reason
    named = {"pattern": "action_head.model.fc2", "scheme": "w8a16"}
    assert list(vlaquant.plan(source, {"rules": [named]}).quantized) == ["action_head.model.fc2"]


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel", "regression"])
def test_dead_layers_are_reported_whatever_the_decoding(source: Path, decoding: str) -> None:
    model = vlaquant.load(source) if decoding == "regression" else openvla(parallel=decoding == "parallel")
    samples = SAMPLES if decoding == "regression" else observations(12)
    rules = [{"part": part, "scheme": "w8a8"} for part in ("language", "vision", "action")]
    plan = vlaquant.quantize(model, {"rules": rules, "quantizer": {"kind": "gptq"}}, samples=samples).plan
    dead = {layer.name: layer.reason for layer in plan.layers if layer.dead}
    towers = [f"vision_backbone.{tower}.blocks.2." for tower in ("featurizer", "fused_featurizer")]
    blocks = {f"{tower}{name}" for tower in towers for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    pool = "vision_backbone.fused_featurizer.attn_pool."
    pooling = {f"{pool}{name}" for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")}
    head = {"language_model.lm_head"} if decoding == "regression" else set()
    assert dead.keys() == blocks | pooling | head
    assert all("features come from the block before" in dead[name] for name in blocks)
    assert all("the pooling head never runs" in dead[name] for name in pooling)


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel", "regression"])
def test_a_blind_policy_is_not_calibrated(tmp_path: Path, source: Path, decoding: str) -> None:
    model: Any = vlaquant.load(source) if decoding == "regression" else openvla(parallel=decoding == "parallel")
    samples = SAMPLES if decoding == "regression" else observations(12)
    how = {"rules": [{"part": "language", "scheme": "w8a8"}], "quantizer": {"kind": "gptq"}}
    with torch.no_grad():
        model.projector.fc3.weight.zero_()
    with pytest.raises(CalibrationError, match="the image does not reach the action"):
        vlaquant.quantize(model, how, samples=samples)


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_an_action_is_that_of_the_robot_and_not_of_the_demonstration(tmp_path: Path, decoding: str) -> None:
    model: Any = vlaquant.load(save_openvla(tmp_path / "source", openvla(parallel=decoding == "parallel")))
    assert FAMILY.act is not None
    for one in observations(3):
        inputs = FAMILY.inputs(model, one)
        wanted = np.atleast_2d(model.predict_action(one.image, one.instruction))
        assert np.array_equal(FAMILY.act(model, inputs).numpy(), wanted)


def test_a_packed_policy_is_still_a_module(source: Path, packed: Path) -> None:
    """What users and transformers do with a loaded policy."""
    model: Any = vlaquant.load(packed)
    before = actions(model)
    linears = [module for _, module in vlaquant.load(source).named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == sum(isinstance(module, W4A16Linear | nn.Linear) for module in model.modules())
    assert {m.weight.dtype for m in model.modules() if isinstance(m, W4A16Linear | nn.Linear)} == {torch.bfloat16}

    copied = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            tensor.zero_()
    assert np.array_equal(actions(model), before)

    rotation = model.language_model.model.rotary_emb
    frequencies = rotation.inv_freq.clone()
    model.to(torch.bfloat16)
    rotation.inv_freq = frequencies  # float32 in every model until somebody calls .to
    assert np.array_equal(actions(model), before)
    other: Any = vlaquant.load(packed)
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, strict=True)
    assert np.array_equal(actions(other), before)
    wide = actions(other.to(torch.float32))
    assert other.action_head.model.fc1.weight.dtype == torch.float32
    assert 0.0 < np.abs(wide - before).max() < 0.1


@pytest.mark.slow
def test_a_packed_policy_compiles(packed: Path) -> None:
    model: Any = vlaquant.load(packed).float()
    inputs = FAMILY.inputs(model, SAMPLES[0])
    given = {key: inputs[key] for key in ("input_ids", "pixel_values", "proprio")}
    with torch.no_grad():
        compiled = torch.compile(model.regress, backend="aot_eager")(**given)
        torch.testing.assert_close(compiled, model.regress(**given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["w4a16_awq", "w4a16_gptq", "w8a8_smoothquant"])
def test_the_shipped_recipes_account_for_every_weight_of_the_published_size(tmp_path: Path, name: str) -> None:
    config = make_config("7b")
    config.update({"action_decoding": "regression", "action_dim": 7, "proprio_dim": 8})
    config.update({"action_chunk": 8, "num_images_in_input": 2})
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    plan = vlaquant.plan(tmp_path, Path(__file__).parent.parent / "configs" / f"openvla_oft_{name}.yaml")
    # 7,541,237,184 parameters of OpenVLA-7B, and the heads: 28672·4096 + 2·4096² + 4096·7, 8·4096 + 4096², and vectors
    head = 2 * 28672 + 28672 * 4096 + 4096 + 2 * (2 * 4096 + 4096**2 + 4096) + 2 * 4096 + 7 * 4096 + 7
    state = 8 * 4096 + 4096 + 4096**2 + 4096
    assert plan.bytes_before == 2 * (7_541_237_184 + head + state)
    assert plan.bytes_after < (8.1e9 if name.startswith("w8a8") else 4.9e9)
    floats = {layer.name.partition(".")[0] for layer in plan.layers if layer.scheme is None}
    assert floats == {"action_head", "proprio_projector"}
