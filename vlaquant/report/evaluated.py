"""The JSON of ``vlaquant eval`` and ``vlaquant bench`` as typed values. A field that is missing is None, never zero."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlaquant.report.reading import figure, figures, look, mapping, words

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
        overall: their sum; None if the episodes were skipped.
        paired: the paired test; None if it was not made.
        skipped: why there are no episodes.
    """

    tasks: tuple[Task, ...]
    overall: Task | None
    paired: Paired | None
    skipped: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``vlaquant eval`` found; everything but ``kind`` may be missing.

    Attributes:
        kind: ``policy`` or ``language``.
        observations: recorded observations, or tokens of text.
        l1: mean absolute difference of actions, by dimension, in the robot's units.
        mse: mean squared difference, by dimension.
        mean_l1: mean of ``l1``.
        token_agreement: share of equal action tokens, or of equal most likely words.
        bin_distance: mean distance of action tokens, in bins.
        gripper_flips: share of actions whose last number changes sign.
        l1_to_demonstration: mean distance of both to what the demonstrator did.
        perplexity: of a language model.
        divergence: of its words, nats a token.
        latency: median milliseconds of one action, or of one window of text.
        slowest: the 99th percentile.
        resident: bytes of tensors in memory.
        threads: of the latency.
        success: closed-loop episodes.
    """

    kind: str
    observations: int | None
    l1: tuple[float, ...]
    mse: tuple[float, ...]
    mean_l1: float | None
    token_agreement: float | None
    bin_distance: float | None
    gripper_flips: float | None
    l1_to_demonstration: Pair | None
    perplexity: Pair | None
    divergence: float | None
    latency: Pair | None
    slowest: Pair | None
    resident: Pair | None
    threads: int | None
    success: Success | None


def pair(before: float | None, after: float | None) -> Pair | None:
    """Both figures, or nothing."""
    return None if before is None or after is None else Pair(before, after)


def read_evaluation(data: Mapping[str, Any]) -> Evaluation:
    """The result of ``vlaquant eval --json``."""
    kind = words(data, "kind") or ("language" if "language" in data else "policy")
    found = mapping(data, "actions" if kind == "policy" else "language")
    latency, l1 = mapping(data, "latency"), figures(found, "l1")
    mean_l1 = figure(found, "mean_l1")
    agreement = figure(found, "token_agreement")
    return Evaluation(
        kind=kind,
        observations=_count(figure(found, "observations" if kind == "policy" else "tokens")),
        l1=l1,
        mse=figures(found, "mse"),
        mean_l1=sum(l1) / len(l1) if mean_l1 is None and l1 else mean_l1,
        token_agreement=figure(found, "top1_agreement") if agreement is None else agreement,
        bin_distance=figure(found, "bin_distance"),
        gripper_flips=figure(found, "gripper_flips"),
        l1_to_demonstration=pair(figure(found, "reference_l1_to_demonstration"), figure(found, "l1_to_demonstration")),
        perplexity=pair(figure(found, "reference_perplexity"), figure(found, "perplexity")),
        divergence=figure(found, "divergence"),
        latency=pair(figure(latency, "reference", "p50_ms"), figure(latency, "candidate", "p50_ms")),
        slowest=pair(figure(latency, "reference", "p99_ms"), figure(latency, "candidate", "p99_ms")),
        resident=pair(figure(data, "bytes", "reference_resident"), figure(data, "bytes", "resident")),
        threads=_count(figure(data, "threads")),
        success=_success(mapping(data, "rollouts")),
    )


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)


def _success(data: Mapping[str, Any]) -> Success | None:
    if not data:
        return None
    tasks = []
    for name, before in mapping(data, "reference").items():
        rates = _rate(before), _rate(look(data, "candidate", name))
        if rates[0] is not None and rates[1] is not None:
            tasks.append(Task(name, rates[0], rates[1]))
    test = mapping(data, "paired")
    names = ("only_reference", "only_candidate", "difference", "low", "high", "p_value")
    values = [figure(test, name) for name in names]
    lost, won, *rest = [value for value in values if value is not None] if None not in values else [0.0, 0.0]
    return Success(
        tuple(task for task in tasks if task.name != ALL_TASKS),
        next((task for task in tasks if task.name == ALL_TASKS), None),
        Paired(int(lost), int(won), *rest) if rest else None,
        words(data, "skipped"),
    )


def _rate(data: object) -> Rate | None:
    found = [figure(data, name) for name in ("rate", "low", "high", "successes", "episodes")]
    numbers = [value for value in found if value is not None]
    if len(numbers) < len(found):
        return None
    rate, low, high, successes, episodes = numbers
    return Rate(rate, low, high, int(successes), int(episodes))


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
