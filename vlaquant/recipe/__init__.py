"""The recipe: one YAML file that says what is quantized, how, and with which data.

Parsed strictly: a key that is not known, a value of the wrong type or a scheme that does not exist is an error that
names the line, the place and the nearest legal word. What a recipe means for a model is decided in ``plan``.
"""

from vlaquant.recipe.base import parse_bytes
from vlaquant.recipe.goals import Budget, Require
from vlaquant.recipe.needs import needs_calibration, require_calibration
from vlaquant.recipe.parsing import load_recipe
from vlaquant.recipe.sections import (
    Awq,
    Calibration,
    Episodes,
    Gptq,
    GradientWeights,
    JsonLines,
    LayerScale,
    LeRobot,
    OnIndivisible,
    Quantizer,
    Recipe,
    Rtn,
    Rule,
    SmoothQuant,
    Text,
    Transform,
    TypeWeights,
    pattern_matches,
)

__all__ = [
    "Awq",
    "Budget",
    "Calibration",
    "Episodes",
    "Gptq",
    "GradientWeights",
    "JsonLines",
    "LayerScale",
    "LeRobot",
    "OnIndivisible",
    "Quantizer",
    "Recipe",
    "Require",
    "Rtn",
    "Rule",
    "SmoothQuant",
    "Text",
    "Transform",
    "TypeWeights",
    "load_recipe",
    "needs_calibration",
    "parse_bytes",
    "pattern_matches",
    "require_calibration",
]
