"""The kinds of models that vlaquant knows by name. A new one is one file with a table of names, and a line here."""

from typing import Any

from torch import nn

from vlaquant.errors import CheckpointError
from vlaquant.families.base import Family, FoldGroup, Inputs, find_folds, norm_offset
from vlaquant.families.causal_lm import CAUSAL_LM
from vlaquant.families.generic import GENERIC
from vlaquant.families.openvla import OPENVLA

__all__ = [
    "FAMILIES",
    "GENERIC",
    "Family",
    "FoldGroup",
    "Inputs",
    "family_of_config",
    "family_of_model",
    "find_folds",
    "norm_offset",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (OPENVLA, CAUSAL_LM, GENERIC)}


def family_of_model(model: nn.Module, name: str = "auto") -> Family:
    """The family called ``name``, or the first that owns the model; ``generic`` owns every module."""
    if name != "auto":
        return FAMILIES[name]
    return next(family for family in FAMILIES.values() if family.owns(model))


def family_of_config(config: dict[str, Any], name: str = "auto") -> Family:
    """The family for a directory's ``config.json``.

    Raises:
        CheckpointError: none loads it.
    """
    if name != "auto":
        return FAMILIES[name]
    for family in FAMILIES.values():
        if family.owns_config(config):
            return family
    loadable = ", ".join(family.name for family in FAMILIES.values() if family is not GENERIC)
    raise CheckpointError(
        f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')}: of no family that "
        f"vlaquant loads ({loadable}); load the model yourself and call vlaquant.quantize(model, recipe, run=...)"
    )
