"""What a recipe can hold: frozen values that are checked when they are made, each class one mapping of the file."""

import fnmatch
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, PositiveInt, ValidationInfo, model_validator

from vlaquant.errors import RecipeError
from vlaquant.families import FAMILIES
from vlaquant.recipe.words import did_you_mean, shown
from vlaquant.scheme import Granularity, Scheme, get_scheme

#: What to do with a layer whose columns do not divide into the groups of its scheme.
OnIndivisible = Literal["error", "nearest", "channel", "keep"]

_FLOAT = "float"


def _group_size(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and value in {Granularity.CHANNEL, Granularity.TENSOR}:
        return value
    raise ValueError(f"must be a positive number of columns, 'channel' or 'tensor', got {shown(value)}")


def _anchored(path: Path, info: ValidationInfo) -> Path:
    """``path`` as seen from the recipe file's folder; as it is for a recipe that came as a mapping."""
    folder: Path | None = (info.context or {}).get("folder")
    return path if folder is None else Path(os.path.normpath(folder / path.expanduser()))


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


def _alpha(value: object) -> float | str:
    if value == "search":
        return "search"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number from 0 to 1, or 'search', got {shown(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"must be from 0 to 1, or 'search', got {shown(value)}")
    return float(value)


Name = Annotated[str, Field(min_length=1)]
GroupSize = Annotated[int | Literal["channel", "tensor"], PlainValidator(_group_size)]
Alpha = Annotated[float | Literal["search"], PlainValidator(_alpha)]
RecipePath = Annotated[Path, Field(strict=False), AfterValidator(_anchored)]


class Section(BaseModel, frozen=True, extra="forbid", strict=True):
    """A mapping of the recipe: no key beyond those declared, no conversion between types."""


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
        if self.pattern is None:
            return part == self.part
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern.removeprefix("re:"), name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)

    def resolve_scheme(self) -> Scheme | None:
        """The preset with this rule's overrides; None keeps the layers float."""
        if self.scheme == _FLOAT:
            return None
        scheme = get_scheme(self.scheme)
        overrides = self._overrides()
        return scheme.with_weight(**overrides) if overrides else scheme


class _OfParts(Section):
    """A transform: for all of the model, or only for the ``parts`` that it names.

    Attributes:
        parts: of the model; all if it is left out.
    """

    parts: Annotated[tuple[Name, ...] | None, Field(strict=False, min_length=1)] = None


class SmoothQuant(_OfParts):
    """Move outliers from activations into weights.

    Attributes:
        parts: of the model that it is for; all if it is left out.
        alpha: how much of them moves: nothing at 0, all at 1; ``search`` looks for the best of each fold.
    """

    kind: Literal["smoothquant"] = "smoothquant"
    alpha: Alpha = 0.5


class Awq(_OfParts):
    """Scale up the columns that matter most before rounding.

    Attributes:
        parts: of the model that it is for; all if it is left out.
        grid: how many strengths are tried; the first of them is none.
        duo: try as many scales that also shrink columns with large weights.
    """

    kind: Literal["awq"] = "awq"
    grid: PositiveInt = 20
    duo: bool = False


class LayerScale(_OfParts):
    """Multiply the factors of LayerScales (DINOv2) into the Linears before them."""

    kind: Literal["layerscale"] = "layerscale"


class Rotation(Section):
    """Turn the float model into another basis, drawn from the recipe's seed, in which no channel stands out.

    Attributes:
        residual: turn the residual stream. A head that shares its weight with the embedding gets one of its own.
        values: turn the values of each attention head.
    """

    kind: Literal["rotation"] = "rotation"
    residual: bool = True
    values: bool = True

    @model_validator(mode="after")
    def _turns_something(self) -> Self:
        if not (self.residual or self.values):
            raise ValueError("turns nothing; leave it out, or set 'residual' or 'values' to true")
        return self


class Rtn(Section):
    """Round each weight to the nearest code.

    Attributes:
        clip: a group's range: all of it, or searched for the least error on weights (``mse``) or outputs (``awq``).
        refit: fit the scales once more when the codes are known, for the least error on outputs.
    """

    kind: Literal["rtn"] = "rtn"
    clip: Literal["minmax", "mse", "awq"] = "minmax"
    refit: bool = False


class _ColumnByColumn(Section):
    """What :class:`Gptq` and :class:`Gptaq` share.

    Attributes:
        clip: as for rtn. The full range is best: columns that make up for others need room.
        refit: as for rtn.
        damp: share of the Hessian's mean diagonal that is added to the diagonal.
        block_size: columns that are corrected together; changes speed, not the result.
        act_order: begin with the columns that see the largest activations.
    """

    kind: str
    clip: Literal["minmax", "mse", "awq"] = "minmax"
    refit: bool = False
    damp: float = Field(default=0.01, gt=0.0, le=1.0)
    block_size: PositiveInt = 128
    act_order: bool = True


class Gptq(_ColumnByColumn):
    """Round column by column and let the columns that are left make up for the error."""

    kind: Literal["gptq"] = "gptq"


class Gptaq(_ColumnByColumn):
    """GPTQ that also makes up for what earlier quantized layers changed in the input; needs ``propagate: quantized``.

    Attributes:
        alpha: share of that change which is made up for; with 0 it is GPTQ.
    """

    kind: Literal["gptaq"] = "gptaq"
    alpha: float = Field(default=1.0, ge=0.0, le=1.0)


#: Of one layer.
Quantizer = Annotated[Rtn | Gptq | Gptaq, Field(discriminator="kind")]


class AutoRound(Section):
    """Learn how the weights of each block are rounded, so that the block's output stays; takes minutes a block.

    Needs blocks that run once a sample, and ``propagate: quantized``.

    Attributes:
        start: the quantizer whose codes it begins with, and never does worse than.
        iterations: steps of signed gradient descent.
        learning_rate: length of the first step; by default 1 / iterations.
        batch: samples a step.
        ranges: whether the range of each group is learnt too.
    """

    kind: Literal["autoround"] = "autoround"
    start: Quantizer = Gptq()
    iterations: PositiveInt = 200
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    batch: PositiveInt = 8
    ranges: bool = True


class TypeWeights(Section):
    """What a token of each type counts for in Hessians and in the losses of searches; padding counts for nothing.

    Attributes:
        image: of a token that an image became.
        text: of a token of the instruction.
        state: of a token that the robot's state became.
        action: of a token that decides an action.
    """

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
    """A token counts for its squared gradient of what the policy decides.

    Attributes:
        power: the gradient's; less than 1 levels it out.
    """

    kind: Literal["gradient"] = "gradient"
    power: float = Field(default=1.0, gt=0.0, le=1.0)


Cameras = Annotated[tuple[Name | None, ...] | None, Field(strict=False, min_length=1)]


class Episodes(Section):
    """Recorded robot episodes: observations, evenly spread over one split of a ``datasets`` folder.

    Attributes:
        path: the folder, with a subfolder of parquet files for each split.
        unnorm_key: dataset whose action statistics apply; can be left out if the checkpoint knows only one.
        split: which subfolder.
        cameras: image columns in the order of the policy's cameras, null for one that is missing; by default ``image``,
            or else all image columns.
        state: column of the state, by default ``state``.
        action: column of the action, by default ``action``.
        samples: how many observations.
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
        path: the dataset's folder.
        unnorm_key: as for episodes.
        cameras: keys in the order of the policy's cameras, null for one that is missing; by default all of the dataset.
        state: key of the state, by default ``observation.state``.
        action: key of the action, by default ``action``.
        chunk: give the actions of so many frames from each one on.
        samples: how many frames.
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
        path: the file; images lie relative to its folder.
        unnorm_key: as for episodes.
        samples: how many lines.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: RecipePath
    unnorm_key: Name | None = None
    samples: PositiveInt = 64
    min_tokens: PositiveInt = 32


class Text(Section):
    """A text file, for language models: windows of it, evenly spread.

    Attributes:
        path: the file.
        samples: how many windows.
        sequence_length: tokens of a window.
        min_tokens: it is an error if a layer sees fewer.
    """

    kind: Literal["text"] = "text"
    path: RecipePath
    samples: PositiveInt = 64
    sequence_length: PositiveInt = 512
    min_tokens: PositiveInt = 32


Transform = Annotated[SmoothQuant | Awq | LayerScale, Field(discriminator="kind")]
#: A rotation changes the whole model before its first stage, all others are done stage by stage.
AnyTransform = Annotated[SmoothQuant | Awq | LayerScale | Rotation, Field(discriminator="kind")]
TokenWeights = Annotated[TypeWeights | GradientWeights, Field(discriminator="kind")]
Calibration = Annotated[Episodes | LeRobot | JsonLines | Text, Field(discriminator="kind")]

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
        bias_correction: let the bias of a layer that has one take what rounding its weight shifts on average.
        propagate: what later layers see of earlier ones while they are calibrated: their quantized or float output.
        token_weights: what tokens count for while layers are calibrated; all the same if it is left out.
        calibration: data; can be left out if nothing needs it or samples come from Python.
        seed: of every random choice, such as which frames are taken.
    """

    family: Annotated[str, AfterValidator(_known_family)] = "auto"
    model: RecipePath | None = None
    output: RecipePath | None = None
    rules: Annotated[tuple[Rule, ...], Field(strict=False), AfterValidator(_some_rules)]
    on_indivisible: OnIndivisible = "error"
    transforms: Annotated[tuple[AnyTransform, ...], Field(strict=False), AfterValidator(_rotation_first)] = ()
    quantizer: Annotated[Quantizer | AutoRound, Field(discriminator="kind")] = Rtn()
    bias_correction: bool = False
    propagate: Literal["quantized", "float"] = "quantized"
    token_weights: TokenWeights | None = None
    calibration: Calibration | None = None
    seed: Annotated[int, Field(ge=0)] = 0

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
        if isinstance(self.quantizer, AutoRound) and self.bias_correction:
            raise ValueError("quantizer autoround learns with biases as they are; remove 'bias_correction'")
        if isinstance(quantizer, Gptaq) and self.propagate == "float":
            raise ValueError(
                "quantizer gptaq makes up for what earlier quantized layers changed, and with 'propagate: float' they "
                "change nothing; use gptq, or 'propagate: quantized'"
            )
        if isinstance(quantizer, Gptaq) and (quantizer.refit or self.bias_correction):
            which = "refit" if quantizer.refit else "bias_correction"
            raise ValueError(f"quantizer gptaq does not go with '{which}'; use gptq, or leave it out")
        return self

    @property
    def layer_quantizer(self) -> Quantizer:
        """The quantizer that makes the first codes of each layer, and the last unless its block is tuned."""
        return self.quantizer.start if isinstance(self.quantizer, AutoRound) else self.quantizer

    def resolved(self) -> dict[str, Any]:
        """Plain values with all defaults written out; ``load_recipe`` turns them back into this recipe."""
        return self.model_dump(mode="json")
