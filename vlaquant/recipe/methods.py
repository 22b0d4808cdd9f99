"""How weights are prepared and turned into codes: transforms, quantizers, and what tokens count for."""

from typing import Annotated, Literal, Self

from pydantic import Field, PlainValidator, PositiveInt, model_validator

from vlaquant.recipe.base import Name, Section
from vlaquant.recipe.words import shown


def _alpha(value: object) -> float | str:
    if value == "search":
        return "search"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number from 0 to 1, or 'search', got {shown(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"must be from 0 to 1, or 'search', got {shown(value)}")
    return float(value)


Alpha = Annotated[float | Literal["search"], PlainValidator(_alpha)]


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
    """

    kind: Literal["awq"] = "awq"
    grid: PositiveInt = 20


class LayerScale(_OfParts):
    """Multiply the factors of LayerScales (DINOv2) into the Linears before them.

    Attributes:
        parts: of the model that it is for; all if it is left out.
    """

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
        clip: as for rtn. ``mse`` helps at 4 bits with one scale a row; in groups at 2 and 3 bits the full range does
            better, as columns that make up for others need room.
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
        alpha: share of that change which is made up for; with 0 it is GPTQ. More of it fits the calibration data
            better, and other data not always.
    """

    kind: Literal["gptaq"] = "gptaq"
    alpha: float = Field(default=0.25, ge=0.0, le=1.0)


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
        dtype: of the products in gradients; bfloat16 takes about half the time where the processor multiplies it.
    """

    kind: Literal["autoround"] = "autoround"
    start: Quantizer = Gptq()
    iterations: PositiveInt = 200
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    batch: PositiveInt = 8
    ranges: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"


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


Transform = Annotated[SmoothQuant | Awq | LayerScale, Field(discriminator="kind")]
#: A rotation changes the whole model before its first stage, all others are done stage by stage.
AnyTransform = Annotated[SmoothQuant | Awq | LayerScale | Rotation, Field(discriminator="kind")]
TokenWeights = Annotated[TypeWeights | GradientWeights, Field(discriminator="kind")]
