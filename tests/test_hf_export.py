"""What we write of image-text-to-text models, opened by transformers and compressed-tensors.

The known defect: a configuration that names a class of layers, with exceptions by their names in the file, quantizes
the vision tower of models whose names differ between file and model. Ours names live layers, and has no exceptions.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from staged import skip_verification
from tiny import observations
from tiny_hf import KINDS, make, save
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import vlaquant
from vlaquant.checkpoint import read_config
from vlaquant.families import FAMILIES

pytest.importorskip("compressed_tensors")
HF = FAMILIES["hf"]
RECIPES: dict[str, dict[str, Any]] = {
    "w4a16": {"rules": [{"part": "language", "scheme": "w4a16", "group_size": 32}]},
    "w8a8": {"rules": [{"part": "language", "scheme": "w8a8"}]},
}
#: How far the logits may be, as a share: activations are rounded by another rule there, and bfloat16 sums differ.
TOLERANCE = {"w4a16": 0.0, "w8a8": 0.01}
DTYPE = {"w4a16": torch.float32, "w8a8": torch.bfloat16}
CASES = [(kind, "w4a16") for kind in KINDS] + [("llava", "w8a8"), ("paligemma", "w8a8")]


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)
    monkeypatch.setenv("VLAQUANT_KERNEL", "reference")  # unpacks the weight, as transformers does: equal, bit for bit


def with_image(model: Any, source: Any) -> dict[str, Tensor]:
    """An image of random pixels before a few words, made without a processor where that needs more packages."""
    if source.config.model_type != "smolvlm":
        inputs: dict[str, Tensor] = HF.inputs(source, observations(1)[0])
        return inputs
    ids = torch.tensor([[1, *[model.config.image_token_id] * 4, 4, 5, 6]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 56, 56)}


def is_packed(module: nn.Module) -> bool:
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return "weight_packed" in tensors or ("weight" in tensors and tensors["weight"].dtype == torch.int8)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_transformers_opens_what_we_write(kind: str, scheme: str, tmp_path: Path) -> None:
    source, target = save(tmp_path / "source", kind, DTYPE[scheme]), tmp_path / "packed"
    result = vlaquant.quantize(source, RECIPES[scheme], output=target)
    opener: Any = AutoModelForImageTextToText
    theirs, info = opener.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not {key: value for key, value in info.items() if value}, "no key missing, unexpected or mismatched"
    packed = {name for name, module in theirs.named_modules() if is_packed(module)}
    assert packed == set(result.plan.quantized)
    assert len(packed) == 14

    before, mine = vlaquant.load(source), vlaquant.load(target)
    inputs = with_image(mine, before)
    with torch.inference_mode():
        ours, their_logits = HF.run(mine, inputs), HF.run(theirs.eval(), inputs)
        assert (ours - their_logits).float().norm() <= TOLERANCE[scheme] * ours.float().norm()
        assert not torch.equal(ours, HF.run(before, inputs)), "quantized"
        kwargs = {name: tensor for name, tensor in inputs.items() if name in {"pixel_values", "image_grid_thw"}}
        features = [vision_features(model, kwargs) for model in (before, mine, theirs)]
    assert all(torch.equal(features[0], other) for other in features[1:]), "the vision tower is what it was"
    for name in packed:  # unpacked there by the first forward pass
        layer: Any = mine.get_submodule(name)
        assert torch.equal(theirs.get_submodule(name).weight, layer.dequantize())


def vision_features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the projector hands to the language model."""
    features = model.get_image_features(**inputs).pooler_output
    return torch.cat(list(features)) if isinstance(features, list | tuple) else features


@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_names_in_our_files_are_live_names(kind: str, tmp_path: Path) -> None:
    source, target = save(tmp_path / "source", kind), tmp_path / "packed"
    result = vlaquant.quantize(source, RECIPES["w4a16"], output=target)
    live = make(kind).state_dict().keys()
    assert not load_file(source / "model.safetensors").keys() <= live, "the source has other names"
    written = load_file(target / "model.safetensors").keys()
    own = {name for layer in result.plan.quantized for name in written if name.startswith(f"{layer}.weight")}
    assert written - own <= live
    config = read_config(target)["quantization_config"]
    assert config["ignore"] == []
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert all(target.startswith("re:^model\\.language_model\\.") for target in targets)


@pytest.mark.parametrize("kind", ["paligemma", "idefics3"])
def test_tied_heads_stay_tied(kind: str, tmp_path: Path) -> None:
    source, target = save(tmp_path / "source", kind), tmp_path / "packed"
    rules = [{"part": part, "scheme": "w4a16", "group_size": 32} for part in ("language", "head")]
    result = vlaquant.quantize(source, {"rules": rules}, output=target)
    head = next(layer for layer in result.plan.layers if layer.name == "lm_head")
    assert head.scheme is None
    assert "its weight is shared with" in head.reason
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    theirs: Any = AutoModelForImageTextToText.from_pretrained(target)
    untouched: Any = make(kind)
    for model in (vlaquant.load(target), theirs):
        loaded: Any = model
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert torch.equal(loaded.lm_head.weight, untouched.lm_head.weight)


def test_untied_heads_can_be_quantized(tmp_path: Path) -> None:
    source, target = save(tmp_path / "source", "llava"), tmp_path / "packed"
    result = vlaquant.quantize(source, {"rules": [{"part": "head", "scheme": "w8a16"}]}, output=target)
    assert set(result.plan.quantized) == {"lm_head"}
    theirs: Any = AutoModelForImageTextToText.from_pretrained(target)
    mine: Any = vlaquant.load(target)
    inputs = HF.inputs(mine, observations(1)[0])
    with torch.inference_mode():
        assert torch.equal(HF.run(mine, inputs), HF.run(theirs, inputs))


def test_the_known_defect_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaquant.export.compressed_tensors.target_patterns", lambda *_: ["Linear"])
    with pytest.raises(AssertionError, match="missing_keys"):
        test_transformers_opens_what_we_write("llava", "w8a8", tmp_path)
