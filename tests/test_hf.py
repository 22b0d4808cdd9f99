"""Models of transformers that read images: parts, folds, samples, and models that must not be calibrated."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import llama, observations
from tiny_hf import KINDS, make, save
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

import vlaquant
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families import FAMILIES, family_of_config, family_of_model, find_folds, refused_folds
from vlaquant.families.observation import Observation
from vlaquant.passes.fold import apply_fold_, fold_layer_scale_

HF = FAMILIES["hf"]
#: SmolVLM's processor needs a package for videos that spells out numbers.
PROCESSORS = [kind for kind in KINDS if kind != "smolvlm" or find_spec("num2words")]
LANGUAGE = {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}
LAYER_NORMS = {"layer_norm1", "layer_norm2", "self_attn.v_proj"}
#: Sources of the folds of a language block and of a vision block.
FOLDS = {
    "llava": LANGUAGE | LAYER_NORMS,
    "paligemma": LANGUAGE | LAYER_NORMS,
    "idefics3": LANGUAGE | LAYER_NORMS,
    "smolvlm": LANGUAGE | LAYER_NORMS,
    "qwen2_5_vl": LANGUAGE | {"norm1", "norm2"},
    "qwen3_vl": LANGUAGE | {"norm1", "norm2", "norm"},
}


def opened(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return vlaquant.load(save(folder / kind, kind, dtype))


def inputs_of(model: Any, seed: int = 0) -> dict[str, Tensor]:
    return HF.inputs(model, observations(1, seed)[0])


def change(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_family_of_every_kind(kind: str) -> None:
    model: Any = make(kind)
    assert family_of_model(model) is HF
    assert family_of_config(model.config.to_dict() | {"architectures": [type(model).__name__]}) is HF
    parts: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parts.setdefault(HF.part_of(name), set()).add(name)
    assert parts.keys() == {"vision", "projector", "language", "head"}
    assert parts["head"] == {"lm_head"}
    assert len(parts["language"]) == 2 * 7
    assert not any("merger" in name or "projector" in name for name in parts["vision"])
    assert {len(name.split(".layers.")) + len(name.split(".blocks.")) for name in parts["vision"]} == {3}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vision_tower.vision_model.encoder.layers.3.mlp.fc1", "vision"),
        ("model.vision_tower.encoder.layers.3.mlp.fc1", "vision"),
        ("model.visual.blocks.3.attn.qkv", "vision"),
        ("visual.merger.mlp.0", "projector"),
        ("model.connector.modality_projection.proj", "projector"),
        ("multi_modal_projector.linear", "projector"),
        ("language_model.model.layers.0.mlp.up_proj", "language"),
        ("model.text_model.layers.0.mlp.up_proj", "language"),
        ("transformer.h.0.mlp.c_fc", "language"),
        ("model.audio_tower.layers.0.fc1", "audio"),
        ("language_model.lm_head", "head"),
        ("score", "other"),
    ],
)
def test_parts_wherever_they_sit(name: str, part: str) -> None:
    assert HF.part_of(name) == part


@torch.no_grad()
def apply_all_(model: nn.Module) -> set[str]:
    """Fold a random scale into every place; returns the sources, without the names of their blocks."""
    sources = set()
    for group in find_folds(model, HF.folds):
        sources.add(re.sub(r".*?\.\d+\.", "", group.source))
        if group.gamma is not None:
            fold_layer_scale_(model, group, {})
            continue
        source: Any = model.get_submodule(group.source)
        width = source.out_features if isinstance(source, nn.Linear) else len(source.weight)
        apply_fold_(model, group, torch.exp(torch.randn(width, dtype=torch.float64)), {})
    return sources


@pytest.mark.parametrize("kind", PROCESSORS)
def test_folds_of_vision_and_language_keep_the_function(kind: str, tmp_path: Path) -> None:
    model = opened(kind, tmp_path).double()
    inputs = inputs_of(model)
    with torch.inference_mode():
        before = HF.run(model, inputs)
    assert not refused_folds(model, HF.folds)
    assert apply_all_(model) >= FOLDS[kind]
    with torch.inference_mode():
        assert change(before, HF.run(model, inputs)) < 1e-6


@torch.no_grad()
def test_folds_of_other_towers() -> None:
    """InternVL's norms and LayerScales; Pixtral's RMSNorms."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    intern = {
        "vision_config": tower | {"image_size": [28, 28], "patch_size": [14, 14]},
        "text_config": text | {"model_type": "qwen2"},
        "image_token_id": 7,
    }
    pixtral = {
        "vision_config": tower | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16},
        "text_config": text | {"model_type": "mistral"},
        "image_token_index": 7,
        "vision_feature_layer": -1,
    }
    wanted = {
        "internvl": {"layernorm_before", "layernorm_after", "attention.projection_layer", "mlp.fc2"},
        "mistral3": {"attention_norm", "ffn_norm"},
    }
    for kind, config in {"internvl": intern, "mistral3": pixtral}.items():
        torch.manual_seed(0)
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config)).double().eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=1.0 if "lambda" in name else float(parameter.mean()), std=0.2)
        vision, pixels = model.model.vision_tower, torch.randn(1, 3, 28, 28, dtype=torch.float64)
        arguments = {"image_sizes": torch.tensor([[28, 28]])} if kind == "mistral3" else {}
        before = vision(pixels, **arguments).last_hidden_state
        assert apply_all_(model) >= wanted[kind]
        assert change(before, vision(pixels, **arguments).last_hidden_state) < 1e-6


def test_vision_blocks_behind_the_one_that_is_read_are_dead(tmp_path: Path) -> None:
    model = opened("llava", tmp_path)
    assert model.config.vision_feature_layer == -2
    dead = HF.dead(model)
    assert {name.partition(".layers.")[2].partition(".")[0] for name in dead} == {"2"}
    assert len(dead) == 6
    inputs = inputs_of(model)
    with torch.inference_mode():
        before = HF.run(model, inputs)
        for name in dead:
            model.get_submodule(name).weight.zero_()
        assert torch.equal(before, HF.run(model, inputs))
        model.get_submodule(next(iter(dead)).replace(".2.", ".1.")).weight.zero_()
        assert not torch.equal(before, HF.run(model, inputs))
    model.config.vision_feature_layer = [-1, 1]
    assert HF.dead(model) == {}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_observations_go_through_the_processor_of_the_directory(kind: str, tmp_path: Path) -> None:
    model = opened(kind, tmp_path, torch.bfloat16)
    first, other = inputs_of(model), inputs_of(model, seed=1)
    assert first["pixel_values"].dtype == torch.bfloat16
    assert "labels" not in first
    places = int((first["input_ids"] == model.config.image_token_id).sum())
    assert places == {"llava": 16, "paligemma": 16}.get(kind, 6 if kind.startswith("qwen") else 4)
    assert int(first["input_ids"][0, -1]) != model.config.image_token_id, "the instruction comes after the image"
    with torch.inference_mode():
        assert HF.run(model, first).shape == (1, first["input_ids"].shape[1], 96)
        assert not torch.equal(HF.run(model, first), HF.run(model, other))
    HF.check(model, first)
    HF.check(model, {"input_ids": first["input_ids"][:, -2:]})


def test_several_cameras_and_missing_ones(tmp_path: Path) -> None:
    model = opened("idefics3", tmp_path)
    image = observations(1)[0].image
    one, two = (HF.inputs(model, Observation(cameras, "push")) for cameras in [(image, None), (image, None, image)])
    assert (one["pixel_values"].shape[1], two["pixel_values"].shape[1]) == (1, 2)
    with pytest.raises(CalibrationError, match="episode 0, 'push': holds no image"):
        HF.inputs(model, Observation((None,), "push"))


def test_a_model_that_does_not_look_is_not_calibrated(tmp_path: Path) -> None:
    directory = save(tmp_path / "blind", "paligemma")
    model: Any = vlaquant.load(directory)
    for parameter in model.model.multi_modal_projector.parameters():
        nn.init.zeros_(parameter)
    model.save_pretrained(directory)
    recipe = {"rules": [{"part": "language", "scheme": "w8a8"}], "transforms": [{"kind": "smoothquant"}]}
    with pytest.raises(CalibrationError, match="answers the same to a black and to a white image"):
        vlaquant.quantize(directory, recipe, samples=observations(2), output=tmp_path / "out")


def test_samples_that_a_model_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="LlamaForCausalLM reads no images; calibrate it with text"):
        HF.inputs(llama(), observations(1)[0])
    with pytest.raises(CalibrationError, match=r"an Observation, not <class 'str'>"):
        HF.inputs(llama(), "push")
    with pytest.raises(CalibrationError, match=r"has no processor for images; set model\.processor"):
        HF.inputs(make("llava"), observations(1)[0])
    directory = save(tmp_path / "bare", "llava")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(CalibrationError, match="its LlavaProcessor cannot be opened"):
        HF.inputs(vlaquant.load(directory), observations(1)[0])


@pytest.mark.skipif(find_spec("num2words") is not None, reason="num2words is installed")
def test_a_processor_that_needs_a_package_names_it(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="SmolVLMProcessor cannot be opened: Package `num2words` is required"):
        inputs_of(opened("smolvlm", tmp_path))


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_made_up_examples(kind: str, tmp_path: Path) -> None:
    model: Any = opened(kind, tmp_path)
    text = HF.example(model)
    assert text.keys() == {"input_ids"}
    assert not (text["input_ids"] == model.config.image_token_id).any()
    inputs_of(model)
    assert "pixel_values" in HF.example(model)
    with torch.inference_mode():
        assert HF.run(model, text).isfinite().all()


def test_text_calibrates_the_language_part_and_says_that_vision_never_ran(tmp_path: Path) -> None:
    directory = save(tmp_path / "llava", "llava")
    ids = [torch.randint(20, 90, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    rules = [{"part": "language", "scheme": "w8a8"}, {"part": "vision", "scheme": "w8a8_static"}]
    result = vlaquant.quantize(directory, {"rules": rules, "quantizer": {"kind": "gptq"}}, samples=ids)
    verdicts = {layer.name: layer for layer in result.plan.layers}
    assert len(result.plan.quantized) == 14
    assert "never ran" in verdicts["model.vision_tower.encoder.layers.0.mlp.fc1"].reason
    assert "vision block 1" in verdicts["model.vision_tower.encoder.layers.2.mlp.fc1"].reason


def test_directories_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "llava", "llava")
    other = save(tmp_path / "other", "qwen3_vl")
    shutil.copy(other / "model.safetensors", directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks tensors that the model needs"):
        vlaquant.load(directory)


def test_encoder_decoders_and_other_heads_are_not_ours() -> None:
    assert HF.owns_config({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    assert not HF.owns_config({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]})
    florence = {"model_type": "florence2", "architectures": ["Florence2ForConditionalGeneration"]}
    assert not HF.owns_config(florence | {"is_encoder_decoder": True})
    assert not HF.owns(nn.Linear(2, 2))


def test_routers_stay_float() -> None:
    assert HF.why_float("model.layers.0.mlp.gate") is not None
    assert HF.why_float("model.layers.0.mlp.gate_proj") is None


def test_grey_images_are_pictures_too(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((40, 48), 90, dtype=np.uint8))
    inputs = HF.inputs(opened("llava", tmp_path), Observation((grey,), "push"))
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
