"""What looking into both models gives, as typed values and as one JSON file, so that a page needs no model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from vlaquant.errors import EvaluationError
from vlaquant.report.reading import load_json

#: Raised when a field changes its meaning; other versions are refused.
VERSION = 1
#: Significant digits in the file: more than a drawing can show.
_DIGITS = 5
#: A weight whose error is beyond both is damaged: a share of its square, and a multiple of the median layer's.
_DAMAGE, _FAR = 0.25, 8.0


@dataclass(frozen=True, slots=True)
class WeightHistogram:
    """The weights of a layer, in steps of the grid that they were rounded to.

    Attributes:
        name: of the layer.
        scheme: its name.
        low: smallest code.
        high: largest code.
        per_step: bins of ``weights`` for each step.
        weights: share of the float weights, by bin, from ``low`` - 1 to ``high`` + 1; what lies beyond is in the first
            and last. A weight w is at w / S + Z, with the scale and zero point of its own group. Scales that a
            transform moved in are contained. Empty if a transform mixed the weights, as a rotation does.
        codes: share of the weights that have each code, from ``low`` to ``high``.
        clipped: share of the float weights beyond the grid by more than half a step.
        error: squared error of the weights as a share of their square; None if ``weights`` is empty.
    """

    name: str
    scheme: str
    low: int
    high: int
    per_step: int
    weights: tuple[float, ...]
    codes: tuple[float, ...]
    clipped: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Outliers:
    """What each layer's input channels reach, against the average channel of the layer.

    The float model and the quantized one saw the same observations. Neighbouring channels are put together.

    Attributes:
        layers: names, in the order of the network.
        observations: how many the models saw.
        before: for each layer, the largest |x| in each set of channels, over the mean of that of all its channels;
            of the float model.
        after: the same of the quantized model, whose transforms moved scales between layers.
        channels: channels of each layer.
        worst_before: for each layer, the channel with the largest |x| in the float model.
    """

    layers: tuple[str, ...]
    observations: int
    before: tuple[tuple[float, ...], ...]
    after: tuple[tuple[float, ...], ...]
    channels: tuple[int, ...]
    worst_before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """The first action of each answer along one recorded episode, [step][dimension], in the robot's units.

    Both policies were shown the recorded images. ``recorded`` is what the demonstrator did; empty if nobody said.
    """

    task: str
    episode: int
    instruction: str
    original: tuple[tuple[float, ...], ...]
    quantized: tuple[tuple[float, ...], ...]
    recorded: tuple[tuple[float, ...], ...]
    of_episodes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """All of it; what was not measured is empty or None.

    Attributes:
        weights: histograms of the layers with the largest errors.
        weight_errors: of every packed Linear, the squared error of its weights as a share of their square. Without
            those whose weights a transform mixed.
        outliers: of activations.
        trace: of the episode in which the actions differ most.
    """

    weights: tuple[WeightHistogram, ...] = ()
    weight_errors: tuple[tuple[str, float], ...] = ()
    outliers: Outliers | None = None
    trace: Trace | None = None

    @property
    def damaged(self) -> tuple[tuple[str, float], ...]:
        """Layers whose codes do not stand for the float weights: a quarter is lost, and far more than elsewhere."""
        errors = [error for _, error in self.weight_errors]
        limit = max(_DAMAGE, _FAR * median(errors)) if errors else 0.0
        found = [(name, error) for name, error in self.weight_errors if error > limit]
        return tuple(sorted(found, key=lambda one: -one[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to five digits."""
        return {"kind": "report", "version": VERSION, **_plain(asdict(self))}

    def write(self, path: Path) -> None:
        """Write the JSON file that :meth:`read` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Inverse of :meth:`write`; what else is in the file is left alone.

        Raises:
            EvaluationError: another file, or one of another version.
        """
        data = load_json(path)
        if data.get("kind") != "report" or data.get("version") != VERSION:
            raise EvaluationError(
                f"{path}: is no measurement for a report of version {VERSION}; measure again with vlaquant report"
            )
        try:
            return cls(
                tuple(WeightHistogram(**_tuples(one)) for one in data["weights"]),
                _tupled(data["weight_errors"]),
                None if data["outliers"] is None else Outliers(**_tuples(data["outliers"])),
                None if data["trace"] is None else Trace(**_tuples(data["trace"])),
            )
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{path}: lacks or has a field that a report has not: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _tupled(value) for key, value in data.items()}


def _tupled(value: Any) -> Any:
    return tuple(_tupled(one) for one in value) if isinstance(value, list) else value
