"""All that a page shows, as typed values, read from the files that other commands wrote."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaquant.checkpoint import read_manifest
from vlaquant.evaluate.results import Evaluation as EvaluationResult
from vlaquant.evaluate.results import to_dict
from vlaquant.plan import LayerPlan, Plan, TablePlan, plan_from_dict
from vlaquant.report.evaluated import Benchmark, Evaluation, Pair, read_benchmark, read_evaluation
from vlaquant.report.gates import Gate, read_gates
from vlaquant.report.measured import Measured
from vlaquant.report.reading import figure, load_json, look, mapping, words
from vlaquant.scheme import Scheme

#: Part of all tensors that no rule can be about.
NOT_COVERED = "not covered"


@dataclass(frozen=True, slots=True)
class Layer:
    """One Linear, embedding or bank: what became of it, why, and how well it went.

    Attributes:
        index: its place in the network, from 0.
        kind: ``linear``, ``embedding`` or ``bank``.
        stored: name of its scheme, or ``float``.
        bits: of its weight; None for float.
        loss: squared error of its output over the calibration tokens, as a share of the output's mean square; None
            without data.
        loss_rtn: the same for plain rounding.
        quantizer: what made its codes; None if it stayed float.
        notes: everything out of the ordinary.
        seconds: that its group of layers took; None if there is no log.
    """

    index: int
    name: str
    part: str
    kind: str
    shape: tuple[int, ...]
    stored: str
    bits: int | None
    reason: str
    bytes_before: int
    bytes_after: int
    loss: float | None
    loss_rtn: float | None
    quantizer: str | None
    notes: tuple[str, ...]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Fold:
    """One scale that SmoothQuant, AWQ or another transform tried; ``reverted`` says why it was taken back."""

    kind: str
    source: str
    targets: tuple[str, ...]
    before: float | None
    after: float | None
    kept: bool
    strength: float | None
    reverted: str | None


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of one part of the network, before and after, the latter by bits (None is float)."""

    part: str
    before: int
    after: dict[int | None, int]


@dataclass(frozen=True, slots=True)
class Run:
    """What the log of the run says: wall seconds, the most bytes held at once, and what was noted."""

    seconds: float | None
    peak_memory: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one written directory.

    Attributes:
        name: of the directory.
        family: of the model.
        layers: in the order of the network.
        parts: bytes by part; the last one is what no rule can be about.
        disk: bytes of the weight files; ``before`` is what the plan counted if the source was not a directory.
        planned: the bytes of all weights, as the plan counts them.
        folds: scales that transforms tried.
        recipe: as it was resolved.
        versions: of packages.
        verified: what was compared after writing.
        checksums: file -> SHA-256 of the output.
        source_checksums: file -> SHA-256 of the source.
        gates: what the recipe requires.
        evaluation: of ``vlaquant eval``; None if there is none.
        benchmark: of ``vlaquant bench``; None if there is none.
        measured: what looking into both models gave; None if that was not done.
        run: from the log; None if there is none.
        origin: where the figures come from, if not from one run; shown at the top.
    """

    name: str
    family: str
    layers: tuple[Layer, ...]
    parts: tuple[Bytes, ...]
    disk: Pair
    planned: Pair
    folds: tuple[Fold, ...]
    recipe: dict[str, Any]
    versions: dict[str, str]
    verified: dict[str, Any]
    checksums: dict[str, str]
    source_checksums: dict[str, str]
    gates: tuple[Gate, ...]
    evaluation: Evaluation | None
    benchmark: Benchmark | None
    measured: Measured | None
    run: Run | None
    origin: str | None = None

    @property
    def quantized(self) -> tuple[Layer, ...]:
        """The layers that are not float any more."""
        return tuple(layer for layer in self.layers if layer.bits is not None)

    @property
    def worst(self) -> tuple[Layer, ...]:
        """The layers with data, the largest error first."""
        known = [layer for layer in self.layers if layer.loss is not None]
        return tuple(sorted(known, key=lambda layer: -(layer.loss or 0.0)))

    @property
    def mean_loss(self) -> float | None:
        """Mean error of the layers with data."""
        losses = [layer.loss for layer in self.layers if layer.loss is not None]
        return sum(losses) / len(losses) if losses else None

    @property
    def speed(self) -> Pair | None:
        """Median milliseconds of one action (or window of text): of the benchmark if there is one."""
        benchmarked = None if self.benchmark is None else self.benchmark.action
        return benchmarked or (None if self.evaluation is None else self.evaluation.latency)


def read_report(
    output: str | Path,
    *,
    evaluation: str | Path | EvaluationResult | None = None,
    benchmark: str | Path | None = None,
    measured: Measured | None = None,
) -> Report:
    """What there is to say about a directory that vlaquant wrote.

    Args:
        output: the directory; its log is beside it, if there is one.
        evaluation: the JSON of ``vlaquant eval``, or what :func:`~vlaquant.evaluate.evaluation.evaluate_policy` gave.
        benchmark: the JSON of ``vlaquant bench``.
        measured: the result of :func:`~vlaquant.report.measuring.measure`.

    Raises:
        CheckpointError: not a directory that vlaquant finished.
        EvaluationError: a JSON file that cannot be read.
    """
    output = Path(output)
    return make_report(
        output.name,
        read_manifest(output),
        evaluation=None if evaluation is None else _evaluation(evaluation),
        benchmark=None if benchmark is None else read_benchmark(load_json(Path(benchmark))),
        measured=measured,
        log=_lines(output.with_name(f"{output.name}.log.jsonl")),
    )


def _evaluation(result: str | Path | EvaluationResult) -> Evaluation:
    if not isinstance(result, str | Path):
        return read_evaluation(to_dict(result), folder=Path())
    path = Path(result)
    return read_evaluation(load_json(path), str(path), path.parent)


def make_report(
    name: str,
    manifest: Mapping[str, Any],
    *,
    evaluation: Evaluation | None = None,
    benchmark: Benchmark | None = None,
    measured: Measured | None = None,
    log: list[dict[str, Any]] | None = None,
    origin: str | None = None,
) -> Report:
    """A report from a manifest and what goes with it."""
    plan = plan_from_dict(manifest["plan"])
    size, planned = mapping(manifest, "bytes_on_disk"), Pair(plan.bytes_before, plan.bytes_after)
    return Report(
        name=name,
        family=plan.family,
        layers=_layers(plan, manifest, log or []),
        parts=bytes_of(plan),
        disk=Pair(
            figure(size, "source_weights") or planned.before,
            figure(size, "weights") or planned.after,
        ),
        planned=planned,
        folds=tuple(_fold(record) for record in manifest.get("transforms") or ()),
        recipe=mapping(manifest, "recipe"),
        versions={key: str(value) for key, value in mapping(manifest, "versions").items()},
        verified=mapping(manifest, "verification"),
        checksums={key: str(value) for key, value in mapping(manifest, "output_sha256").items()},
        source_checksums={key: str(value) for key, value in mapping(manifest, "source_sha256").items()},
        gates=read_gates(manifest, evaluation),
        evaluation=evaluation,
        benchmark=benchmark,
        measured=measured,
        run=_run(log) if log else None,
        origin=origin,
    )


def _layers(plan: Plan, manifest: Mapping[str, Any], log: list[dict[str, Any]]) -> tuple[Layer, ...]:
    records = {record["name"]: record for record in manifest.get("layers") or ()}
    seconds = {line.get("name"): figure(line, "seconds") for line in log if line.get("event") == "layer"}
    layers = []
    for index, one in enumerate(plan.covered):
        record = records.get(one.name, {})
        layers.append(
            Layer(
                index=index,
                name=one.name,
                part=one.part,
                kind=one.kind if isinstance(one, TablePlan) else "linear",
                shape=one.shape,
                stored=one.stored if isinstance(one, TablePlan) else _scheme_name(one.scheme),
                bits=_bits(one),
                reason=one.reason,
                bytes_before=one.bytes_before,
                bytes_after=one.bytes_after,
                loss=figure(record, "loss"),
                loss_rtn=figure(record, "loss_rtn"),
                quantizer=words(record, "quantizer"),
                notes=tuple(record.get("notes") or ()),
                seconds=seconds.get(one.name),
            )
        )
    return tuple(layers)


def _scheme_name(scheme: Scheme | None) -> str:
    return "float" if scheme is None else scheme.name


def _bits(one: LayerPlan | TablePlan) -> int | None:
    return None if one.scheme is None else one.scheme.weight.bits


def bytes_of(plan: Plan) -> tuple[Bytes, ...]:
    """Bytes by part before and after; the last one is what no rule can be about."""
    before: dict[str, int] = {}
    after: dict[str, dict[int | None, int]] = {}
    for one in plan.covered:
        before[one.part] = before.get(one.part, 0) + one.bytes_before
        stored = after.setdefault(one.part, {})
        stored[_bits(one)] = stored.get(_bits(one), 0) + one.bytes_after
    rest = sum(other.bytes for other in plan.others)
    if rest:
        before[NOT_COVERED], after[NOT_COVERED] = rest, {None: rest}
    return tuple(Bytes(part, before[part], after[part]) for part in before)


def _fold(record: Mapping[str, Any]) -> Fold:
    return Fold(
        kind=words(record, "kind") or "unknown",
        source=words(record, "source") or "",
        targets=tuple(look(record, "targets") or ()),
        before=figure(record, "loss_before"),
        after=figure(record, "loss_after"),
        kept=bool(look(record, "kept")),
        strength=figure(record, "strength"),
        reverted=words(record, "reverted"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log of JSON lines; none without a file, and not a last line that was cut off."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            one = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(one, dict):
            found.append(one)
    return found


def _run(log: list[dict[str, Any]]) -> Run:
    stages = [line for line in log if line.get("event") == "stage"]
    peaks = [peak for peak in (figure(line, "peak_memory") for line in stages) if peak is not None]
    taken = [seconds for seconds in (figure(line, "seconds") for line in stages) if seconds is not None]
    notes = [words(line, "text") or "" for line in log if line.get("event") == "note"]
    return Run(sum(taken) if taken else None, int(max(peaks)) if peaks else None, tuple(notes))
