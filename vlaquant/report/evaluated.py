"""The JSON of ``vlaquant eval`` and ``vlaquant bench`` as typed values. A field that is missing is None, never zero."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaquant.evaluate.figures import Compared, Figure
from vlaquant.evaluate.results import LanguageEvaluation, PolicyEvaluation, Rollouts, from_dict
from vlaquant.report.films import Film, find_films
from vlaquant.report.reading import figure, mapping, words

#: The name under which a rollout result sums up its tasks.
ALL_TASKS = "all"


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of the float model and of the quantized one, in the same unit."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times smaller it became."""
        return self.before / self.after if self.after else float("inf")


@dataclass(frozen=True, slots=True)
class Rate:
    """A success rate in [0, 1] with its 95 % interval."""

    rate: float
    low: float
    high: float
    successes: int
    episodes: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % of {self.episodes} [{100 * self.low:.0f}, {100 * self.high:.0f}]"


@dataclass(frozen=True, slots=True)
class Task:
    """One task's success before and after."""

    name: str
    before: Rate
    after: Rate


@dataclass(frozen=True, slots=True)
class Paired:
    """Both policies in the same episodes: who failed where the other did not, and McNemar's exact p-value."""

    only_float: int
    only_quantized: int
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Success:
    """Closed-loop episodes.

    Attributes:
        tasks: in the order in which they were measured, without the sum.
        overall: their sum.
        paired: the paired test.
    """

    tasks: tuple[Task, ...]
    overall: Task
    paired: Paired


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``vlaquant eval`` found, as far as a page draws it.

    Attributes:
        result: all of it.
        success: closed-loop episodes; None if there are none.
        films: of episodes that ended differently, as far as their videos were found.
    """

    result: PolicyEvaluation | LanguageEvaluation
    success: Success | None
    films: tuple[Film, ...]

    @property
    def policy(self) -> PolicyEvaluation | None:
        """The result, if it is of policies."""
        return self.result if isinstance(self.result, PolicyEvaluation) else None

    @property
    def skipped(self) -> str | None:
        """Why there are no closed-loop episodes, if they were asked for."""
        return None if self.policy is None else self.policy.skipped

    @property
    def mean_l1(self) -> float | None:
        """Mean absolute difference of actions."""
        return None if self.policy is None else self.policy.actions.whole_chunk.l1.value

    @property
    def bin_distance(self) -> float | None:
        """Mean distance of action tokens, in bins."""
        found = None if self.policy is None else self.policy.actions.bin_distance
        return None if found is None else found.value

    @property
    def agreement(self) -> float | None:
        """Share of equal action tokens, or of equal most likely words."""
        if isinstance(self.result, LanguageEvaluation):
            return self.result.language.top1_agreement.value
        found = self.result.actions.token_agreement
        return None if found is None else found.value

    @property
    def perplexity(self) -> Pair | None:
        """Of language models."""
        return pair_of(self.result.language.perplexity) if isinstance(self.result, LanguageEvaluation) else None

    @property
    def divergence(self) -> float | None:
        """Of language models, nats a token."""
        return self.result.language.divergence.value if isinstance(self.result, LanguageEvaluation) else None

    @property
    def latency(self) -> Pair:
        """Median milliseconds of one action, or of one window of text."""
        return pair_of(self.result.system.latency.p50)


def pair_of(of: Compared) -> Pair:
    """Both values."""
    return Pair(of.reference.value, of.candidate.value)


def read_evaluation(data: object, where: str = "the evaluation", folder: Path | None = None) -> Evaluation:
    """The result of ``vlaquant eval --json``.

    Args:
        data: what is in the file.
        where: its name, for errors.
        folder: that it lies in; videos are looked for from there.

    Raises:
        EvaluationError: something else, or of another version of vlaquant.
    """
    result = from_dict(data, where)
    rollouts = result.rollouts if isinstance(result, PolicyEvaluation) else None
    if rollouts is None:
        return Evaluation(result, None, ())
    films = () if folder is None else find_films(rollouts, folder)
    return Evaluation(result, _success(rollouts), films)


def _success(found: Rollouts) -> Success:
    tasks = tuple(_task(name, of) for name, of in found.tasks.items())
    apart = found.success.difference
    assert apart.low is not None
    assert apart.high is not None
    paired = Paired(found.only_reference, found.only_candidate, apart.value, apart.low, apart.high, found.p_value.value)
    return Success(tasks, _task(ALL_TASKS, found.success), paired)


def _task(name: str, of: Compared) -> Task:
    return Task(name, _rate(of.reference), _rate(of.candidate))


def _rate(of: Figure) -> Rate:
    assert of.low is not None
    assert of.high is not None
    return Rate(of.value, of.low, of.high, round(of.value * of.count), of.count)


@dataclass(frozen=True, slots=True)
class Version:
    """One policy in one dtype, as ``vlaquant bench DIR`` timed it: medians in milliseconds.

    Attributes:
        name: such as ``model stored`` or ``reference float32``.
        median: of the whole action.
        p95: 95th percentile of the whole action.
        parts: part -> median.
        calls: part -> how often an action runs through it.
        resident: bytes of tensors in memory.
    """

    name: str
    median: float
    p95: float | None
    parts: dict[str, float]
    calls: dict[str, float]
    resident: int | None

    @property
    def quantized(self) -> bool:
        """Whether it is the quantized policy."""
        return not self.name.startswith("reference")

    @property
    def label(self) -> str:
        """``quantized (stored)``, ``float (float32)``: the name as a reader of a page says it."""
        dtype = self.name.partition(" ")[2]
        return ("quantized" if self.quantized else "float") + (f" ({dtype})" if dtype else "")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What ``vlaquant bench DIR --json`` found."""

    machine: str
    settings: str
    versions: tuple[Version, ...]

    @property
    def action(self) -> Pair | None:
        """The whole action: of the fastest float version, and of the fastest quantized one."""
        medians = {kind: [v.median for v in self.versions if v.quantized is kind] for kind in (False, True)}
        return pair(*(min(medians[kind], default=None) for kind in (False, True)))


def pair(before: float | None, after: float | None) -> Pair | None:
    """Both figures, or nothing."""
    return None if before is None or after is None else Pair(before, after)


def read_benchmark(data: Mapping[str, Any]) -> Benchmark:
    """The result of ``vlaquant bench DIR --json``."""
    versions = []
    for name, found in mapping(data, "versions").items():
        median = figure(found, "median_ms")
        if median is None:
            continue
        # A part's time for one token is contained in the time of that part
        parts = {part: one for part, one in mapping(found, "parts").items() if not part.endswith("per token")}
        resident = figure(found, "resident_bytes")
        versions.append(
            Version(
                name,
                median,
                figure(found, "p95_ms"),
                {part: figure(one, "median_ms") or 0.0 for part, one in parts.items()},
                {part: figure(one, "calls") or 0.0 for part, one in parts.items()},
                None if resident is None else int(resident),
            )
        )
    settings = mapping(data, "settings")
    counts = {name: settings[f"{name}s"] for name in ("thread", "round") if f"{name}s" in settings}
    told = [f"{count} {name}" + ("" if count == 1 else "s") for name, count in counts.items()]
    if "clock" in settings:
        told.append(f"{settings['clock']} time")
    return Benchmark(
        words(data, "machine", "cpu") or "unknown machine",
        ", ".join([*told, *(str(settings[name]) for name in ("device",) if name in settings)]),
        tuple(versions),
    )
