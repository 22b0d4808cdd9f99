"""Any causal language model or image-text-to-text model of transformers, through transformers' own classes.

Parts are found from names of modules that these models agree on (``visual``, ``vision_tower``, ``connector`` ...),
wherever they sit: full paths differ between versions of transformers.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families.base import Decision, Family, Inputs, TokenType, empty_weights, ready
from vlaquant.families.folds import Fold, llama_folds
from vlaquant.families.hf_samples import image_text_inputs
from vlaquant.families.observation import Observation
from vlaquant.families.renaming import live_names, require_complete
from vlaquant.families.streams import llama_stream

_ANYWHERE = r"(?:.*\.)?"
_VISION = "visual|vision_tower|vision_model|vision_encoder|vision_backbone|image_tower|video_tower"
_PROJECTOR = "multi_modal_projector|mm_projector|connector|merger|deepstack_merger_list|aligner|embed_vision|projector"
_AUDIO = "audio_tower|audio_model|audio_encoder"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_ROUTER = "chooses the experts, and a wrong choice costs more than its few weights"


def _names_of(mapping: dict[str, Any], model_type: str | None) -> tuple[str, ...]:
    names = mapping.get(model_type or "", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _auto_class(config: dict[str, Any]) -> Any:
    """The class of transformers that opens a directory with this ``config.json``; None if no one of ours does."""
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if config.get("is_encoder_decoder"):
        return None
    if any(name in architectures for name in _names_of(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, kind)):
        return AutoModelForImageTextToText
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and any(name.endswith(_CAUSAL) for name in architectures)
    return AutoModelForCausalLM if causal else None


def _class_of(directory: Path, config: Any) -> Any:
    opener = _auto_class(config.to_dict())
    if opener is None:
        raise CheckpointError(
            f"{directory}: {config.architectures} is no causal or image-text-to-text model of transformers; load the "
            "model yourself and call vlaquant.quantize(model, recipe, run=...)"
        )
    return opener


def _load(directory: Path) -> nn.Module:
    opener = _class_of(directory, AutoConfig.from_pretrained(directory, local_files_only=True))
    model, info = opener.from_pretrained(directory, dtype="auto", local_files_only=True, output_loading_info=True)
    require_complete(directory, info)
    return ready(model)


def _build(directory: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with empty_weights(config.dtype):
        model = _class_of(directory, config).from_config(config)
    model.tie_weights()  # parameters that moved to the meta device came apart
    empty: nn.Module = model.eval()
    return empty


def _owns(model: nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel):
        return False
    return _auto_class(model.config.to_dict() | {"architectures": [type(model).__name__]}) is not None


def _sees(model: Any) -> bool:
    return model.config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _dead(model: Any) -> dict[str, str]:
    """Vision blocks behind the one whose output is read (LLaVA reads the last but one)."""
    read = getattr(model.config, "vision_feature_layer", None)
    depth = getattr(getattr(model.config, "vision_config", None), "num_hidden_layers", None)
    if read is None or depth is None:
        return {}
    # States are counted with the embeddings as number 0, so state i is what block i - 1 returns
    last = max(layer if layer >= 0 else depth + 1 + layer for layer in ([read] if isinstance(read, int) else read))
    dead = {}
    for name, module in model.named_modules():
        block = re.fullmatch(rf"{_ANYWHERE}(?:{_VISION})\.(?:.*\.)?layers\.(\d+)\..*", name)
        if type(module) is nn.Linear and block and int(block[1]) >= last:
            dead[name] = f"features come from vision block {last - 1}"
    return dead


def _inputs(model: Any, sample: Any) -> Inputs:
    if isinstance(sample, Tensor):
        return {"input_ids": sample.to(model.get_input_embeddings().weight.device)}
    if not isinstance(sample, Observation):
        raise CalibrationError(f"a sample is a tensor of token ids [1, t] or an Observation, not {type(sample)}")
    if not _sees(model):
        raise CalibrationError(f"{type(model).__name__} reads no images; calibrate it with text")
    return image_text_inputs(model, sample)


def _run(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits [1, t, vocabulary]."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _token_types(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Of the language model's sequence, where there are images in it."""
    place = getattr(model.config, "image_token_id", None)
    ids = inputs["input_ids"]
    if place is None or not bool((ids == place).any()):
        return {}
    types = torch.where(ids == place, TokenType.IMAGE, TokenType.TEXT)
    return {"language": types, "head": types}


def _decide(model: nn.Module, inputs: Inputs) -> Decision:
    """Logits of the token after each."""
    return Decision(_run(model, inputs).flatten(0, 1).float(), tokens=True)


def _loss(model: nn.Module, sample: Any) -> Tensor:
    """Cross-entropy of each next token of a text."""
    if not isinstance(sample, Tensor):
        raise CalibrationError("a model of transformers learns from texts here; an Observation holds none to predict")
    inputs = _inputs(model, sample)
    loss: Tensor = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    return loss


def _example(model: Any) -> Inputs:
    """A made-up picture where the model reads pictures and its processor can be opened, else tokens."""
    if _sees(model) and getattr(model, "processor", None) is not None:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        return image_text_inputs(model, Observation((picture,), "do something"))
    ids = torch.randint(
        0, model.get_input_embeddings().num_embeddings, (1, 16), generator=torch.Generator().manual_seed(0)
    )
    special = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")]
    return _inputs(model, ids.masked_fill(torch.isin(ids, torch.tensor([one for one in special if one])), 0))


def _check(model: nn.Module, inputs: Inputs) -> None:
    """A model that answers the same to a black and a white image must not be calibrated: it does not look."""
    if "pixel_values" not in inputs:
        return
    with torch.inference_mode():
        black, white = (
            _run(model, inputs | {"pixel_values": torch.full_like(inputs["pixel_values"], value)})
            for value in (-1.0, 1.0)
        )
    if torch.equal(black, white):
        raise CalibrationError(
            f"{type(model).__name__} answers the same to a black and to a white image, so its images reach nothing: "
            "check the weights, the prompt and the version of transformers"
        )


def _vision_folds() -> tuple[Fold, ...]:
    """CLIP and SigLIP, Qwen's towers, InternVL's and Pixtral's; LayerNorm or RMSNorm."""
    layer, block = rf"{_ANYWHERE}layers?\.\d+", rf"{_ANYWHERE}blocks\.\d+"
    inner = "{block}.mlp"
    attention = tuple(f"{{block}}.self_attn.{name}_proj" for name in "qkv")
    intern = tuple(f"{{block}}.attention.{name}_proj" for name in "qkv")
    gated = (f"{inner}.gate_proj", f"{inner}.up_proj")
    return (
        Fold(layer, "{block}.layer_norm1", attention),
        Fold(layer, "{block}.self_attn.v_proj", ("{block}.self_attn.out_proj",), present=("{block}.layer_norm1",)),
        Fold(layer, "{block}.layer_norm2", (f"{inner}.fc1",)),
        Fold(layer, "{block}.layernorm_before", intern),
        Fold(layer, "{block}.layernorm_after", (f"{inner}.fc1",)),
        Fold(layer, "{block}.attention.projection_layer", gamma="{block}.lambda_1"),
        Fold(layer, f"{inner}.fc2", gamma="{block}.lambda_2"),
        Fold(layer, "{block}.attention_norm", intern),
        Fold(layer, "{block}.ffn_norm", ("{block}.feed_forward.gate_proj", "{block}.feed_forward.up_proj")),
        Fold(block, "{block}.norm1", ("{block}.attn.qkv",)),
        Fold(block, "{block}.norm2", (f"{inner}.fc1",)),
        Fold(block, "{block}.norm2", (f"{inner}.linear_fc1",)),
        Fold(block, "{block}.norm2", gated),
        Fold(block, f"{inner}.up_proj", (f"{inner}.down_proj",), present=(f"{inner}.gate_proj",)),
        Fold(rf"{_ANYWHERE}deepstack_merger_list\.\d+", "{block}.norm", ("{block}.linear_fc1",)),
    )


HF = Family(
    name="hf",
    parts=(
        ("head", rf"{_ANYWHERE}(?:lm_head|embed_out)"),
        ("projector", rf"{_ANYWHERE}(?:{_PROJECTOR})(?:\..*)?"),
        ("vision", rf"{_ANYWHERE}(?:{_VISION})\..*"),
        ("audio", rf"{_ANYWHERE}(?:{_AUDIO})\..*"),
        ("language", rf"{_ANYWHERE}(?:(?:language_model|text_model)\..*|(?:layers|h|blocks)\.\d+\..*)"),
    ),
    folds=(*llama_folds(rf"{_ANYWHERE}layers\.\d+"), *_vision_folds()),
    owns=_owns,
    owns_config=lambda config: _auto_class(config) is not None,
    load=_load,
    build=_build,
    dead=_dead,
    inputs=_inputs,
    run=_run,
    example=_example,
    check=_check,
    decide=_decide,
    keep_float=((rf"{_ANYWHERE}(?:mlp\.gate|router|shared_expert_gate)", _ROUTER),),
    token_types=_token_types,
    live_names=live_names,
    stream=llama_stream(
        r".*",
        head=rf"{_ANYWHERE}lm_head",
        # LLaVA and InternVL; PaliGemma; SmolVLM
        inputs=(
            (rf"{_ANYWHERE}multi_modal_projector\.linear_2", rf"{_ANYWHERE}multi_modal_projector\.linear"),
            (rf"{_ANYWHERE}connector\.modality_projection\.proj",),
        ),
        apart=(
            rf"{_ANYWHERE}(?:vision_tower|vision_model)(?:\..*)?",
            rf"{_ANYWHERE}multi_modal_projector\.(?:layer_norm|linear_1)",
        ),
    ),
    loss=_loss,
)
