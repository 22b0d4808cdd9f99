"""Policies as LeRobot saves them: SmolVLA, π0 and π0.5, run through LeRobot's own classes.

Their layers are no units that run by themselves: all three unroll them, calling norms and projections one by one and
asking ``q_proj.weight.dtype`` on the way. Whatever watches them has to watch Linears.

Source: structure of lerobot 0.6.1 (Apache-2.0).
"""

import re
from typing import Any

from torch import nn

from vlaquant.families.base import Family
from vlaquant.families.folds import Fold, llama_folds
from vlaquant.families.lerobot.building import build, converted, live_names, load, owns, owns_config
from vlaquant.families.lerobot.processing import inputs_of
from vlaquant.families.lerobot.running import act, check, decide, example, run, token_masks, token_types

_VISION_BLOCK = r".*\.vision_(model|tower)\.(vision_model\.)?encoder\.layers\.\d+"
_SMOLVLA_EXPERT = r".*\.lm_expert\.layers\.\d+"
_PI_EXPERT = r".*\.gemma_expert\.model\.layers\.\d+"
_MODULATION = ("scale", "shift", "gate")
_UNREAD = re.compile(r".*\.(text_model|language_model)\.layers\.(\d+)\.(self_attn\.(?P<kv>[kv])_proj|.*)")


def _last_read(policy: Any) -> int:
    """The last language layer whose keys and values the expert reads."""
    if policy.config.type != "smolvla":
        return len(policy.model.paligemma_with_expert.paligemma.model.language_model.layers) - 1
    both = policy.model.vlm_with_expert
    layers, every = both.num_vlm_layers, max(1, both.num_vlm_layers // both.num_expert_layers)
    return int((layers - 1) // every * every)


def _dead(policy: Any) -> dict[str, str]:
    """Language heads, and what comes after the last keys and values that the expert reads."""
    last, dead = _last_read(policy), {}
    for name, module in policy.named_modules():
        if type(module) is not nn.Linear:
            continue
        layer = _UNREAD.fullmatch(name)
        if name.endswith(".lm_head"):
            dead[name] = "the policy predicts no words"
        elif layer is not None and int(layer[2]) + (layer["kv"] is None) > last:
            dead[name] = "the expert reads only keys and values, and none after these"
    return dead


def _attention(block: str, readers: str) -> Fold:
    return Fold(block, "{block}.input_layernorm", tuple(f"{{block}}.self_attn.{name}_proj" for name in readers))


def _modulated(norm: str, readers: tuple[str, ...]) -> Fold:
    """A norm whose scale and shift a Linear makes from the time, in π0.5's expert."""
    return Fold(_PI_EXPERT, f"{{block}}.{norm}.dense", tuple(f"{{block}}.{one}" for one in readers), chunks=_MODULATION)


_EVERY_STEP = "is small and runs at every denoising step, where its error would add up"
LEROBOT = Family(
    name="lerobot",
    parts=(
        ("head", r".*\.lm_head"),
        ("vision", r".*\.(vision_tower|vision_model)\..*"),
        ("projector", r".*\.(connector|multi_modal_projector)\..*"),
        ("language", r".*\.(text_model|language_model)\..*"),
        ("expert", r".*\.(lm_expert|gemma_expert)\..*"),
        ("action", r"model\.(state_proj|action_in_proj|action_out_proj|(action_)?time_mlp_(in|out))"),
    ),
    folds=(
        Fold(_VISION_BLOCK, "{block}.layer_norm1", tuple(f"{{block}}.self_attn.{name}_proj" for name in "qkv")),
        Fold(_VISION_BLOCK, "{block}.self_attn.v_proj", ("{block}.self_attn.out_proj",)),
        Fold(_VISION_BLOCK, "{block}.layer_norm2", ("{block}.mlp.fc1",)),
        # No values → output: the expert's output projections read values of both, side by side
        *llama_folds(r".*\.(text_model|language_model)\.layers\.\d+", values=False),
        *llama_folds(_SMOLVLA_EXPERT, values=False),
        # Layers in which the expert attends to the language's keys and values: only its queries read the norm
        _attention(_SMOLVLA_EXPERT, "q"),
        *llama_folds(_PI_EXPERT, values=False),
        _modulated("input_layernorm", tuple(f"self_attn.{name}_proj" for name in "qkv")),
        _modulated("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    owns=owns,
    owns_config=owns_config,
    load=load,
    build=build,
    dead=_dead,
    inputs=inputs_of,
    run=run,
    example=example,
    check=check,
    keep_float=(
        (r"model\.action_out_proj", f"its error is the velocity's, and it {_EVERY_STEP}"),
        (r"model\.action_in_proj", f"reads the noisy action itself, {_EVERY_STEP}"),
        (r"model\.state_proj", "reads the robot's state itself: 32 numbers of very different ranges"),
        (r"model\.(action_)?time_mlp_(in|out)", f"mixes the time into every action, {_EVERY_STEP}"),
        (r".*norm\.dense", "modulates a norm by the time alone: its error is the same for every token"),
    ),
    act=act,
    token_masks=token_masks,
    token_types=token_types,
    decide=decide,
    live_names=live_names,
    converted=converted,
    velocity=r"model\.action_out_proj",
)
