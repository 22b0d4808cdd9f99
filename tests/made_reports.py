"""Reports without a model: manifests of any number of layers, and results of every command that a page reads."""

from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image

from vlaquant.evaluate.figures import Compared, Figure, compared, counted
from vlaquant.evaluate.latency import policy_rate
from vlaquant.evaluate.results import (
    ActionErrors,
    ActionFigures,
    Inside,
    LanguageEvaluation,
    LanguageFigures,
    Memory,
    Outcome,
    Pair,
    Percentiles,
    PolicyEvaluation,
    Rollouts,
    System,
    to_dict,
)
from vlaquant.evaluate.rollouts import paired
from vlaquant.plan import LayerPlan, OtherTensor, Plan
from vlaquant.report.data import Report, make_report
from vlaquant.report.evaluated import read_benchmark, read_evaluation
from vlaquant.report.films import Film, address
from vlaquant.report.measured import Measured, Outliers, Trace, WeightHistogram
from vlaquant.scheme import get_scheme

PARTS = ("vision", "projector", "language", "action")


def manifest(count: int = 8, names: dict[int, str] | None = None, **changes: Any) -> dict[str, Any]:
    """Of ``count`` layers; the last one stays float, and the others have errors from 1e-4 up, in a shuffled order."""
    scheme = get_scheme("w4a16")
    layers = tuple(
        LayerPlan(
            name=(names or {}).get(i, f"model.layers.{i}.proj"),
            part=PARTS[min(i * len(PARTS) // count, 3)],
            shape=(64 + i, 128),
            scheme=None if i == count - 1 else scheme,
            reason="rule 'action'" if i == count - 1 else f"rule '{PARTS[min(i * len(PARTS) // count, 3)]}'",
            dead=False,
            bytes_before=2 * (64 + i) * 128,
            bytes_after=(64 + i) * 66 if i < count - 1 else 2 * (64 + i) * 128,
        )
        for i in range(count)
    )
    plan = Plan("openvla", layers, (OtherTensor("embed.weight", "Embedding", 4096, 2048),))
    ranks = np.random.default_rng(0).permutation(count - 1)
    records = [
        {
            "name": layer.name,
            "scheme": "w4a16_g128",
            "quantizer": "gptq minmax",
            "loss": 1.23e-4 * (1 + int(rank)),
            "loss_rtn": 4.56e-4 * (1 + int(rank)),
            "notes": ["damping raised to 0.1"] if rank == 0 else [],
        }
        for layer, rank in zip(layers, ranks, strict=False)
    ]
    fold = {"kind": "awq", "source": "model.norm", "targets": [layers[0].name], "kept": True, "strength": 0.45}
    return {
        "recipe": {"family": "openvla", "transforms": [{"kind": "awq"}], "quantizer": {"kind": "gptq"}, "output": None},
        "plan": plan.to_dict(),
        "transforms": [fold | {"loss_before": 0.002, "loss_after": 0.001, "reverted": None}],
        "layers": records,
        "versions": {"vlaquant": "0.1.0", "torch": "2.13.0"},
        "output_sha256": {"model.safetensors": "ab" * 32},
        "source_sha256": {"model.safetensors": "cd" * 32},
        "verification": {"tensors": 264, "output": "equal bit for bit"},
        "bytes_on_disk": {"weights": 3_055_144, "source_weights": 9_104_744},
        "complete": True,
    } | changes


def both(before: float, after: float, unit: str, count: int, of: str = "observations") -> Compared:
    """Without intervals."""
    return compared(counted(before, unit, count, of), counted(after, unit, count, of))


def rates(before: int, after: int, episodes: int) -> Compared:
    """Of so many successes."""
    outcomes = [[Outcome(i < solved, 50) for i in range(episodes)] for solved in (before, after)]
    return paired([Pair("any", i, *one) for i, one in enumerate(zip(*outcomes, strict=True))])


def evaluated() -> PolicyEvaluation:
    """As ``vlaquant eval --rollouts`` finds it."""

    def figure(value: float, unit: str = "action") -> Figure:
        return counted(value, unit, 347, "observations", (0.9 * value, 1.1 * value))

    l1, mse = (0.004786, 0.005831, 0.005798, 0.0), (0.000574, 0.001766, 0.003989, 0.0)
    errors = [
        ActionErrors(
            figure(scale * 0.004104),
            figure(scale * 0.00158, "action²"),
            tuple(figure(scale * one) for one in l1),
            tuple(figure(scale * one, "action²") for one in mse),
        )
        for scale in (1.0, 0.5)
    ]
    time = Percentiles(both(12.6375, 16.4975, "ms", 347), both(15, 18, "ms", 347), both(21, 28, "ms", 347))
    return PolicyEvaluation(
        model="out",
        reference="demo_policy",
        actions=ActionFigures(
            observations=347,
            episodes=10,
            chunk=4,
            dimensions=4,
            whole_chunk=errors[0],
            first_step=errors[1],
            token_agreement=figure(0.8966, "share"),
            bin_distance=figure(0.5868, "bins"),
            gripper_flips=figure(0.0123, "share"),
            demonstration=both(0.04603, 0.04672, "action", 347),
            boundary_jump=both(0.0321, 0.0333, "action", 337, "chunk boundaries"),
            jerk=both(0.0456, 0.0467, "action", 1300, "actions"),
        ),
        inside=Inside(
            sqnr={"vision": figure(31.4, "dB"), "language": figure(27.2, "dB")},
            velocity=None,
            image_sensitivity=both(0.123, 0.121, "action", 347),
        ),
        system=System(
            disk=both(9_104_744, 3_055_144, "bytes", 1, "files"),
            memory=Memory(
                both(9_086_976, 5_124_992, "bytes", 1), None, both(490_000_000, 480_000_000, "bytes", 1), None
            ),
            latency=time,
            parts={"vision": time},
            rate=policy_rate(4, time, None),
            threads=1,
            cpu="some CPU",
            versions={"vlaquant": "0.1.0"},
        ),
        rollouts=driven(),
    )


def driven() -> Rollouts:
    """60 episodes; the quantized policy loses four."""
    return Rollouts(
        environment="metaworld",
        max_steps=200,
        success=rates(58, 54, 60),
        tasks={"open": rates(30, 29, 30), "close": rates(28, 25, 30)},
        only_reference=4,
        only_candidate=0,
        p_value=Figure(0.125, "p", 4, "pairs that differ"),
        episodes=(
            *(Pair("open", 91_000 + i, Outcome(i >= 0, 60), Outcome(i > 0, 60)) for i in range(30)),
            *(Pair("close", 91_000 + i, Outcome(i > 1, 60), Outcome(i > 4, 60)) for i in range(30)),
        ),
    )


def evaluation(**changes: Any) -> dict[str, Any]:
    """The same, as ``vlaquant eval --json`` writes it."""
    return to_dict(replace(evaluated(), **changes))


def film() -> Film:
    """Of the episode that the quantized policy lost."""
    rollouts = evaluated().rollouts
    assert rollouts is not None
    frames = tuple(address(PIL.Image.new("RGB", (24, 24), (20 * i, 0, 0))) for i in range(8))
    return Film(next(pair for pair in rollouts.episodes if pair.differs), frames, frames[:3])


def words() -> LanguageEvaluation:
    """Of a language model."""
    return LanguageEvaluation(
        model="out",
        reference="float",
        language=LanguageFigures(
            perplexity=both(27.5, 33.54, "perplexity", 4088, "tokens"),
            divergence=counted(0.178, "nats/token", 4088, "tokens"),
            top1_agreement=counted(0.812, "share", 4088, "tokens"),
            tokens=4088,
        ),
        system=replace(evaluated().system, rate=None, parts={}),
    )


def benchmark() -> dict[str, Any]:
    """As ``vlaquant bench DIR`` writes it."""

    def version(median: float) -> dict[str, Any]:
        parts = {"vision": 0.4 * median, "decode": 0.6 * median, "decode, per token": 0.1 * median}
        return {
            "median_ms": median,
            "p95_ms": 1.1 * median,
            "parts": {name: {"median_ms": value, "calls": 6.0} for name, value in parts.items()},
            "resident_bytes": 3_494_528,
        }

    return {
        "kind": "action",
        "machine": {"cpu": "some CPU"},
        "settings": {"threads": 1, "rounds": 30, "clock": "wall", "device": "cpu"},
        "versions": {
            "model stored": version(9.0),
            "reference float32": version(12.1),
            "reference bfloat16": version(9.88),
        },
    }


def measured(names: list[str]) -> Measured:
    """Of layers that have these names."""
    rng = np.random.default_rng(0)
    shares = rng.random(17 * 12)
    codes = rng.random(16)
    gram = WeightHistogram(
        names[0], "w4a16_g128", -8, 7, 12, tuple(shares / shares.sum()), tuple(codes / codes.sum()), 0.0123, 0.0117
    )
    rows = tuple(tuple(1 + 9 * rng.random(16)) for _ in names)
    track = tuple(tuple(row) for row in rng.uniform(-1, 1, (9, 4)))
    other = tuple(tuple(row) for row in np.asarray(track) + 0.1 * rng.standard_normal((9, 4)))
    return Measured(
        (gram,),
        tuple((name, 0.0117) for name in names),
        Outliers(tuple(names), 16, rows, rows, (128,) * len(names), (7,) * len(names)),
        Trace("open", 50007, "open the window", track, other, track, 8),
    )


def report(count: int = 8, names: dict[int, str] | None = None, **changes: Any) -> Report:
    """With every section."""
    data = manifest(count, names, **changes)
    quantized = [record["name"] for record in data["layers"]]
    return make_report(
        "demo-w4a16",
        data,
        evaluation=replace(read_evaluation(evaluation()), films=(film(),)),
        benchmark=read_benchmark(benchmark()),
        measured=measured(quantized),
        log=[
            {"event": "layer", "name": quantized[0], "seconds": 0.5},
            {"event": "stage", "seconds": 12.5, "peak_memory": 2**30},
        ],
    )
