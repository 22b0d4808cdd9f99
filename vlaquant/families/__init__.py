"""The kinds of models that vlaquant knows by name. A new one is one file with a table of names, and a line here."""

from typing import Any

from torch import nn

from vlaquant.errors import CheckpointError, PlanError
from vlaquant.families.base import Converted, Decision, Family, Inputs
from vlaquant.families.folds import Fold, FoldGroup, find_folds, norm_offset, refused_folds
from vlaquant.families.groot import GROOT
from vlaquant.families.hf import HF
from vlaquant.families.lerobot import LEROBOT
from vlaquant.families.module import MODULE
from vlaquant.families.observation import Observation
from vlaquant.families.openvla import OPENVLA
from vlaquant.families.pi0 import PI0
from vlaquant.families.streams import Residual, find_residual

__all__ = [
    "FAMILIES",
    "MODULE",
    "Converted",
    "Decision",
    "Family",
    "Fold",
    "FoldGroup",
    "Inputs",
    "Observation",
    "Residual",
    "family_called",
    "family_of_config",
    "family_of_model",
    "find_folds",
    "find_residual",
    "norm_offset",
    "refused_folds",
    "register_family",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (OPENVLA, PI0, LEROBOT, GROOT, HF, MODULE)}


def register_family(family: Family) -> None:
    """Make a family of your own known to recipes, models and directories, before those of vlaquant.

    Call it where the module that defines the family is imported: verification imports that module in a fresh process.

    Raises:
        PlanError: its name is taken, or its functions are in a script, which no other process can import.
    """
    if family.name in FAMILIES:
        raise PlanError(f"a family {family.name!r} is known already; give yours another name")
    if family.load.__module__ == "__main__":
        raise PlanError(
            f"family {family.name!r} is defined in the script that runs, which no other process can import; move it "
            "into a module of its own"
        )
    known = dict(FAMILIES)
    FAMILIES.clear()
    FAMILIES.update({family.name: family} | known)


def family_called(name: str) -> Family:
    """The family of that name.

    Raises:
        CheckpointError: nobody registered it in this process.
    """
    if name not in FAMILIES:
        raise CheckpointError(
            f"family {name!r} is none of {', '.join(FAMILIES)}; import the module that registers it "
            "(vlaquant.families.register_family)"
        )
    return FAMILIES[name]


def family_of_model(model: nn.Module, name: str = "auto") -> Family:
    """The family called ``name``, or the first that owns the model; ``module`` owns every one."""
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
    loadable = ", ".join(family.name for family in FAMILIES.values() if family is not MODULE)
    raise CheckpointError(
        f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')}: of no family that "
        f"vlaquant loads ({loadable}); load the model yourself and call vlaquant.quantize(model, recipe, run=...)"
    )
