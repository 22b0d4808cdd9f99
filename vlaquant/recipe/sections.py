"""What a recipe can hold: frozen values that are checked when they are made, each class one mapping of the file."""

import fnmatch
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vlaquant.errors import RecipeError
from vlaquant.families import FAMILIES
from vlaquant.recipe.base import GroupSize, Name, RecipePath, Section
from vlaquant.recipe.goals import Budget, Require
from vlaquant.recipe.methods import (
    AnyTransform,
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
    TokenWeights,
    Transform,
    TypeWeights,
)
from vlaquant.recipe.sources import Calibration, Episodes, JsonLines, LeRobot, Text
from vlaquant.recipe.words import did_you_mean
from vlaquant.scheme import Scheme, get_scheme

#: What to do with a layer whose columns do not divide into the groups of its scheme.
OnIndivisible = Literal["error", "nearest", "channel", "keep"]

_FLOAT = "float"


def _known_scheme(name: str) -> str:
    if name != _FLOAT:
        try:
            get_scheme(name)
        except RecipeError as error:
            raise ValueError(f"{error} ({_FLOAT!r} keeps layers as they are)") from error
    return name


def _known_family(name: str) -> str:
    known = ["auto", *FAMILIES]
    if name not in known:
        raise ValueError(f"unknown family {name!r}; known families: {', '.join(known)}{did_you_mean(name, known)}")
    return name


def _valid_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a glob, or ``re:`` and a regular expression for all of the name, matches."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return fnmatch.fnmatchcase(name, pattern)


class Rule(Section):
    """Which layers get which scheme. The first rule that matches a layer decides.

    A rule is about one kind of ``modules``, so that one for the Linears of a part never reaches its embeddings.

    Attributes:
        part: a part of the model, such as ``vision``, ``projector``, ``language`` or ``action``.
        pattern: instead of ``part``, a glob on module names, or ``re:`` and a regular expression for all of the name.
        scheme: a preset of :data:`vlaquant.scheme.PRESETS`, or ``float``.
        bits: of a weight, 2 to 8; overrides the preset's.
        symmetric: whether the grid has as much room above 0 as below; overrides the preset's.
        group_size: how many columns of a row share a scale, or ``channel`` (all of a row) or ``tensor``; overrides the
            preset's.
        on_indivisible: overrides the recipe's.
        modules: ``linear``; ``embedding``, lookup tables; or ``bank``, Linears with one weight a robot embodiment. The
            latter two take ``w8a16`` (one scale a row, or a robot and output) and ``float``.
        embodiment: of banks, keep only the weights of this one (its number in ``embodiment_id.json``), unchanged with
            ``float``. The checkpoint then refuses every other.
        why: shown in the plan as the reason, in the place of the rule; a budget says there why it chose.
    """

    part: Name | None = None
    pattern: Annotated[Name, AfterValidator(_valid_pattern)] | None = None
    scheme: Annotated[str, AfterValidator(_known_scheme)]
    bits: int | None = None
    symmetric: bool | None = None
    group_size: GroupSize | None = None
    on_indivisible: OnIndivisible | None = None
    modules: Literal["linear", "embedding", "bank"] = "linear"
    embodiment: Annotated[int, Field(ge=0)] | None = None
    why: Name | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.part is None) == (self.pattern is None):
            raise ValueError("needs exactly one of 'part' and 'pattern'")
        if self.scheme == _FLOAT and self._overrides():
            raise ValueError(f"scheme {_FLOAT!r} keeps weights as they are; remove {', '.join(self._overrides())}")
        try:
            scheme = self.resolve_scheme()
        except RecipeError as error:
            raise ValueError(str(error)) from error
        if self.modules != "linear" and scheme not in {None, get_scheme("w8a16")}:
            raise ValueError(f"modules {self.modules!r} can be stored as w8a16 (8 bits, one scale a row) or float only")
        if self.embodiment is not None and self.modules != "bank":
            raise ValueError("'embodiment' is about modules 'bank'; add 'modules: bank', or remove it")
        return self

    def _overrides(self) -> dict[str, Any]:
        values = {"bits": self.bits, "symmetric": self.symmetric, "group_size": self.group_size}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def target(self) -> str:
        """What the rule looks for: its part or its pattern."""
        target = self.pattern if self.part is None else self.part
        assert target is not None
        return target

    def matches(self, name: str, part: str) -> bool:
        """Whether the rule is about the module called ``name``, which belongs to ``part``."""
        return part == self.part if self.pattern is None else pattern_matches(self.pattern, name)

    def resolve_scheme(self) -> Scheme | None:
        """The preset with this rule's overrides; None keeps the layers float."""
        if self.scheme == _FLOAT:
            return None
        scheme = get_scheme(self.scheme)
        overrides = self._overrides()
        return scheme.with_weight(**overrides) if overrides else scheme


#: Key of the recipe -> {kind: the section it then holds}.
KINDS: dict[str, dict[str, type[Section]]] = {
    "transforms": {"smoothquant": SmoothQuant, "awq": Awq, "layerscale": LayerScale, "rotation": Rotation},
    "quantizer": {"rtn": Rtn, "gptq": Gptq, "gptaq": Gptaq, "autoround": AutoRound},
    "token_weights": {"types": TypeWeights, "gradient": GradientWeights},
    "calibration": {"episodes": Episodes, "lerobot": LeRobot, "jsonl": JsonLines, "text": Text},
}


def _some_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    if not rules:
        raise ValueError("is empty, so nothing would be quantized; add one such as {part: language, scheme: w4a16}")
    return rules


def _rotation_first(transforms: tuple[AnyTransform, ...]) -> tuple[AnyTransform, ...]:
    if any(isinstance(transform, Rotation) for transform in transforms[1:]):
        raise ValueError("rotation changes the whole model before anything else: put it first, and only once")
    return transforms


class Recipe(Section):
    """All decisions of one quantization run.

    Attributes:
        family: ``auto``, or a name of :data:`vlaquant.families.FAMILIES`.
        model: checkpoint directory to read.
        output: directory to write.
        rules: the first that matches a layer decides; a layer that none matches stays float.
        on_indivisible: what becomes of a layer whose columns do not divide into the groups of its scheme: an error, the
            ``nearest`` group size that divides, one scale a row (``channel``), or float (``keep``).
        transforms: done in this order, before the quantizer.
        quantizer: turns each weight into codes.
        propagate: what later layers see of earlier ones while they are calibrated: their quantized or float output.
        token_weights: what tokens count for while layers are calibrated; all the same if it is left out.
        calibration: data; can be left out if nothing needs it or samples come from Python.
        seed: of every random choice, such as which frames are taken.
        budget: shares precision out among the layers that rules quantize.
        require: gates that the written model has to pass.
        on_miss: when it misses one: fail, or give the layers that harm most the next better candidate of the budget,
            and try again.
    """

    family: Annotated[str, AfterValidator(_known_family)] = "auto"
    model: RecipePath | None = None
    output: RecipePath | None = None
    rules: Annotated[tuple[Rule, ...], Field(strict=False), AfterValidator(_some_rules)]
    on_indivisible: OnIndivisible = "error"
    transforms: Annotated[tuple[AnyTransform, ...], Field(strict=False), AfterValidator(_rotation_first)] = ()
    quantizer: Annotated[Quantizer | AutoRound, Field(discriminator="kind")] = Rtn()
    propagate: Literal["quantized", "float"] = "quantized"
    token_weights: TokenWeights | None = None
    calibration: Calibration | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    budget: Budget | None = None
    require: Require | None = None
    on_miss: Literal["fail", "raise_precision"] = "fail"

    @model_validator(mode="after")
    def _goals_make_sense(self) -> Self:
        if self.on_miss == "raise_precision" and (self.require is None or self.budget is None):
            raise ValueError(
                "on_miss: raise_precision needs gates in `require:`, and in `budget:` the candidates to raise layers to"
            )
        if self.require is not None and self.require.path is None and not isinstance(self.calibration, Episodes):
            raise ValueError("require: needs `path:`, held-out data of the calibration's kind")
        return self

    @property
    def rotation(self) -> Rotation | None:
        """The transform that changes the whole model before its first stage."""
        first = self.transforms[0] if self.transforms else None
        return first if isinstance(first, Rotation) else None

    @property
    def scalings(self) -> tuple[Transform, ...]:
        """The transforms that are done stage by stage."""
        return tuple(transform for transform in self.transforms if not isinstance(transform, Rotation))

    @model_validator(mode="after")
    def _something_to_correct(self) -> Self:
        quantizer = self.layer_quantizer
        if isinstance(self.quantizer, AutoRound) and self.propagate != "quantized":
            raise ValueError("quantizer autoround learns from what a block reads of quantized ones; remove 'propagate'")
        if isinstance(quantizer, Gptaq) and self.propagate == "float":
            raise ValueError(
                "quantizer gptaq makes up for what earlier quantized layers changed, and with 'propagate: float' they "
                "change nothing; use gptq, or 'propagate: quantized'"
            )
        if isinstance(quantizer, Gptaq) and quantizer.refit:
            raise ValueError("quantizer gptaq does not go with 'refit'; use gptq, or leave it out")
        return self

    @property
    def layer_quantizer(self) -> Quantizer:
        """The quantizer that makes the first codes of each layer, and the last unless its block is tuned."""
        return self.quantizer.start if isinstance(self.quantizer, AutoRound) else self.quantizer

    def resolved(self) -> dict[str, Any]:
        """Plain values with all defaults written out; ``load_recipe`` turns them back into this recipe."""
        return self.model_dump(mode="json")
