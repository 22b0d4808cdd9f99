"""OpenVLA and its fine-tunes, through our own model class."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoProcessor

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families.base import Converted, Decision, Family, Inputs, TokenType, empty_weights, ready
from vlaquant.families.folds import Fold, llama_folds
from vlaquant.families.renaming import require_complete, stored_dtype
from vlaquant.families.streams import llama_stream
from vlaquant.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from vlaquant.models.openvla.actions import action_statistics, normalize, state_statistics, unnormalize
from vlaquant.models.openvla.side_heads import SideHeads, find_side_heads, read_side_heads

_TOWER_BLOCK = r"vision_backbone\.(fused_)?featurizer\.blocks\.\d+"


def _load(directory: Path) -> nn.Module:
    config, heads = _config(directory), _side_heads(directory)
    wanted = {name: getattr(config, name) for name in ("action_decoding", "proprio_dim")}
    if heads is not None:  # transformers would look for them in the weight files
        config.update({"action_decoding": "autoregressive", "proprio_dim": 0})
    loader: Any = OpenVLAForActionPrediction
    model, info = loader.from_pretrained(
        directory, dtype="auto", local_files_only=True, config=config, output_loading_info=True
    )
    require_complete(directory, info)
    if heads is not None:
        model.config.update(wanted)
        model.add_heads_()
        model.load_state_dict(read_side_heads(heads, model.dtype), strict=False, assign=True)
    _attach_side_files_(model, directory)
    return ready(model)


def _build(directory: Path) -> nn.Module:
    config = _config(directory)
    with empty_weights(stored_dtype(directory, config)):
        model = OpenVLAForActionPrediction(config)
    _attach_side_files_(model, directory)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _config(directory: Path) -> OpenVLAConfig:
    """The configuration, with what heads beside the weights say."""
    fields, _ = OpenVLAConfig.get_config_dict(directory, local_files_only=True)
    heads = _side_heads(directory)
    config: OpenVLAConfig = OpenVLAConfig.from_dict(fields | ({} if heads is None else heads.fields))
    return config


def _side_heads(directory: Path) -> SideHeads | None:
    fields, _ = OpenVLAConfig.get_config_dict(directory, local_files_only=True)
    return find_side_heads(directory, fields, OpenVLAConfig.from_dict(fields).text_config.hidden_size)


def _converted(directory: Path) -> Converted:
    """Heads of OpenVLA-OFT, which are pickles beside the weights."""
    heads = _side_heads(directory)
    if heads is None:
        return Converted()
    files = (*heads.files.values(), *(() if heads.said is None else (heads.said,)))
    return Converted(heads.fields, files, lambda: read_side_heads(heads, stored_dtype(directory, _config(directory))))


def _attach_side_files_(model: OpenVLAForActionPrediction, directory: Path) -> None:
    """Processor, and the statistics that fine-tunes keep in a file of their own: those of the base no longer apply.

    Old checkpoints call the processor's file ``preprocessor_config.json``, new ones ``processor_config.json``.
    """
    if any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        model.processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    statistics = directory / "dataset_statistics.json"
    if statistics.is_file():
        model.config.norm_stats = _dataset_statistics(statistics) or model.config.norm_stats


def _dataset_statistics(file: Path) -> dict[str, Any]:
    """Dataset name -> its statistics.

    Raises:
        CheckpointError: a file of another form.
    """
    try:
        datasets = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(datasets, dict):
        raise CheckpointError(f"{file}: holds no JSON object; wanted {{dataset: {{action: …}}, …}}")
    for name, stats in datasets.items():
        if not isinstance(stats, dict) or "action" not in stats:
            raise CheckpointError(f"{file}: {name} has no `action`; wanted {{dataset: {{action: …}}, …}}")
    return datasets


def _dead(model: nn.Module) -> dict[str, str]:
    assert isinstance(model, OpenVLAForActionPrediction)
    head = model.action_head
    dead = {} if head is None else {"language_model.lm_head": "the action head reads the hidden states before it"}
    for tower in ("featurizer", "fused_featurizer"):
        module = getattr(model.vision_backbone, tower)
        if module is None:
            continue
        last = f"vision_backbone.{tower}.blocks.{len(module.blocks) - 1}."
        pool = f"vision_backbone.{tower}.attn_pool."
        for name, child in model.named_modules():
            if type(child) is nn.Linear and name.startswith(last):
                dead[name] = "features come from the block before"
            elif type(child) is nn.Linear and name.startswith(pool):
                dead[name] = "the pooling head never runs"
    return dead


def _inputs(model: OpenVLAForActionPrediction, sample: Any) -> Inputs:
    """Prompt, images and state, and the statistics of the sample's dataset where it is clear which that is.

    For token-by-token policies also the demonstrated action's tokens, after ``prompt_tokens`` (a teacher-forced pass).
    """
    if len(sample.images) != model.config.num_images_in_input:
        raise CalibrationError(
            f"episode {sample.episode}: {len(sample.images)} images, and this policy has "
            f"{model.config.num_images_in_input} cameras; say which of the data's they are with `cameras:` in the "
            "recipe's calibration section"
        )
    missing = [camera for camera, image in enumerate(sample.images, start=1) if image is None]
    if missing:
        raise CalibrationError(
            f"episode {sample.episode}: no image of camera {missing[0]}, and this policy needs all of its "
            f"{model.config.num_images_in_input}; leave such samples out"
        )
    inputs = _observed(model, sample.images, sample.instruction, sample.state, sample.unnorm_key)
    if model.config.action_decoding != "autoregressive":
        return inputs
    if sample.action is None:
        raise CalibrationError(
            f"episode {sample.episode}: holds no action, and a policy that predicts token by token is calibrated "
            "on the demonstrated one; use data with actions"
        )
    stats = action_statistics(model.config.norm_stats, sample.unnorm_key, bounds=model.config.action_normalization)
    tokens = model.action_tokens.encode(normalize(sample.action, stats)).reshape(1, -1)
    prompt = inputs["input_ids"]
    shown = torch.from_numpy(tokens[:, :-1]).to(prompt.device)
    return inputs | {"input_ids": torch.cat([prompt, shown], dim=1), "prompt_tokens": torch.tensor([prompt.shape[1]])}


def _observed(
    model: OpenVLAForActionPrediction, images: Sequence[Any], instruction: str, state: Any, unnorm_key: str | None
) -> Inputs:
    input_ids, pixel_values = model.encode(images, instruction)
    inputs = {"input_ids": input_ids, "pixel_values": pixel_values}
    proprio = model.encode_state(state, unnorm_key)
    if proprio is not None:
        inputs["proprio"] = proprio
    datasets = model.config.norm_stats
    if unnorm_key is not None or len(datasets) == 1:
        stats = action_statistics(datasets, unnorm_key, bounds=model.config.action_normalization)
        inputs |= {f"action_{name}": torch.from_numpy(values) for name, values in stats.items()}
    return inputs


def _run(model: OpenVLAForActionPrediction, inputs: Inputs) -> Tensor:
    """What decides the action: a head's chunk [1, chunk, action dimension], or logits [1, t, vocabulary]."""
    input_ids = inputs["input_ids"]
    if model.config.action_decoding == "regression":
        return model.regress(input_ids, inputs["pixel_values"], inputs.get("proprio"))
    if model.config.action_decoding == "parallel":
        queries = torch.tensor([model.config.action_query_token_ids], device=input_ids.device)
        input_ids = torch.cat([input_ids, queries], dim=1)
    logits: Tensor = model(input_ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
    return logits


def _token_types(model: OpenVLAForActionPrediction, inputs: Inputs) -> dict[str, Tensor]:
    """Of the sequence that the language model reads, and its head."""
    ids, config = inputs["input_ids"], model.config
    text = torch.full((ids.shape[1],), TokenType.TEXT)
    seen = [torch.full((model.image_tokens,), TokenType.IMAGE)]
    if config.action_decoding == "regression":
        seen += [torch.full((1,), TokenType.STATE)] * (model.proprio_projector is not None)
        # Each empty place is read one place before its own
        actions = [
            torch.full((config.action_chunk * config.action_dim,), TokenType.ACTION),
            torch.full((1,), TokenType.TEXT),
        ]
        text[-1] = TokenType.ACTION
    elif config.action_decoding == "parallel":
        actions = [torch.full((len(config.action_query_token_ids),), TokenType.ACTION)]
    else:
        text[int(inputs["prompt_tokens"]) - 1 :] = TokenType.ACTION
        actions = []
    types = torch.cat([text[:1], *seen, text[1:], *actions]).unsqueeze(0).expand(len(ids), -1)
    return {"language": types, "action": types}


def _decide(model: OpenVLAForActionPrediction, inputs: Inputs) -> Decision:
    """The head's chunk, or the logits of every action token after the demonstrated ones before it."""
    output = _run(model, inputs)[0].float()
    if model.config.action_decoding == "regression":
        return Decision(output, tokens=False)
    if model.config.action_decoding == "parallel":
        rows = len(model.config.action_query_token_ids)
    else:
        rows = inputs["input_ids"].shape[1] - int(inputs["prompt_tokens"]) + 1
    bins = torch.from_numpy(model.action_tokens.bins(np.arange(output.shape[1])))
    return Decision(output[-rows:], tokens=True, bins=bins.to(output.device))


def _loss(model: OpenVLAForActionPrediction, sample: Any) -> Tensor:
    """Cross-entropy of the demonstrated action's tokens, or the mean absolute error of a head's normalized chunk."""
    inputs = _inputs(model, sample)
    if sample.action is None:
        raise CalibrationError(f"episode {sample.episode}: holds no action to learn from; use data with actions")
    stats = action_statistics(model.config.norm_stats, sample.unnorm_key, bounds=model.config.action_normalization)
    action, output = normalize(sample.action, stats), _run(model, inputs)
    if model.config.action_decoding == "regression":
        target = torch.from_numpy(action).to(output).reshape(1, -1, output.shape[-1])
        return F.l1_loss(output, target)
    tokens = torch.from_numpy(model.action_tokens.encode(action)).to(output.device).flatten()
    return F.cross_entropy(output[0, -len(tokens) :].float(), tokens)


def _prompt(inputs: Inputs) -> Inputs:
    """What the policy sees on the robot: no demonstrated action."""
    length = int(inputs["prompt_tokens"]) if "prompt_tokens" in inputs else inputs["input_ids"].shape[1]
    prompt = {"input_ids": inputs["input_ids"][:, :length], "pixel_values": inputs["pixel_values"]}
    return prompt | ({"proprio": inputs["proprio"]} if "proprio" in inputs else {})


def _act(model: OpenVLAForActionPrediction, inputs: Inputs) -> Tensor:
    if "action_low" not in inputs:
        known = ", ".join(model.config.norm_stats) or "none"
        raise CheckpointError(f"the checkpoint holds statistics of {known}; say which with unnorm_key")
    stats = {name: inputs[f"action_{name}"].cpu().numpy() for name in ("low", "high", "mask")}
    normalized = model.normalized_action(**_prompt(inputs), dimension=len(stats["low"]))
    return torch.from_numpy(unnormalize(normalized, stats))


def _example(model: OpenVLAForActionPrediction) -> Inputs:
    """Noise for images, and the middle of the first dataset's range for the state."""
    config, random = model.config, np.random.default_rng(0)
    shape = (config.image_sizes[0], config.image_sizes[0], 3)
    images = [random.integers(0, 256, shape, dtype=np.uint8) for _ in range(config.num_images_in_input)]
    key, state = next(iter(config.norm_stats), None), None
    if config.proprio_dim:
        stats = state_statistics(config.norm_stats, key, bounds=config.action_normalization)
        state = (stats["low"] + stats["high"]) / 2.0
    return _observed(model, images, "do something", state, key)


def _check(model: OpenVLAForActionPrediction, inputs: Inputs) -> None:
    """Before any data is used up on a policy that does not see."""
    model.check_sight(**_prompt(inputs))


OPENVLA = Family(
    name="openvla",
    parts=(
        ("vision", r"vision_backbone\..*"),
        ("projector", r"projector\..*"),
        ("language", r"language_model\.model\..*"),
        ("action", r"language_model\.lm_head"),
        ("action_head", r"action_head\..*"),
        ("proprio", r"proprio_projector\..*"),
    ),
    folds=(
        Fold(_TOWER_BLOCK, "{block}.norm1", ("{block}.attn.qkv",)),
        Fold(_TOWER_BLOCK, "{block}.norm2", ("{block}.mlp.fc1",)),
        Fold(_TOWER_BLOCK, "{block}.attn.proj", gamma="{block}.ls1.scale_factor"),
        Fold(_TOWER_BLOCK, "{block}.mlp.fc2", gamma="{block}.ls2.scale_factor"),
        *llama_folds(r"language_model\.model\.layers\.\d+"),
        Fold(r"action_head\.model\.mlp_resnet_blocks\.\d+", "{block}.ffn.0", ("{block}.ffn.1",)),
    ),
    owns=lambda model: isinstance(model, OpenVLAForActionPrediction),
    owns_config=lambda config: config.get("model_type") == "openvla",
    load=_load,
    build=_build,
    dead=_dead,
    inputs=_inputs,
    run=_run,
    example=_example,
    check=_check,
    keep_float=(
        (r"action_head\.model\.fc2", "small, and writes the action: every error in it reaches the arm"),
        (r"proprio_projector\..*", "small, and sees one token an observation, too few to calibrate on"),
    ),
    act=_act,
    token_types=_token_types,
    decide=_decide,
    converted=_converted,
    # The heads of OpenVLA-OFT read hidden states through a LayerNorm, and are not in here
    stream=llama_stream(
        r"language_model\.model",
        head=r"language_model\.lm_head",
        inputs=((r"projector\.fc3", r"projector\.fc2"),),
        apart=(r"vision_backbone\..*", r"projector\.fc[12]"),
    ),
    loss=_loss,
)
