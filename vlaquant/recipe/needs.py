"""Which parts of a recipe cannot work without calibration data."""

from vlaquant.errors import RecipeError
from vlaquant.recipe.methods import AutoRound, Gptaq, Gptq, LayerScale, Rotation, Rtn
from vlaquant.recipe.sections import Recipe


def needs_calibration(recipe: Recipe) -> list[str]:
    """The parts of the recipe that need data, each with the reason; empty if it works without."""
    reasons = []
    for position, rule in enumerate(recipe.rules):
        scheme = rule.resolve_scheme()
        if scheme is not None and scheme.activation is not None and not scheme.activation.dynamic:
            reasons.append(f"rules[{position}] ({scheme.name}: activation ranges are fixed beforehand)")
    for position, transform in enumerate(recipe.transforms):
        if isinstance(transform, Rotation):
            continue
        why = "is checked on real inputs" if isinstance(transform, LayerScale) else "scales come from activations"
        reasons.append(f"transforms[{position}] ({transform.kind}: {why})")
    if isinstance(recipe.quantizer, AutoRound):
        reasons.append("quantizer (autoround: learns from real inputs)")
    elif isinstance(recipe.quantizer, Gptq | Gptaq):
        reasons.append(f"quantizer ({recipe.quantizer.kind}: minimizes the error on real inputs)")
    elif recipe.quantizer.clip == "awq":
        reasons.append("quantizer (clip awq: ranges are searched on real inputs)")
    if isinstance(recipe.quantizer, Rtn) and recipe.quantizer.refit:
        reasons.append("quantizer (refit: scales are fitted to real inputs)")
    if recipe.token_weights is not None:
        reasons.append("token_weights (tokens are those of real inputs)")
    return reasons


def needs_float_chain(recipe: Recipe) -> bool:
    """Whether the quantizer compares what layers read with what they read in the float model."""
    return isinstance(recipe.quantizer, AutoRound) or pairs_inputs(recipe)


def pairs_inputs(recipe: Recipe) -> bool:
    """Whether every token that a layer reads is compared with the same token in the float model."""
    return isinstance(recipe.layer_quantizer, Gptaq)


def require_calibration(recipe: Recipe) -> None:
    """Refuse a recipe that needs data and names none. For callers that got no samples in another way.

    Raises:
        RecipeError: names every part of the recipe that needs data.
    """
    reasons = needs_calibration(recipe)
    if reasons and recipe.calibration is None:
        raise RecipeError(
            f"calibration: missing, but data is needed by {'; '.join(reasons)}. "
            "Add a section such as 'calibration: {kind: episodes, path: DIR}', or pass samples= in Python"
        )
