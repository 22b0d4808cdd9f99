"""The result of ``vlaquant eval``: types, which are also the schema of its JSON."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.figures import Compared, Figure

#: Raised when a field changes its meaning; other versions are refused.
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class ActionErrors:
    """Candidate against reference, over some steps of each chunk; means over dimensions, and each dimension."""

    l1: Figure
    mse: Figure
    l1_by_dimension: tuple[Figure, ...]
    mse_by_dimension: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class ActionFigures:
    """What :mod:`vlaquant.evaluate.action_figures` computes from the answers of both policies."""

    observations: int
    episodes: int
    chunk: int
    dimensions: int
    whole_chunk: ActionErrors
    first_step: ActionErrors
    token_agreement: Figure | None
    bin_distance: Figure | None
    gripper_flips: Figure
    demonstration: Compared
    boundary_jump: Compared | None
    jerk: Compared | None


@dataclass(frozen=True, slots=True)
class Inside:
    """What :mod:`vlaquant.evaluate.hidden` and :mod:`vlaquant.evaluate.sight` find.

    Attributes:
        sqnr: part -> signal to noise at its end, in the order in which an action runs through the parts.
        velocity: relative error of the velocity in each denoising step; None for policies that do not denoise.
        image_sensitivity: how far an action moves when all images turn black; None where that cannot be asked.
    """

    sqnr: dict[str, Figure]
    velocity: tuple[Figure, ...] | None
    image_sensitivity: Compared | None


@dataclass(frozen=True, slots=True)
class LanguageFigures:
    """Candidate against reference on the same windows of text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token.
        divergence: mean Kullback-Leibler divergence of the candidate from the reference.
        top1_agreement: share of positions with the same most likely token.
        tokens: that were predicted.
    """

    perplexity: Compared
    divergence: Figure
    top1_agreement: Figure
    tokens: int


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the time that something takes in one action; ``calls`` is how often an action runs through it."""

    p50: Compared
    p95: Compared
    p99: Compared
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a fresh process that loads one model and takes one action, see :mod:`vlaquant.evaluate.memory`."""

    tensors: Compared
    resident: Compared | None
    peak: Compared
    before_loading: Compared | None


@dataclass(frozen=True, slots=True)
class PolicyRate:
    """Actions that a policy supplies a second, if it is asked again when its chunk is used up.

    Attributes:
        chunk: actions of one answer, all of which are executed.
        median: chunk / median latency.
        slowest: chunk / 99th percentile of the latency.
        needed: what the robot executes a second; None if nobody said.
    """

    chunk: int
    median: Compared
    slowest: Compared
    needed: Figure | None


@dataclass(frozen=True, slots=True)
class System:
    """What the models cost on this machine.

    Attributes:
        disk: weight files.
        memory: None if it was not measured.
        latency: one action, or one window of text.
        parts: the same by part; empty for language models.
        rate: None for language models.
        threads: of torch.
        cpu: its name.
        versions: of packages.
    """

    disk: Compared
    memory: Memory | None
    latency: Percentiles
    parts: dict[str, Percentiles]
    rate: PolicyRate | None
    threads: int
    cpu: str
    versions: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one episode of one policy ended; ``video`` is a file in the folder of videos."""

    success: bool
    steps: int
    video: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Both policies in one episode, from the same start."""

    task: str
    seed: int
    reference: Outcome
    candidate: Outcome

    @property
    def differs(self) -> bool:
        """Whether one of them alone succeeded."""
        return self.reference.success is not self.candidate.success


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Closed-loop episodes.

    Attributes:
        environment: as ``--env`` names it.
        max_steps: after which an episode has failed.
        success: rates over all tasks, with Wilson intervals; that of the difference is of the pairs.
        tasks: the same by task.
        only_reference: episodes that the float policy alone solved.
        only_candidate: episodes that the quantized policy alone solved.
        p_value: of McNemar's exact test; its count is of the pairs that differ.
        episodes: every one.
        videos: folder of the videos, as seen from the folder of this JSON; None if there are none.
    """

    environment: str
    max_steps: int
    success: Compared
    tasks: dict[str, Compared]
    only_reference: int
    only_candidate: int
    p_value: Figure
    episodes: tuple[Pair, ...]
    videos: str | None = None


_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEvaluation:
    """A quantized policy against its float original.

    Attributes:
        model: name of the quantized directory.
        reference: name of the float one.
        actions: on recorded observations.
        inside: between the parts of the network, on some of the same observations.
        system: size, memory and time.
        rollouts: closed-loop episodes; None if there are none.
        skipped: why there are none, if they were asked for.
        notes: what could not be measured, and why.
        kind: tells it from an evaluation of a language model.
        version: of this schema.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: str
    reference: str
    actions: ActionFigures
    inside: Inside
    system: System
    rollouts: Rollouts | None = None
    skipped: str | None = None
    notes: tuple[str, ...] = ()
    kind: Literal["policy"] = "policy"
    version: Literal[1] = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageEvaluation:
    """A quantized language model against its float original; fields as in :class:`PolicyEvaluation`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: str
    reference: str
    language: LanguageFigures
    system: System
    notes: tuple[str, ...] = field(default=())
    kind: Literal["language"] = "language"
    version: Literal[1] = VERSION


Evaluation = PolicyEvaluation | LanguageEvaluation
_ADAPTER: TypeAdapter[Evaluation] = TypeAdapter(Annotated[Evaluation, Field(discriminator="kind")])


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of what :func:`to_dict` gives."""
    found = _ADAPTER.json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "vlaquant eval", **found}


def to_dict(result: Evaluation) -> dict[str, Any]:
    """Plain values for JSON; infinity and NaN are text."""
    plain: dict[str, Any] = json.loads(_ADAPTER.dump_json(result))
    return plain


def plain(figures: ActionFigures | LanguageFigures | Compared | Rollouts) -> dict[str, Any]:
    """A part of a result as plain values for JSON."""
    found: dict[str, Any] = json.loads(TypeAdapter(type(figures)).dump_json(figures))
    return found


def from_dict(data: Any, where: str) -> Evaluation:
    """Inverse of :func:`to_dict`.

    Raises:
        EvaluationError: something else, or of another version; ``where`` is in the message.
    """
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise EvaluationError(
            f"{where}: is no result of vlaquant eval of version {VERSION} ({place}: {first['msg']}); run vlaquant eval "
            "again"
        ) from error


def read(path: Path) -> Evaluation:
    """The result in a file that ``vlaquant eval --json`` wrote.

    Raises:
        EvaluationError: no such file, or something else in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as JSON: {error}") from error
    return from_dict(data, str(path))
