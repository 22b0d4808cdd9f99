"""The recipe: one YAML file that says what is quantized, how, and with which data.

Parsed strictly: a key that is not known, a value of the wrong type or a scheme that does not exist is an error that
names the line, the place and the nearest legal word. What a recipe means for a model is decided in ``plan``.
"""

from vlaquant.recipe.needs import needs_calibration, needs_float_chain, pairs_inputs, require_calibration
from vlaquant.recipe.parsing import load_recipe
from vlaquant.recipe.sections import (
    AutoRound,
    Awq,
    Calibration,
    Episodes,
    Gptaq,
    Gptq,
    GradientWeights,
    JsonLines,
    LayerScale,
    LeRobot,
    OnIndivisible,
    Quantizer,
    Recipe,
    Rotation,
    Rtn,
    Rule,
    SmoothQuant,
    Text,
    Transform,
    TypeWeights,
)

__all__ = [
    "AutoRound",
    "Awq",
    "Calibration",
    "Episodes",
    "Gptaq",
    "Gptq",
    "GradientWeights",
    "JsonLines",
    "LayerScale",
    "LeRobot",
    "OnIndivisible",
    "Quantizer",
    "Recipe",
    "Rotation",
    "Rtn",
    "Rule",
    "SmoothQuant",
    "Text",
    "Transform",
    "TypeWeights",
    "load_recipe",
    "needs_calibration",
    "needs_float_chain",
    "pairs_inputs",
    "require_calibration",
]
