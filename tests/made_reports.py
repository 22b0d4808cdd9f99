"""Reports without a model: manifests of any number of layers, and results of every command that a page reads."""

from typing import Any

import numpy as np

from vlaquant.plan import LayerPlan, OtherTensor, Plan
from vlaquant.report.data import Report, make_report
from vlaquant.report.evaluated import read_benchmark, read_evaluation
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


def evaluation() -> dict[str, Any]:
    """As ``vlaquant eval --rollouts`` writes it."""

    def rate(successes: int, low: float, high: float) -> dict[str, Any]:
        return {"successes": successes, "episodes": 30, "low": low, "high": high, "rate": successes / 30}

    reference = {"open": rate(30, 0.886, 1.0), "close": rate(28, 0.787, 0.982)}
    candidate = {"open": rate(29, 0.833, 0.994), "close": rate(25, 0.664, 0.927)}
    return {
        "kind": "policy",
        "bytes": {
            "disk": 3_055_144,
            "reference_disk": 9_104_744,
            "resident": 5_124_992,
            "reference_resident": 9_086_976,
        },
        "latency": {
            "candidate": {"p50_ms": 16.4975, "p99_ms": 27.926},
            "reference": {"p50_ms": 12.6375, "p99_ms": 21.137},
        },
        "threads": 1,
        "actions": {
            "l1": [0.004786, 0.005831, 0.005798, 0.0],
            "mse": [0.000574, 0.001766, 0.003989, 0.0],
            "mean_l1": 0.004104,
            "token_agreement": 0.8966,
            "bin_distance": 0.5868,
            "gripper_flips": 0.0123,
            "l1_to_demonstration": 0.04672,
            "reference_l1_to_demonstration": 0.04603,
            "observations": 347,
        },
        "rollouts": {
            "reference": reference | {"all": rate(29, 0.833, 0.994)},
            "candidate": candidate | {"all": rate(27, 0.744, 0.965)},
            "paired": {
                "only_reference": 4,
                "only_candidate": 1,
                "p_value": 0.375,
                "difference": -0.05,
                "low": -0.11,
                "high": 0.01,
            },
        },
    }


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
        evaluation=read_evaluation(evaluation()),
        benchmark=read_benchmark(benchmark()),
        measured=measured(quantized),
        log=[
            {"event": "layer", "name": quantized[0], "seconds": 0.5},
            {"event": "stage", "seconds": 12.5, "peak_memory": 2**30},
        ],
    )
