"""The configuration of a published OpenVLA directory, plus what a tiny model of the same class needs."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from vlaquant.errors import CheckpointError

ACTIVATIONS = ("gelu", "quick_gelu")
DECODINGS = ("autoregressive", "parallel", "regression")
#: What action and state statistics become [-1, 1].
NORMALIZATIONS = ("q99", "min_max")


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Sizes of one vision transformer, with timm's meaning of each.

    Attributes:
        registers: learned tokens beside the patches (DINOv2 with registers has 4).
        class_token: whether a class token leads the sequence.
        layer_scale: initial value of LayerScale, or None for a tower without it.
        attention_pool: whether the checkpoint holds a pooling head (SigLIP); it is stored but never run.
        activation: ``gelu`` or ``quick_gelu``.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    registers: int = 0
    class_token: bool = False
    layer_scale: float | None = None
    attention_pool: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise CheckpointError(f"vision tower with activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")


def _dinov2(width: int, depth: int, heads: int) -> TowerConfig:
    return TowerConfig(width, depth, heads, 4 * width, 14, registers=4, class_token=True, layer_scale=1e-5)


def _siglip(width: int, depth: int, heads: int, mlp: int, patch: int) -> TowerConfig:
    return TowerConfig(width, depth, heads, mlp, patch, attention_pool=True)


#: timm model id (without the pretraining tag and the image size) -> sizes.
TIMM_TOWERS = {
    "vit_small_patch14_reg4_dinov2": _dinov2(384, 12, 6),
    "vit_base_patch14_reg4_dinov2": _dinov2(768, 12, 12),
    "vit_large_patch14_reg4_dinov2": _dinov2(1024, 24, 16),
    "vit_base_patch16_siglip": _siglip(768, 12, 12, 3072, 16),
    "vit_large_patch16_siglip": _siglip(1024, 24, 16, 4096, 16),
    "vit_so400m_patch14_siglip": _siglip(1152, 27, 16, 4304, 14),
}


def tower_from_timm_id(model_id: str) -> TowerConfig:
    """Sizes for a timm id such as ``vit_so400m_patch14_siglip_224``.

    Raises:
        CheckpointError: an architecture that is not in the table.
    """
    name = re.sub(r"_\d{3}$", "", model_id.partition(".")[0])
    if name not in TIMM_TOWERS:
        raise CheckpointError(
            f"vision tower {model_id!r} is not known; known: {', '.join(TIMM_TOWERS)}. "
            "Give its sizes as `vision_towers` in config.json"
        )
    return TIMM_TOWERS[name]


class OpenVLAConfig(PretrainedConfig):
    """``config.json`` of an OpenVLA checkpoint (Kim et al. 2024, arXiv:2406.09246).

    The first block of arguments is what published directories contain. The second is ours and optional:

    Args:
        timm_model_ids: one tower or two (DINOv2 then SigLIP).
        timm_override_act_layers: activation per tower, or None for the tower's own.
        image_sizes: side of the square input of each tower, pixels.
        norm_stats: dataset name -> action statistics (``q01``, ``q99``, ``mask``).
        n_action_bins: edges of the uniform action bins in [-1, 1].
        pad_to_multiple_of: rows that the embedding has beyond the tokenizer's vocabulary.
        text_config: the language model's configuration.
        vision_towers: explicit sizes per tower, in place of ``timm_model_ids``.
        action_chunk: actions predicted in one call.
        action_decoding: ``autoregressive`` (the published way, one token after another), ``parallel`` (all tokens of
            the chunk in one pass over query tokens) or ``regression`` (OpenVLA-OFT, Kim et al. 2025, arXiv:2502.19645:
            a head reads the action from the hidden states of one pass, in which every token sees every other).
        action_query_token_ids: the query tokens of parallel decoding, action_chunk × action dimension of them.
        empty_token_id: the token that ends every prompt.
        num_images_in_input: cameras; their patches follow each other.
        action_dim: outputs of the action head.
        action_head_blocks: residual blocks of the action head.
        proprio_dim: numbers of the robot's state that a projector turns into one token; 0 for policies without it.
        action_normalization: what [-1, 1] stands for: ``q99``, the 1 % and 99 % quantiles, or ``min_max``.
        stop_token_id: the token that ends the answer; regression shows it after the action's positions.
    """

    model_type = "openvla"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  carries dtype and attn_implementation to the LM

    def __init__(
        self,
        *,
        timm_model_ids: list[str] | None = None,
        timm_override_act_layers: list[str | None] | None = None,
        image_sizes: list[int] | None = None,
        norm_stats: dict[str, Any] | None = None,
        n_action_bins: int = 256,
        pad_to_multiple_of: int = 64,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_towers: list[dict[str, Any]] | None = None,
        action_chunk: int = 1,
        action_decoding: str = "autoregressive",
        action_query_token_ids: list[int] | None = None,
        empty_token_id: int = 29871,
        num_images_in_input: int = 1,
        action_dim: int | None = None,
        action_head_blocks: int = 2,
        proprio_dim: int = 0,
        action_normalization: str = "q99",
        stop_token_id: int = 2,
        **kwargs: Any,
    ) -> None:
        self.timm_model_ids = timm_model_ids
        self.timm_override_act_layers = timm_override_act_layers
        self.image_sizes = image_sizes or [224]
        self.norm_stats = norm_stats or {}
        self.n_action_bins = n_action_bins
        self.pad_to_multiple_of = pad_to_multiple_of
        self.vision_towers = vision_towers
        self.action_chunk = action_chunk
        self.action_decoding = action_decoding
        self.action_query_token_ids = action_query_token_ids or []
        self.empty_token_id = empty_token_id
        self.num_images_in_input = num_images_in_input
        self.action_dim = action_dim
        self.action_head_blocks = action_head_blocks
        self.proprio_dim = proprio_dim
        self.action_normalization = action_normalization
        self.stop_token_id = stop_token_id
        self.text_config = _text_config(text_config)
        self._check_actions()
        super().__init__(**kwargs)

    def _check_actions(self) -> None:
        for field, known in (("action_decoding", DECODINGS), ("action_normalization", NORMALIZATIONS)):
            if getattr(self, field) not in known:
                raise CheckpointError(f"config.json: {field}={getattr(self, field)!r}; known: {', '.join(known)}")
        if self.action_decoding == "regression" and self.action_dim is None:
            raise CheckpointError("config.json: action_decoding='regression' needs `action_dim`, the head's outputs")
        for field in ("action_chunk", "num_images_in_input"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise CheckpointError(f"config.json: {field}={getattr(self, field)!r}; wanted a number from 1 up")

    @property
    def towers(self) -> tuple[TowerConfig, ...]:
        """Sizes of the one or two vision towers."""
        if self.vision_towers is not None:
            towers = [_tower_from_dict(tower) for tower in self.vision_towers]
        elif self.timm_model_ids:
            towers = [tower_from_timm_id(model_id) for model_id in self.timm_model_ids]
        else:
            raise CheckpointError("config.json gives neither `timm_model_ids` nor `vision_towers`")
        overrides = self.timm_override_act_layers or [None] * len(towers)
        if len(towers) > 2 or not len(towers) == len(self.image_sizes) == len(overrides):
            raise CheckpointError(
                f"config.json gives {len(towers)} vision towers, {len(self.image_sizes)} `image_sizes` and "
                f"{len(overrides)} `timm_override_act_layers`; OpenVLA has one or two towers and one entry for each"
            )
        return tuple(
            tower if override is None else replace(tower, activation=override)
            for tower, override in zip(towers, overrides, strict=True)
        )

    @property
    def action_vocab_size(self) -> int:
        """Tokens of the tokenizer; the last ``n_action_bins`` of them stand for actions."""
        return int(self.text_config.vocab_size) - self.pad_to_multiple_of


def _text_config(data: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    if isinstance(data, PretrainedConfig):
        return data
    values = dict(data or {})
    model_type = values.pop("model_type", "llama")
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**values)
    return config


def _tower_from_dict(data: Mapping[str, Any]) -> TowerConfig:
    legal = {field.name for field in fields(TowerConfig)}
    unknown = sorted(set(data) - legal)
    if unknown:
        raise CheckpointError(f"vision_towers: unknown keys {unknown}; legal keys: {sorted(legal)}")
    return TowerConfig(**data)


def tower_to_dict(tower: TowerConfig) -> dict[str, Any]:
    """Plain values for ``vision_towers`` in config.json."""
    return asdict(tower)
