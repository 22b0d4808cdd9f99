"""Numbers that the original OpenVLA code produced (tests/data/openvla_reference), and our models with its weights."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlaquant.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticImageProcessor,
    PrismaticProcessor,
)

DATA = Path(__file__).parent / "data" / "openvla_reference"
NAMES = ("fused", "siglip", "dino_quick_gelu")
EMPTY_TOKEN = 4
#: Logits spread by about 3; float32 on another machine differs by some 1e-6.
TOLERANCE = 1e-4

_REMOTE_CODE = ("configuration_prismatic", "modeling_prismatic", "processing_prismatic")


@functools.cache
def record() -> dict[str, Any]:
    """Configurations and vocabulary."""
    content: dict[str, Any] = json.loads((DATA / "reference.json").read_text(encoding="utf-8"))
    return content


@functools.cache
def tensors(name: str) -> dict[str, Tensor]:
    """Weights, inputs and expected results of one model, or ``preprocessing``."""
    return load_file(DATA / f"{name}.safetensors")


def expected(name: str, key: str) -> Tensor:
    return tensors(name)[f"expected.{key}"]


def weights(name: str) -> dict[str, Tensor]:
    """The original's state dict in float32."""
    stored = tensors(name).items()
    return {key.removeprefix("weights."): value.float() for key, value in stored if key.startswith("weights.")}


def inputs(name: str) -> dict[str, Tensor]:
    """A batch of two prompts, the shorter one padded on the right."""
    stored = tensors(name)
    return {
        "input_ids": stored["input.ids"],
        "attention_mask": stored["input.mask"],
        "pixel_values": stored["input.pixels"],
        "labels": stored["input.labels"],
    }


def config_fields(name: str) -> dict[str, Any]:
    """``config.json`` as the original wrote it, plus the sizes of its tiny towers and its tiny vocabulary's token."""
    model = record()["models"][name]
    return {**model["config"], "vision_towers": model["vision_towers"], "empty_token_id": EMPTY_TOKEN}


def image_processor_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """``preprocessor_config.json`` without the class name, which is no argument."""
    return {key: value for key, value in fields.items() if key != "image_processor_type"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(record()["vocabulary"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )


def reference_processor(name: str) -> PrismaticProcessor:
    fields = image_processor_fields(record()["models"][name]["preprocessor"])
    return PrismaticProcessor(PrismaticImageProcessor(**fields), word_tokenizer())


def reference_model(name: str) -> OpenVLAForActionPrediction:
    """Our class with the original's weights, float32, and a processor."""
    fields = config_fields(name)
    del fields["model_type"]
    model = OpenVLAForActionPrediction(OpenVLAConfig(**fields)).float().eval()
    model.load_state_dict(weights(name))
    model.processor = reference_processor(name)
    return model


def differences(model: OpenVLAForActionPrediction, name: str) -> dict[str, float]:
    """Quantity -> largest difference from the original, for those that differ."""
    with torch.no_grad():
        output = model(**inputs(name))
        got = {"patches": model.vision_backbone(inputs(name)["pixel_values"]), "features": output.projector_features}
    got |= {"logits": output.logits, "loss": output.loss}
    distance = {key: float((value - expected(name, key)).abs().max()) for key, value in got.items()}
    return {key: value for key, value in distance.items() if not value <= TOLERANCE}


def published_directory(directory: Path, name: str) -> Path:
    """A directory as on the hub: bfloat16 shards, remote code (which complains if it runs), ``auto_map`` everywhere."""
    automap = {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    }
    processors_map = {
        "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
        "AutoProcessor": "processing_prismatic.PrismaticProcessor",
    }
    word_tokenizer().save_pretrained(directory)
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer_config |= {"auto_map": processors_map, "processor_class": "PrismaticProcessor"}
    config = config_fields(name)
    config["text_config"] = {**config["text_config"], "torch_dtype": "bfloat16"}
    config |= {"architectures": ["OpenVLAForActionPrediction"], "auto_map": automap, "torch_dtype": "bfloat16"}
    preprocessor = {**record()["models"][name]["preprocessor"], "processor_class": "PrismaticProcessor"}
    files = {
        "config.json": config,
        "preprocessor_config.json": preprocessor | {"auto_map": processors_map},
        "tokenizer_config.json": tokenizer_config | {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    state = {key: value.bfloat16() for key, value in weights(name).items()}
    place = {key: shards[index % 2] for index, key in enumerate(state)}
    for shard in shards:
        part = {key: value for key, value in state.items() if place[key] == shard}
        save_file(part, directory / shard, metadata={"format": "pt"})
    files["model.safetensors.index.json"] = {"metadata": {}, "weight_map": place}
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content), encoding="utf-8")
    for module in _REMOTE_CODE:
        (directory / f"{module}.py").write_text("raise AssertionError('remote code ran')\n", encoding="utf-8")
    return directory
