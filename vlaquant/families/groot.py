"""GR00T N1.7: a Qwen3-VL that sees and reads, and a diffusion transformer that denoises the action, for many robots.

Their classes live in the Isaac-GR00T package, which vlaquant asks for only when a directory is to be loaded; a model
that is in memory already needs nothing. Samples are what their data collator makes: mappings of tensors.
"""

import importlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families.base import Decision, Family, Inputs, TokenType, empty_weights, ready
from vlaquant.families.folds import SCALE, SHIFT, Fold, llama_folds
from vlaquant.families.objectives import roots
from vlaquant.families.renaming import require_complete, stored_dtype
from vlaquant.linear import CategoryBank

#: Registers their classes with transformers.
_PACKAGE = "gr00t.model.gr00t_n1d7.gr00t_n1d7"
_SEEN = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "state", "embodiment_id")
_SHOWN = ("action", "action_mask")

_LANGUAGE = r"backbone\.model\.(model\.)?language_model"
_VISION = r"backbone\.model\.(model\.)?visual"
_EXPERT_BLOCK = r"action_head\.model\.transformer_blocks\.\d+"
_FUSION_BLOCK = r"action_head\.vl_self_attention\.transformer_blocks\.\d+"


def _register() -> None:
    try:
        importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise CheckpointError(
            f"a GR00T N1.7 directory needs the package Isaac-GR00T, which could not be imported ({error}). Install it, "
            "or load the model yourself and pass it: vlaquant.quantize(model, …), vlaquant.load(directory, model=model)"
        ) from error


def _load(directory: Path) -> nn.Module:
    _register()
    model, info = AutoModel.from_pretrained(
        directory, dtype="auto", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # The policy's own class does not name what its backbone ties, so nobody has tied it yet
    backbone = model.backbone.model
    backbone.tie_weights()
    info["missing_keys"] -= {f"backbone.model.{name}" for name in backbone.all_tied_weights_keys}
    require_complete(directory, info)
    return ready(model)


def _build(directory: Path) -> nn.Module:
    _register()
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with empty_weights(stored_dtype(directory, config)):
        model: Any = AutoModel.from_config(config)
    model.tie_weights()
    empty: nn.Module = model.eval()
    return empty


def _dead(model: nn.Module) -> dict[str, str]:
    return {
        name: "the action head reads the hidden states, and nobody the logits"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name == "backbone.model.lm_head"
    }


def _inputs(model: Any, sample: Mapping[str, Tensor]) -> Inputs:
    """The tensors of one batch, and a seed for the noise that depends on nothing but them.

    Raises:
        CalibrationError: not a mapping, or one of the tensors is not in it.
    """
    if not isinstance(sample, Mapping):
        raise CalibrationError(
            f"a sample for GR00T is a mapping of the tensors that its collator makes ({', '.join(_SEEN)} and, for the "
            f"training pass, {', '.join(_SHOWN)}), got {type(sample).__name__}"
        )
    missing = [name for name in _SEEN if name not in sample]
    if missing:
        raise CalibrationError(f"the sample has no {', '.join(missing)}; give what GR00T's collator makes")
    given = {name: sample[name].detach().cpu().contiguous() for name in (*_SEEN, *_SHOWN) if name in sample}
    seed = zlib.crc32(b"".join(given[name].view(torch.uint8).numpy().tobytes() for name in _SEEN))
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in given.items()} | {"seed": torch.tensor(seed)}


def _run(model: Any, inputs: Inputs) -> Tensor:
    """All denoising steps, and then one at a random time towards the shown action, as in training.

    Returns the normalized action, followed by the squared errors of the velocity in training if an action is shown:
    [b, chunk or 2 · chunk, dims].
    """
    action = _sample(model, inputs)
    if any(name not in inputs for name in _SHOWN):
        return action
    with _drawn_from(inputs):
        error: Tensor = model({name: inputs[name] for name in (*_SEEN, *_SHOWN)})["action_loss"]
    return torch.cat([action, error.to(action.dtype)], dim=1)


def _sample(model: Any, inputs: Inputs) -> Tensor:
    """The normalized action [b, chunk, dims]. An action among the inputs would mean something else to their method."""
    with _drawn_from(inputs):
        action: Tensor = model.get_action({name: inputs[name] for name in _SEEN})["action_pred"]
    return action


@contextmanager
def _drawn_from(inputs: Inputs) -> Iterator[None]:
    """The model draws its noise itself; inside it draws what the seed of the inputs says."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(inputs["seed"]))
        yield


def _act(model: Any, inputs: Inputs) -> Tensor:
    """Normalized, padded to the width of all robots: their processor alone knows a robot's units."""
    return _sample(model, inputs)[0].float()


def _token_masks(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {"language": inputs["attention_mask"].bool()}


def _token_types(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {
        "language": torch.where(
            inputs["input_ids"] == model.backbone.model.config.image_token_id, TokenType.IMAGE, TokenType.TEXT
        )
    }


def _decide(model: Any, inputs: Inputs) -> Decision:
    """The errors of the velocity, in the pass of training."""
    missing = [name for name in _SHOWN if name not in inputs]
    if missing:
        raise CalibrationError(f"weighing tokens by gradients takes the pass of training; give {', '.join(missing)}")
    with _drawn_from(inputs):
        errors: Tensor = model({name: inputs[name] for name in (*_SEEN, *_SHOWN)})["action_loss"]
    return Decision(roots(errors), tokens=False)


def _example(model: Any) -> Inputs:
    """A picture of noise, eight words, and the robot whose weights are there."""
    config, vlm, draw = model.config, model.backbone.model.config, torch.Generator().manual_seed(0)
    vision, merge = vlm.vision_config, vlm.vision_config.spatial_merge_size
    side = 2 * merge
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    special = [vlm.vision_start_token_id, *[vlm.image_token_id] * (side // merge) ** 2, vlm.vision_end_token_id]
    words = torch.randint(0, min(special), (8,), generator=draw)
    ids = torch.cat([torch.tensor(special), words]).unsqueeze(0)
    history = getattr(config, "state_history_length", 1)
    shape = (1, config.action_horizon, config.max_action_dim)
    kept = [bank.kept for bank in model.modules() if isinstance(bank, CategoryBank) and bank.kept is not None]
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn((side * side, pixels), generator=draw),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "state": torch.randn((1, history, config.max_state_dim), generator=draw),
        "embodiment_id": torch.tensor([kept[0] if kept else 0]),
        "action": torch.randn(shape, generator=draw),
        "action_mask": torch.ones(shape),
    }
    return _inputs(model, made)


def _check(model: Any, inputs: Inputs) -> None:
    """The policy must see: another picture makes another action."""
    with torch.inference_mode():
        seen = _sample(model, inputs)
        negative = _sample(model, inputs | {"pixel_values": -inputs["pixel_values"]})
    change = float((seen - negative).abs().max())
    if not change >= 0:
        raise CalibrationError("the actions are NaN: check the weights and the dtype")
    if change == 0:
        raise CalibrationError(
            "two different pictures give the same action: the picture does not reach it. Check that the vision weights "
            "were loaded and that the prompt has places for the picture"
        )


def _attention(*names: str) -> tuple[str, ...]:
    return tuple(f"{{block}}.attn1.to_{name}" for name in names)


_ADAPTIVE = "makes an adaptive norm's scales from the time alone: few numbers, and every channel hangs on them"
GROOT = Family(
    name="groot",
    parts=(
        ("vision", rf"{_VISION}\..*"),
        ("language", rf"{_LANGUAGE}\..*"),
        ("head", r"backbone\.model\.lm_head"),
        ("fusion", r"action_head\.(vl_self_attention|vlln)(\..*)?"),
        ("expert", r"action_head\.model\..*"),
        ("action", r"action_head\..*"),
    ),
    folds=(
        Fold(rf"{_VISION}\.blocks\.\d+", "{block}.norm1", ("{block}.attn.qkv",)),
        Fold(rf"{_VISION}\.blocks\.\d+", "{block}.norm2", ("{block}.mlp.linear_fc1",)),
        *llama_folds(rf"{_LANGUAGE}\.layers\.\d+"),
        Fold(_FUSION_BLOCK, "{block}.norm1", _attention("q", "k", "v")),
        Fold(_FUSION_BLOCK, "{block}.norm3", ("{block}.ff.net.0.proj",)),
        # Odd blocks attend to the actions; in even ones keys and values read what the backbone saw
        Fold(_EXPERT_BLOCK, "{block}.norm1.linear", _attention("q", "k", "v"), chunks=(SCALE, SHIFT)),
        Fold(_EXPERT_BLOCK, "{block}.norm1.linear", _attention("q"), chunks=(SCALE, SHIFT)),
        Fold(rf"{_FUSION_BLOCK}|{_EXPERT_BLOCK}", "{block}.attn1.to_v", ("{block}.attn1.to_out.0",)),
    ),
    owns=lambda model: type(model).__name__ == "Gr00tN1d7",
    owns_config=lambda config: config.get("model_type") == "Gr00tN1d7",
    load=_load,
    build=_build,
    dead=_dead,
    inputs=_inputs,
    run=_run,
    example=_example,
    check=_check,
    keep_float=(
        (r"action_head\.model\..*\.norm1\.linear", _ADAPTIVE),
        (r"action_head\.model\.proj_out_1", _ADAPTIVE),
        (r"action_head\.model\.timestep_encoder\..*", "encodes the time for all blocks, and is small"),
        (r"action_head\.model\.proj_out_2", "its error goes into the velocity of every denoising step"),
    ),
    act=_act,
    token_masks=_token_masks,
    token_types=_token_types,
    decide=_decide,
    velocity=r"action_head\.action_decoder",
)
