"""A native OpenVLA: loads published directories on current transformers, without timm and without remote code."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

# Not from `transformers` itself, whose name stands in for the class and, in older 5.x, demands torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vlaquant.models.openvla.actions import ActionTokens, action_statistics, normalize, unnormalize
from vlaquant.models.openvla.configuration import OpenVLAConfig, TowerConfig, tower_to_dict
from vlaquant.models.openvla.modeling import OpenVLAForActionPrediction, OpenVLAOutput
from vlaquant.models.openvla.processing import PrismaticImageProcessor, PrismaticProcessor, prompt

__all__ = [
    "ActionTokens",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAOutput",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "TowerConfig",
    "action_statistics",
    "normalize",
    "prompt",
    "tower_to_dict",
    "unnormalize",
]

AutoConfig.register("openvla", OpenVLAConfig, exist_ok=True)
AutoImageProcessor.register(OpenVLAConfig, slow_image_processor_class=PrismaticImageProcessor, exist_ok=True)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor, exist_ok=True)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
