"""vlaquant: post-training quantization for vision-language-action policies, with proof that they still act the same."""

from vlaquant.errors import VlaquantError
from vlaquant.export import load
from vlaquant.pipeline import plan, quantize
from vlaquant.plan import Plan
from vlaquant.recipe import Recipe, load_recipe
from vlaquant.result import QuantizationResult
from vlaquant.sensitivity import Scan, sensitivity
from vlaquant.training import Training, finetune

__all__ = [
    "Plan",
    "QuantizationResult",
    "Recipe",
    "Scan",
    "Training",
    "VlaquantError",
    "finetune",
    "load",
    "load_recipe",
    "plan",
    "quantize",
    "sensitivity",
]
