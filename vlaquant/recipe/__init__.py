"""The recipe: one YAML file that says what is quantized, how, and with which data.

Parsed strictly: a key that is not known, a value of the wrong type or a scheme that does not exist is an error that
names the line, the place and the nearest legal word. What a recipe means for a model is decided in ``plan``.
"""

from vlaquant.recipe.base import parse_bytes
from vlaquant.recipe.goals import Budget, Require
from vlaquant.recipe.methods import (
    AutoRound,
    Awq,
    Gptaq,
    Gptq,
    GradientWeights,
    LayerScale,
    Quantizer,
    Rotation,
    Rtn,
    SmoothQuant,
    Transform,
    TypeWeights,
)
from vlaquant.recipe.needs import needs_calibration, needs_float_chain, pairs_inputs, require_calibration
from vlaquant.recipe.parsing import load_recipe
from vlaquant.recipe.sections import OnIndivisible, Recipe, Rule, pattern_matches
from vlaquant.recipe.sources import Calibration, Episodes, JsonLines, LeRobot, Text

__all__ = [
    "AutoRound",
    "Awq",
    "Budget",
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
    "Require",
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
    "parse_bytes",
    "pattern_matches",
    "require_calibration",
]
