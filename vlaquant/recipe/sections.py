"""What a recipe can hold: frozen values that are checked when they are made, each class one mapping of the file."""

import fnmatch
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from vlaquant.errors import RecipeError
from vlaquant.families import FAMILIES
from vlaquant.recipe.base import GroupSize, Name, RecipePath, Section
from vlaquant.recipe.goals import Budget, Require
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
        bits: overrides the preset's weight, as ``symmetric`` and ``group_size`` do.
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


class SmoothQuant(Section):
    """Move outliers from activations into weights: none of them at ``alpha`` 0, all at 1."""

    kind: Literal["smoothquant"] = "smoothquant"
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)


class Awq(Section):
    """Scale up the columns that matter most before rounding; ``grid`` strengths are tried."""

    kind: Literal["awq"] = "awq"
    grid: PositiveInt = 20


class LayerScale(Section):
    """Multiply the factors of LayerScales (DINOv2) into the Linears before them."""

    kind: Literal["layerscale"] = "layerscale"


class Rtn(Section):
    """Round each weight to the nearest code.

    Attributes:
        clip: a group's range: all of it, or searched for the least error on weights (``mse``) or outputs (``awq``).
    """

    kind: Literal["rtn"] = "rtn"
    clip: Literal["minmax", "mse", "awq"] = "minmax"


class Gptq(Section):
    """Round column by column and let the columns that are left make up for the error.

    Attributes:
        clip: as for rtn.
        damp: share of the Hessian's mean diagonal that is added to the diagonal.
        block_size: columns that are corrected together; changes speed, not the result.
        act_order: begin with the columns that see the largest activations.
    """

    kind: Literal["gptq"] = "gptq"
    clip: Literal["minmax", "mse", "awq"] = "minmax"
    damp: float = Field(default=0.01, gt=0.0, le=1.0)
    block_size: PositiveInt = 128
    act_order: bool = True


class TypeWeights(Section):
    """What a token of each type counts for in Hessians and in the losses of searches; padding counts for nothing."""

    kind: Literal["types"] = "types"
    image: float = Field(default=1.0, ge=0.0)
    text: float = Field(default=1.0, ge=0.0)
    state: float = Field(default=1.0, ge=0.0)
    action: float = Field(default=1.0, ge=0.0)

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not any((self.image, self.text, self.state, self.action)):
            raise ValueError("weighs all tokens 0; give at least one type a weight above 0")
        return self


class GradientWeights(Section):
    """A token counts for its squared gradient of what the policy decides, to a ``power``: less than 1 levels it out."""

    kind: Literal["gradient"] = "gradient"
    power: float = Field(default=1.0, gt=0.0, le=1.0)


Cameras = Annotated[tuple[Name | None, ...] | None, Field(strict=False, min_length=1)]


class Episodes(Section):
    """Recorded robot episodes: observations, evenly spread over one split of a ``datasets`` folder.

    Attributes:
        unnorm_key: dataset whose action statistics apply; can be left out if the checkpoint knows only one.
        cameras: image columns in the order of the policy's cameras, null for one that is missing; by default ``image``,
            or else all image columns.
        state: column of the state, by default ``state``; ``action`` likewise.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["episodes"] = "episodes"
    path: RecipePath
    unnorm_key: Name | None = None
    split: Name = "calibration"
    cameras: Cameras = None
    state: Name | None = None
    action: Name | None = None
    samples: PositiveInt = 64
    min_tokens: PositiveInt = 32


class LeRobot(Section):
    """A LeRobotDataset folder, layout 2.0, 2.1 or 3.0: frames spread over its episodes and their phases.

    Attributes:
        unnorm_key: as for episodes.
        cameras: keys in the order of the policy's cameras, null for one that is missing; by default all of the dataset.
        state: key of the state, by default ``observation.state``.
        action: key of the action, by default ``action``.
        chunk: give the actions of so many frames from each one on.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["lerobot"] = "lerobot"
    path: RecipePath
    unnorm_key: Name | None = None
    cameras: Cameras = None
    state: Name | None = None
    action: Name | None = None
    chunk: PositiveInt | None = None
    samples: PositiveInt = 64
    min_tokens: PositiveInt = 32


class JsonLines(Section):
    """A file with a JSON object a line beside image files, as docs/robot-data.md describes it; chosen as for lerobot.

    Attributes:
        unnorm_key: as for episodes.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: RecipePath
    unnorm_key: Name | None = None
    samples: PositiveInt = 64
    min_tokens: PositiveInt = 32


class Text(Section):
    """A text file: ``samples`` windows of ``sequence_length`` tokens, evenly spread.

    Attributes:
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["text"] = "text"
    path: RecipePath
    samples: PositiveInt = 64
    sequence_length: PositiveInt = 512
    min_tokens: PositiveInt = 32


Transform = Annotated[SmoothQuant | Awq | LayerScale, Field(discriminator="kind")]
Quantizer = Annotated[Rtn | Gptq, Field(discriminator="kind")]
TokenWeights = Annotated[TypeWeights | GradientWeights, Field(discriminator="kind")]
Calibration = Annotated[Episodes | LeRobot | JsonLines | Text, Field(discriminator="kind")]

#: Key of the recipe -> {kind: the section it then holds}.
KINDS: dict[str, dict[str, type[Section]]] = {
    "transforms": {"smoothquant": SmoothQuant, "awq": Awq, "layerscale": LayerScale},
    "quantizer": {"rtn": Rtn, "gptq": Gptq},
    "token_weights": {"types": TypeWeights, "gradient": GradientWeights},
    "calibration": {"episodes": Episodes, "lerobot": LeRobot, "jsonl": JsonLines, "text": Text},
}


def _some_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    if not rules:
        raise ValueError("is empty, so nothing would be quantized; add one such as {part: language, scheme: w4a16}")
    return rules


class Recipe(Section):
    """All decisions of one quantization run.

    Attributes:
        family: ``auto``, or a name of :data:`vlaquant.families.FAMILIES`.
        model: checkpoint directory to read.
        output: directory to write.
        rules: the first that matches a layer decides; a layer that none matches stays float.
        transforms: done in this order, before the quantizer.
        propagate: what later layers see of earlier ones while they are calibrated: their quantized or float output.
        token_weights: what tokens count for while layers are calibrated; all the same if it is left out.
        calibration: data; can be left out if nothing needs it or samples come from Python.
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
    transforms: Annotated[tuple[Transform, ...], Field(strict=False)] = ()
    quantizer: Quantizer = Rtn()
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

    def resolved(self) -> dict[str, Any]:
        """Plain values with all defaults written out; ``load_recipe`` turns them back into this recipe."""
        return self.model_dump(mode="json")
