"""Families: folds keep the function of every architecture they fit, and models and directories find their family."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import llama, observations, openvla, save_llama, save_observations
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import vlaquant
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families import FAMILIES, FoldGroup, family_of_config, family_of_model, find_folds
from vlaquant.families.data import load_observations
from vlaquant.passes import fold
from vlaquant.passes.fold import apply_fold_, channels_of, fold_layer_scale_

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
#: Largest relative change of outputs in float64, some of whose norms compute in float32 all the same.
EXACT = 1e-6
#: Sources of the folds of one block, without its name.
LLAMA_LIKE = {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}
GEMMA_LIKE = {"input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"}
ARCHITECTURES = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": GEMMA_LIKE,
    "gemma3_text": GEMMA_LIKE,
    "olmo2": {"self_attn.v_proj", "mlp.up_proj"},
    "phi3": set(),
}


def causal_lm(kind: str, **changes: int) -> nn.Module:
    """Two blocks in float64, with norms and biases that are not at their trivial first values."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.2)
    return model.double().eval()


def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 20).unsqueeze(0), use_cache=False).logits


@torch.no_grad()
def fold_(model: nn.Module, group: FoldGroup) -> None:
    """Apply a random scale to one fold."""
    if group.gamma is not None:
        fold_layer_scale_(model, group, {})
        return
    apply_fold_(model, group, torch.exp(torch.randn(channels_of(model, group), dtype=torch.float64)), {})


def change(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_folds_keep_the_function(kind: str) -> None:
    model = causal_lm(kind)
    before = logits(model)
    groups = find_folds(model, FAMILIES["hf"].folds)
    for group in groups:
        fold_(model, group)
    found = [group.source.removeprefix("model.layers.").partition(".") for group in groups]
    assert {(block, name) for block, _, name in found} == {(b, name) for b in "01" for name in ARCHITECTURES[kind]}
    assert change(before, logits(model)) < EXACT


@torch.no_grad()
def test_folds_of_openvla_keep_the_function() -> None:
    model = openvla(dtype=torch.float64)
    input_ids, pixels = model.encode(observations(1)[0].image, "push")
    before = model(input_ids, pixel_values=pixels.double()).logits
    groups = find_folds(model, FAMILIES["openvla"].folds)
    for group in groups:
        fold_(model, group)
    blocks = {group.source.rpartition(".blocks.")[0] for group in groups if "norm" in group.source}
    assert {"vision_backbone.featurizer", "vision_backbone.fused_featurizer"} <= blocks
    assert change(before, model(input_ids, pixel_values=pixels.double()).logits) < EXACT


@pytest.mark.parametrize("kind", ["cohere", "nemotron", "apertus", "vaultgemma", "phi", "llama"])
@torch.no_grad()
def test_transforms_keep_the_function_of_unusual_blocks(kind: str) -> None:
    """Parallel blocks, MLPs without a gate, norms with an offset: folds that do not hold there are left out."""
    model = causal_lm(kind).float()
    before = logits(model)
    samples = [torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    recipe = {
        "rules": [{"part": "language", "scheme": "w8a16"}],
        "transforms": [{"kind": "smoothquant"}, {"kind": "awq"}],
    }
    vlaquant.quantize(model, recipe, samples=samples)
    assert change(before, logits(model)) < 0.03


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_the_wrong_offset_changes_the_function(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "norm_offset", lambda norm: 0.0)
    model = causal_lm(kind)
    before = logits(model)
    fold_(model, find_folds(model, FAMILIES["hf"].folds)[0])
    assert change(before, logits(model)) > 1e-3


@torch.no_grad()
def test_a_norm_of_the_same_name_elsewhere_changes_the_function() -> None:
    """Gemma 2 has a ``post_attention_layernorm`` too, but its MLP reads another norm."""
    model = causal_lm("gemma2")
    before = logits(model)
    block = "model.layers.0"
    fold_(model, FoldGroup(f"{block}.post_attention_layernorm", (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")))
    assert change(before, logits(model)) > 1e-3


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.no_grad()
def test_values_fold_with_one_scale_for_all_query_heads_that_read_them(heads: int) -> None:
    model = causal_lm("llama", num_key_value_heads=heads)
    before = logits(model)
    values = [group for group in find_folds(model, FAMILIES["hf"].folds) if group.source.endswith("v_proj")]
    assert [group.targets for group in values] == [(f"model.layers.{layer}.self_attn.o_proj",) for layer in range(2)]
    for group in values:
        assert channels_of(model, group) == heads * SIZES["head_dim"]
        fold_(model, group)
    assert change(before, logits(model)) < EXACT


def test_models_find_their_family() -> None:
    assert family_of_model(openvla()).name == "openvla"
    assert family_of_model(llama()).name == "hf"
    assert family_of_model(nn.Linear(2, 2)).name == "module"
    assert family_of_model(llama(), "module").name == "module"


def test_directories_find_their_family() -> None:
    assert family_of_config({"model_type": "openvla"}).name == "openvla"
    assert family_of_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).name == "hf"
    assert family_of_config({}, "module").name == "module"
    with pytest.raises(CheckpointError, match=r"'bert'.*no family that vlaquant loads \(.*hf\)"):
        family_of_config({"model_type": "bert", "architectures": ["BertModel"]})
    with pytest.raises(CheckpointError, match="no family"):
        family_of_config({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})


def test_parts() -> None:
    policy, language = FAMILIES["openvla"], FAMILIES["hf"]
    assert policy.part_of("vision_backbone.featurizer.blocks.0.attn.qkv") == "vision"
    assert policy.part_of("projector.fc1") == "projector"
    assert policy.part_of("language_model.model.layers.0.mlp.up_proj") == "language"
    assert policy.part_of("language_model.lm_head") == "action"
    assert policy.part_of("something.else") == "other"
    assert [language.part_of(name) for name in ("model.layers.0.mlp.up_proj", "lm_head")] == ["language", "head"]


def test_unknown_models_need_their_owner(tmp_path: Path) -> None:
    recipe = {"rules": [{"part": "model", "scheme": "w8a8"}]}
    with pytest.raises(CheckpointError, match=r"Sequential is of no known family.*run\(model, sample\)"):
        vlaquant.quantize(nn.Sequential(nn.Linear(8, 8)), recipe, samples=[torch.zeros(40, 8)])
    directory = save_llama(tmp_path / "source", llama())
    with pytest.raises(CheckpointError, match="build it yourself and pass it"):
        vlaquant.quantize(directory, recipe | {"family": "module"})


@pytest.mark.parametrize(
    ("family", "calibration", "message"),
    [
        ("openvla", {"kind": "text", "path": "x"}, "text is for language models in a directory, not for openvla"),
        ("hf", {"kind": "text", "path": "x"}, "text is for language models in a directory"),
        ("openvla", {"kind": "episodes", "path": "nowhere"}, "nowhere: no split 'calibration'"),
    ],
)
def test_calibration_that_a_family_cannot_run(family: str, calibration: dict[str, str], message: str) -> None:
    model = openvla() if family == "openvla" else llama()
    recipe = {"rules": [{"part": "language", "scheme": "w8a8"}], "quantizer": {"kind": "gptq"}}
    with pytest.raises(CalibrationError, match=message):
        vlaquant.quantize(model, recipe | {"calibration": calibration})


def test_recorded_episodes_read_back(tmp_path: Path) -> None:
    written = observations(7)
    save_observations(tmp_path, "calibration", written)
    read = load_observations(tmp_path, "calibration", unnorm_key="tiny")
    assert [one.episode for one in read] == list(range(7))
    assert {(one.instruction, one.task, one.unnorm_key) for one in read} == {("push", "push", "tiny")}
    for mine, theirs in zip(read, written, strict=True):
        assert np.array_equal(np.asarray(mine.image), np.asarray(theirs.image))
        assert mine.action is not None
        assert theirs.action is not None
        assert np.array_equal(mine.action, theirs.action)
    assert [one.episode for one in load_observations(tmp_path, "calibration", 3)] == [0, 3, 6]


def test_a_split_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "calibration").mkdir()
    with pytest.raises(CalibrationError, match="calibration: holds no parquet file"):
        load_observations(tmp_path, "calibration")


def test_token_by_token_policies_are_shown_the_demonstrated_action() -> None:
    policy, sample = openvla(parallel=False), observations(1)[0]
    prompt, _ = policy.encode(sample.image, sample.instruction)
    inputs = FAMILIES["openvla"].inputs(policy, sample)
    shown = inputs["input_ids"][:, prompt.shape[1] :]
    assert torch.equal(inputs["input_ids"][:, : prompt.shape[1]], prompt)
    assert sample.action is not None
    np.testing.assert_allclose(policy.action_tokens.decode(shown[0].numpy()), sample.action.ravel()[:-1], atol=1 / 255)
    length = inputs["input_ids"].shape[1] + policy.image_tokens
    assert FAMILIES["openvla"].run(policy, inputs).shape[:2] == (1, length)
