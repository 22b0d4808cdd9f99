"""π0 as transformers has it: a PaliGemma that sees and reads, and a smaller Gemma that denoises the action.

The prefix (images and instruction) runs once and leaves its keys and values in a cache; the expert then runs once for
every denoising step over the state and the noisy action, and reads that cache.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_processing_backends import PilBackend
from transformers.models.pi0.image_processing_pi0 import PI0ImageProcessor
from transformers.models.pi0.processing_pi0 import PI0Processor

from vlaquant.errors import CalibrationError
from vlaquant.families.base import Decision, Family, Inputs, TokenType, empty_weights, ready
from vlaquant.families.folds import Fold, llama_folds
from vlaquant.families.renaming import live_names, require_complete, stored_dtype

_VISION_BLOCK = r".*\.vision_tower\.(vision_model\.)?encoder\.layers\.\d+"
_STATISTICS = ("state_mean", "state_std", "actions_mean", "actions_std", "max_state_dim", "chunk_size")

#: PI0ImageProcessor itself needs torchvision. Resized by PIL, a few pixels of an image differ from its by a grey level.
_ImageProcessor: Any = type(
    "PI0ImageProcessorPil",
    (PilBackend,),
    {name: value for name, value in vars(PI0ImageProcessor).items() if not name.startswith("_")},
)


def _load(directory: Path) -> nn.Module:
    opener: Any = AutoModelForImageTextToText
    model, info = opener.from_pretrained(
        directory, dtype="auto", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    require_complete(directory, info)
    model.processor = _processor(directory)
    return ready(model)


def _build(directory: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with empty_weights(stored_dtype(directory, config)):
        model: Any = AutoModelForImageTextToText.from_config(config)
    model.processor = _processor(directory)
    empty: nn.Module = model.eval()
    return empty


def _processor(directory: Path) -> Any:
    """The directory's processor; None if it has none."""
    values: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            values |= json.loads((directory / name).read_text(encoding="utf-8"))
    if not values:
        return None
    image = values.get("image_processor", values)
    kinds = {"image_processor_type", "processor_class", "backend", "image_processor"}
    return PI0Processor(
        _ImageProcessor(**{name: value for name, value in image.items() if name not in {*kinds, *_STATISTICS}}),
        AutoTokenizer.from_pretrained(directory, local_files_only=True),
        **{name: values[name] for name in _STATISTICS if name in values},
    )


def _dead(model: Any) -> dict[str, str]:
    """Of the last language layer only the keys and values are used, by the expert."""
    reason = "the expert reads only the keys and values of the last language layer"
    last = f"layers.{len(model.model.vlm.language_model.layers) - 1}."
    unread = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {
        name: reason
        for name, module in model.named_modules()
        if type(module) is nn.Linear and f".language_model.{last}" in name and name.endswith(unread)
    }


def _inputs(model: Any, sample: Any) -> Inputs:
    """Images, prompt, state, action, noise and time of an observation.

    A missing camera is left out, as transformers' processor does: the prompt then has no place for it. A chunk that is
    shorter than the policy's goes on with its last action, as the ends of recorded episodes do.

    Raises:
        CalibrationError: no camera has an image, no state was recorded, or the checkpoint came without a processor.
    """
    where = f"episode {sample.episode}, {sample.instruction!r}"
    images = [image for image in sample.images if image is not None]
    if not images:
        raise CalibrationError(f"{where}: no camera has an image; take this observation out of the data")
    if sample.state is None:
        raise CalibrationError(f"{where}: the robot's state was not recorded, and this policy needs it")
    if model.processor is None:
        raise CalibrationError(
            "the checkpoint has no processor_config.json, so observations cannot be turned into inputs; save the "
            "policy's PI0Processor into its directory"
        )
    action = None if sample.action is None else _chunk(sample.action, model.config.chunk_size)
    made = model.processor(images=[images], text=[sample.instruction], state=sample.state, actions=action)
    content = [sample.instruction.encode(), sample.state.tobytes(), *(image.tobytes() for image in images)]
    return _complete(model, dict(made), zlib.crc32(b"".join(content)))


def _chunk(action: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """[length, dims]."""
    action = np.atleast_2d(action)[:length]
    return np.concatenate([action, np.repeat(action[-1:], length - len(action), axis=0)])


def _complete(model: Any, inputs: dict[str, Tensor], seed: int) -> Inputs:
    """Add noise and time, drawn as in training; floats in the model's dtype, all on its device."""
    config = model.config
    embedding = model.get_input_embeddings().weight
    shape = (1, config.chunk_size, config.max_action_dim)
    inputs["noise"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drawn = np.random.default_rng(seed).beta(config.time_sampling_beta_alpha, config.time_sampling_beta_beta)
    inputs = {
        name: tensor.to(embedding.device, embedding.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
    time = drawn * config.time_sampling_scale + config.time_sampling_offset
    return inputs | {"timestep": torch.tensor([time], dtype=torch.float32, device=embedding.device)}


def _run(model: Any, inputs: Inputs) -> Tensor:
    """Every denoising step, and then one at a random time towards the demonstrated action, as in training.

    Both read the same prefix, so it runs once. Returns the normalized action, followed by the velocity of the step in
    training: [1, chunk or 2 · chunk, dims].
    """
    prefix: list[Any] = []
    hook = model.model.vlm.register_forward_hook(lambda _module, _args, output: prefix.append(output.past_key_values))
    try:
        sampled = _sample(model, inputs)
    finally:
        hook.remove()
    if "actions" not in inputs:
        return sampled
    suffix = {name: inputs[name] for name in ("state", "noise", "timestep", "actions", "attention_mask")}
    velocity: Tensor = model(**suffix, past_key_values=prefix[0]).logits
    return torch.cat([sampled, velocity], dim=1)


def _loss(model: Any, sample: Any) -> Tensor:
    """The squared error of the velocity at a random time of a random path to the demonstrated action."""
    inputs = _inputs(model, sample)
    if "actions" not in inputs:
        raise CalibrationError(f"episode {sample.episode}: holds no action to learn from; use data with actions")
    # The model draws noise and time itself where they are not given
    given = {name: tensor for name, tensor in inputs.items() if name not in {"noise", "timestep"}}
    loss: Tensor = model(**given).loss
    return loss.mean()


def _sample(model: Any, inputs: Inputs, steps: int | None = None) -> Tensor:
    """The normalized action [1, chunk, dims] after all denoising steps, or fewer."""
    seen = ("state", "input_ids", "pixel_values", "noise", "attention_mask", "pixel_attention_mask")
    action: Tensor = model.sample_actions(**{name: inputs[name] for name in seen}, num_steps=steps)
    return action


def _act(model: Any, inputs: Inputs) -> Tensor:
    """In the units of the robot if the processor knows them, else normalized."""
    action = _sample(model, inputs)[0].float()
    processor = getattr(model, "processor", None)
    if processor is None or processor.actions_mean is None:
        return action
    mean, std = (
        torch.as_tensor(values, device=action.device) for values in (processor.actions_mean, processor.actions_std)
    )
    return action[:, : len(mean)] * (std + 1e-8) + mean


def _token_masks(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Whole images for the vision tower, in the order in which cameras are stacked; prompt tokens for the language."""
    cameras = inputs["pixel_attention_mask"].bool().flatten()
    return {"vision": cameras, "projector": cameras, "language": inputs["attention_mask"].bool()}


def _token_types(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """The prompt with its images; and the state and the noisy actions that the expert reads."""
    ids = inputs["input_ids"]
    language = torch.where(ids == model.config.vlm_config.image_token_id, TokenType.IMAGE, TokenType.TEXT)
    expert = torch.tensor([TokenType.STATE, *[TokenType.ACTION] * model.config.chunk_size]).expand(len(ids), -1)
    return {"language": language, "expert": expert}


def _decide(model: Any, inputs: Inputs) -> Decision:
    """The velocity at the sample's random time: the joint pass of training, as sampling has no gradients."""
    names = ("state", "noise", "timestep", "input_ids", "pixel_values", "pixel_attention_mask", "attention_mask")
    noisy = {name: inputs[name] for name in (*names, "actions") if name in inputs}
    return Decision(model(**noisy).logits.flatten(0, 1).float(), tokens=False)


def _example(model: Any) -> Inputs:
    """Two cameras of noise, and eight words."""
    config, draw = model.config, torch.Generator().manual_seed(0)
    vision = config.vlm_config.vision_config
    places = torch.full((1, 2 * (vision.image_size // vision.patch_size) ** 2), config.vlm_config.image_token_id)
    words = torch.randint(0, min(config.vlm_config.image_token_id, 100), (1, 8), generator=draw)
    input_ids = torch.cat([places, words], dim=1)
    made = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn((1, 2, 3, vision.image_size, vision.image_size), generator=draw),
        "pixel_attention_mask": torch.ones((1, 2), dtype=torch.bool),
        "state": torch.randn((1, config.max_state_dim), generator=draw),
        "actions": torch.randn((1, config.chunk_size, config.max_action_dim), generator=draw),
    }
    return _complete(model, made, seed=0)


def _check(model: Any, inputs: Inputs) -> None:
    """The policy must see: a camera, a place for its image in the prompt, and another velocity for another image."""
    if not bool(inputs["pixel_attention_mask"].any()):
        raise CalibrationError("all cameras are masked out, so there is nothing to see; give images")
    places = (inputs["input_ids"] == model.config.vlm_config.image_token_id) & inputs["attention_mask"].bool()
    if not bool(places.any()):
        raise CalibrationError(
            f"the prompt has no place for an image (no token {model.config.vlm_config.image_token_id}, the "
            "image_token_id of config.json): the tokenizer does not belong to this checkpoint"
        )
    with torch.inference_mode():
        seen = _sample(model, inputs, steps=1)
        negative = _sample(model, inputs | {"pixel_values": -inputs["pixel_values"]}, steps=1)
    change = float((seen - negative).abs().max())
    if not change >= 0:
        raise CalibrationError("the velocities are NaN: check the weights and the dtype")
    if change == 0:
        raise CalibrationError(
            "two different images give the same velocities: the image does not reach the action. Check that the vision "
            "weights were loaded and that the checkpoint matches its config.json"
        )


_EVERY_STEP = "is small and runs at every denoising step, where its error would add up"
PI0 = Family(
    name="pi0",
    parts=(
        ("vision", r".*\.vision_tower\..*"),
        ("projector", r".*\.multi_modal_projector\..*"),
        ("language", r".*\.language_model\..*"),
        ("expert", r".*\.dit\..*"),
        ("action", r"embed_action_time\..*|action_out_proj"),
    ),
    folds=(
        Fold(_VISION_BLOCK, "{block}.layer_norm1", tuple(f"{{block}}.self_attn.{name}_proj" for name in "qkv")),
        Fold(_VISION_BLOCK, "{block}.layer_norm2", ("{block}.mlp.fc1",)),
        # No values → output: the expert's output projections read values of both, through the cache
        *llama_folds(r".*\.language_model\.layers\.\d+", values=False),
        *llama_folds(r".*\.dit\.layers\.\d+", values=False),
    ),
    owns=lambda model: type(model).__name__ == "PI0ForConditionalGeneration",
    owns_config=lambda config: config.get("model_type") == "pi0",
    load=_load,
    build=_build,
    dead=_dead,
    inputs=_inputs,
    run=_run,
    example=_example,
    check=_check,
    keep_float=(
        (r"action_out_proj", f"its error is the velocity's, and it {_EVERY_STEP}"),
        (r"embed_action_time\.action_in_proj", f"reads the noisy action itself, {_EVERY_STEP}"),
        (r"embed_action_time\.state_proj", "reads the robot's state itself: 32 numbers of very different ranges"),
        (r"embed_action_time\.action_time_mlp_(in|out)", f"mixes the time into every action, {_EVERY_STEP}"),
    ),
    act=_act,
    decide=_decide,
    token_masks=_token_masks,
    token_types=_token_types,
    loss=_loss,
    live_names=live_names,
    velocity=r"action_out_proj",
)
