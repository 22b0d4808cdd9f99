"""A LeRobot directory → the policy of LeRobot's own class, with every weight accounted for.

LeRobot's loaders are not used: they go on when tensors are missing (``strict=False``), or return a policy with random
weights after any error. They must not succeed on a quantized directory, so that one is marked: see ``converted``.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vlaquant.errors import CheckpointError
from vlaquant.families.base import Converted, empty_weights, ready
from vlaquant.families.lerobot.processing import Processors

#: What ``type`` in ``config.json`` may be.
POLICIES = ("smolvla", "pi0", "pi05")
_MARK = "vlaquant_"
_WEIGHTS = "model.safetensors"
#: Keys of ``config.json`` that are ours.
_OURS = "vlaquant"
_EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens"
_HEAD = "model.paligemma_with_expert.paligemma.lm_head"
#: Names that differ between releases of LeRobot, openpi and transformers; each is tried where the other is unknown.
_OTHER_NAMES = (
    (r"^(?!model\.)", "model."),
    (r"^(model\.)?action_time_mlp_", "model.time_mlp_"),
    (r"^(model\.)?time_mlp_", "model.action_time_mlp_"),
    (r"\.vision_tower\.vision_model\.", ".vision_tower."),
    (r"\.vision_tower\.(?!vision_model\.)", ".vision_tower.vision_model."),
)


def owns(model: nn.Module) -> bool:
    """Whether a live model is one of LeRobot's policies that we know."""
    return getattr(type(model), "name", None) in POLICIES and hasattr(model, "predict_action_chunk")


def owns_config(config: dict[str, Any]) -> bool:
    """Whether ``config.json`` is that of a policy as LeRobot saves it, or of one that we quantized."""
    return str(config.get("type")).removeprefix(_MARK) in POLICIES


def converted(source: Path) -> Converted:
    """Marks of the quantized directory: ``type`` is one that LeRobot has not registered, so its loaders refuse.

    The weights are not called ``model.safetensors`` there, either, for callers who bring a config of their own.
    """
    config = _read(source)
    shared = config["type"] != "smolvla" and _shares_embedding(source, config)
    ours = {"type": config["type"], "shared_embedding": shared}
    return Converted(config={"type": _MARK + config["type"], _OURS: ours}, numbered=True)


def load(directory: Path) -> nn.Module:
    """The policy with its weights.

    Raises:
        CheckpointError: LeRobot is not installed or refuses the config, or tensors are missing, left over or misshapen.
    """
    policy = build(directory)
    with safe_open(directory / _WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        renamed = live_names(policy, names)
        tensors = {renamed.get(name, name): file.get_tensor(name) for name in names}
    _fill_(policy, tensors, directory)
    return ready(policy)


def build(directory: Path) -> nn.Module:
    """The policy without weights: parameters on the meta device in the dtypes that LeRobot gives them.

    Raises:
        CheckpointError: LeRobot is not installed, or refuses the config.
    """
    values = _read(directory)
    factory = _lerobot(directory)
    config, pretrained = _policy_config(directory, values)
    device, config.device = config.device, None  # what is on the meta device cannot be moved to another
    try:
        with _quiet_hub(directory, values), empty_weights(torch.float32):
            policy: Any = factory.get_policy_class(config.type)(config)
    finally:
        config.device = device
    if config.type == "smolvla":
        backbone = policy.model.vlm_with_expert.vlm
        if pretrained:  # LeRobot would have loaded it from the hub in this dtype, before the policy's own weights
            for parameter in backbone.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        backbone.tie_weights()  # parameters that moved to the meta device came apart
    else:
        _head_last_(policy.model.paligemma_with_expert.paligemma)
        if _shares_embedding(directory, values):
            policy.get_submodule(_HEAD).weight = policy.get_submodule(_EMBEDDING).weight
    policy.processors = Processors(directory, config)
    empty: nn.Module = policy.eval()
    return empty


def _head_last_(backbone: Any) -> None:
    """Policies ask their first parameter where they are, and the head's, which never runs, may be nowhere."""
    head = backbone.lm_head
    del backbone.lm_head
    backbone.lm_head = head


def live_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """``Family.live_names``: names of other releases, and of tied tensors the first."""
    tensors = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    renamed = {}
    for name in names:
        known = _known_name(name, tensors)
        if known is not None and first[id(tensors[known])] != name:
            renamed[name] = first[id(tensors[known])]
    return renamed


def _known_name(name: str, tensors: dict[str, Any]) -> str | None:
    tried = [name]
    for pattern, other in _OTHER_NAMES:
        tried += [re.sub(pattern, other, one) for one in tried]
    return next((one for one in tried if one in tensors), None)


def _fill_(policy: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """Give every parameter its value, in the dtype that it has."""
    wanted = policy.state_dict(keep_vars=True)
    held = {id(wanted[name]) for name in tensors if name in wanted}
    left = [name for name in tensors if name not in wanted]
    missing = [name for name, tensor in wanted.items() if id(tensor) not in held]
    if left or missing:
        raise CheckpointError(_differences(directory, left, missing))
    for name, empty in wanted.items():
        if name not in tensors:
            continue
        if tensors[name].shape != empty.shape:
            raise CheckpointError(
                f"{directory}: {name} has the shape {list(tensors[name].shape)}, wanted {list(empty.shape)}: the file "
                "does not belong to this config.json"
            )
        value = tensors[name].to(empty.dtype)
        full = nn.Parameter(value, empty.requires_grad) if isinstance(empty, nn.Parameter) else value
        for place in (other for other, its in wanted.items() if its is empty):
            owner, _, leaf = place.rpartition(".")
            setattr(policy.get_submodule(owner), leaf, full)


def _differences(directory: Path, left: list[str], missing: list[str]) -> str:
    old = [name for name in left if re.match(r"(un)?normalize_", name)]
    if old:
        return (
            f"{directory}: holds normalization statistics among its weights ({old[0]}), as LeRobot saved them before "
            "0.4; run LeRobot's lerobot.processor.migrate_policy_normalization on it first"
        )
    return (
        f"{directory}: {len(missing)} tensors of the policy are not in {_WEIGHTS} ({', '.join(missing[:3]) or '-'}), "
        f"and {len(left)} of the file have no place in it ({', '.join(left[:3]) or '-'}). Does the file belong to "
        "this config.json, and to this version of LeRobot?"
    )


def _read(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return values


def _shares_embedding(directory: Path, values: dict[str, Any]) -> bool:
    """Whether π's language head is the only copy of the embedding, as in files that openpi wrote."""
    if _OURS in values:
        return bool(values[_OURS]["shared_embedding"])
    with safe_open(directory / _WEIGHTS, framework="pt") as file:
        names = list(file.keys())
    return not any(name.endswith("paligemma.model.language_model.embed_tokens.weight") for name in names)


def _lerobot(directory: Path) -> ModuleType:
    try:
        from lerobot.policies import factory
    except ImportError as error:
        raise CheckpointError(
            f"{directory}: holds a policy of LeRobot, which cannot be imported here ({error}). `make lerobot` makes an "
            "environment with it beside the usual one; with pip it is vlaquant[lerobot], for Python 3.12 or newer"
        ) from error
    module: ModuleType = factory
    return module


def _policy_config(directory: Path, values: dict[str, Any]) -> tuple[Any, bool]:
    """LeRobot's config, for building without hub, GPU and compiler; and whether a pretrained backbone was asked for."""
    from lerobot.configs.policies import PreTrainedConfig

    pretrained = bool(values.get("load_vlm_weights"))
    changed: dict[str, Any] = {
        "device": "cpu",
        "load_vlm_weights": False,
        # Wrappers of torch.compile would hide the Linears from calibration. Compile afterwards.
        "compile_model": False,
    }
    if isinstance(values.get("vlm_model_name"), str):
        changed["vlm_model_name"] = local_or_hub(directory, values["vlm_model_name"])
    kept = {key: value for key, value in values.items() if key not in {_OURS, "quantization_config"}}
    kept |= {key: value for key, value in changed.items() if key in values} | {"device": "cpu"}
    kept["type"] = str(values["type"]).removeprefix(_MARK)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(kept), encoding="utf-8")
        try:
            return PreTrainedConfig.from_pretrained(scratch), pretrained
        except Exception as error:
            raise CheckpointError(
                f"{directory}: LeRobot does not understand config.json: {error}. It may be of another LeRobot version"
            ) from error


def local_or_hub(directory: Path, name: str) -> str:
    """A model's name on the hub, or the path of the folder of that name inside a checkpoint directory."""
    return str(directory / name) if (directory / name).is_dir() else name


@contextmanager
def _quiet_hub(directory: Path, values: dict[str, Any]) -> Iterator[None]:
    """An error about the hub says which file is wanted."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{directory}: LeRobot wants the config and tokenizer of {values.get('vlm_model_name')!r}, which are not "
            f"on this machine ({error}). Connect once, or copy them into a folder of {directory} and name that folder "
            "in config.json under vlm_model_name"
        ) from error
