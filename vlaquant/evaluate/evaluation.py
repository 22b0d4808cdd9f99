"""One evaluation: candidate directory against reference directory, as plain values and as a table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vlaquant.checkpoint import weight_files
from vlaquant.evaluate.actions import compare
from vlaquant.evaluate.language import compare_text
from vlaquant.evaluate.metaworld import why_not
from vlaquant.evaluate.rollouts import default_workers, outcomes_of, plan_jobs, run_jobs, summarize
from vlaquant.export import load
from vlaquant.families.data import load_observations
from vlaquant.families.hf_samples import text_samples
from vlaquant.linear import W4A16Linear, W8A8Linear
from vlaquant.plan import format_table

_MIB = 2**20


def evaluate_policy(
    model: Path, reference: Path, episodes: Path, *, count: int | None, rollouts: int, unnorm_key: str | None = None
) -> dict[str, Any]:
    """Action error on the ``evaluation`` split of recorded episodes, and ``rollouts`` paired episodes a task.

    Raises:
        EvaluationError: not two policies of one class, or nothing to compare.
    """
    candidate, original = load(model), load(reference)
    observations = load_observations(episodes, "evaluation", count, unnorm_key)
    error, latency = compare(candidate, original, observations, _progress("comparing actions"))
    result = {
        "kind": "policy",
        "model": model.name,
        "reference": reference.name,
        "bytes": _bytes(model, reference, candidate, original),
        "latency": latency,
        "threads": torch.get_num_threads(),
        "actions": error.to_dict(),
        "rollouts": None,
    }
    if rollouts > 0:
        obstacle = (
            why_not() if hasattr(candidate, "predict_action") else "the simulated tasks drive OpenVLA policies only"
        )
        result["rollouts"] = {"skipped": obstacle} if obstacle else _rollouts(model, reference, rollouts)
    return result


def evaluate_language(model: Path, reference: Path, text: Path, *, count: int, length: int) -> dict[str, Any]:
    """Perplexity and divergence on ``count`` windows of ``length`` tokens of a text file."""
    candidate, original = load(model), load(reference)
    windows = text_samples(reference, text, count, length)
    error, latency = compare_text(candidate, original, windows, _progress("comparing text"))
    return {
        "kind": "language",
        "model": model.name,
        "reference": reference.name,
        "bytes": _bytes(model, reference, candidate, original),
        "latency": latency,
        "threads": torch.get_num_threads(),
        "language": error.to_dict(),
    }


def _progress(label: str) -> Callable[[Sequence[Any]], Sequence[Any]]:
    return lambda items: tqdm(items, desc=label, disable=None, leave=False)  # type: ignore[return-value]


def _rollouts(model: Path, reference: Path, episodes: int) -> dict[str, Any]:
    jobs = plan_jobs([model, reference], episodes)
    total = sum(len(job.seeds) for job in jobs)
    with tqdm(total=total, desc="closed-loop episodes", disable=None, leave=False) as bar:
        outcomes = run_jobs(jobs, workers=default_workers(), advance=bar.update)
    return summarize(outcomes_of(model, outcomes), outcomes_of(reference, outcomes))


def resident_bytes(model: nn.Module) -> int:
    """Memory that a model's tensors hold now, with the layouts that kernels made at the first run."""
    packed = [module for module in model.modules() if isinstance(module, W4A16Linear | W8A8Linear)]
    mine = {id(tensor) for layer in packed for tensor in (*layer.parameters(), *layer.buffers())}
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if id(t) not in mine}
    return sum(t.numel() * t.element_size() for t in tensors.values()) + sum(layer.resident_bytes for layer in packed)


def _bytes(model: Path, reference: Path, candidate: nn.Module, original: nn.Module) -> dict[str, int]:
    return {
        "disk": sum(path.stat().st_size for path in weight_files(model)),
        "reference_disk": sum(path.stat().st_size for path in weight_files(reference)),
        "resident": resident_bytes(candidate),
        "reference_resident": resident_bytes(original),
    }


def table(result: dict[str, Any]) -> str:
    """The result as the table that ``vlaquant eval`` prints."""
    rows = [("", "reference", "quantized", "")]
    size, latency = result["bytes"], result["latency"]
    for label, key in (("bytes on disk", "disk"), ("bytes in memory", "resident")):
        before, after = size[f"reference_{key}"], size[key]
        note = _times(before, after, "smaller", "larger")
        rows.append((label, f"{before / _MIB:.2f} MiB", f"{after / _MIB:.2f} MiB", note))
    for label, key in (("latency, median", "p50_ms"), ("latency, 99 %", "p99_ms")):
        before, after = latency["reference"][key], latency["candidate"][key]
        rows.append((label, f"{before:.1f} ms", f"{after:.1f} ms", _times(before, after, "faster", "slower")))
    rows += _action_rows(result["actions"]) if result["kind"] == "policy" else _language_rows(result["language"])
    if result.get("rollouts"):
        rows += _rollout_rows(result["rollouts"])
    return format_table(rows)


def _times(before: float, after: float, less: str, more: str) -> str:
    return f"{before / after:.2f}x {less}" if after <= before else f"{after / before:.2f}x {more}"


def _action_rows(error: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    per_dimension = " ".join(f"{value:.4f}" for value in error["l1"])
    squared = " ".join(f"{value:.5f}" for value in error["mse"])
    tokens = []
    if error["bin_distance"] is not None:
        tokens = [
            ("equal action tokens", "100.0%", f"{error['token_agreement']:.1%}", ""),
            ("mean bin distance", "0", f"{error['bin_distance']:.3f}", "of 255 bins"),
        ]
    return [
        ("observations", f"{error['observations']}", f"{error['observations']}", ""),
        ("action L1", "0", f"{error['mean_l1']:.4f}", f"per dimension: {per_dimension}"),
        ("action MSE", "0", f"{error['mean_mse']:.5f}", f"per dimension: {squared}"),
        *tokens,
        ("gripper flips", "0.0%", f"{error['gripper_flips']:.1%}", ""),
        (
            "L1 to demonstrations",
            f"{error['reference_l1_to_demonstration']:.4f}",
            f"{error['l1_to_demonstration']:.4f}",
            "",
        ),
    ]


def _language_rows(error: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    before, after = error["reference_perplexity"], error["perplexity"]
    return [
        ("perplexity", f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}, {error['tokens']} tokens"),
        ("divergence", "0", f"{error['divergence']:.5f}", "nats a token"),
        ("same top token", "100.0%", f"{error['top1_agreement']:.1%}", ""),
    ]


def _rollout_rows(rollouts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    if "skipped" in rollouts:
        return [("success", "not measured", "not measured", rollouts["skipped"])]
    rows = []
    for task, before in rollouts["reference"].items():
        after = rollouts["candidate"][task]
        note = f"{before['episodes']} paired episodes"
        rows.append((f"success, {task}", _interval(before), _interval(after), note))
    paired = rollouts["paired"]
    note = f"lost {paired['only_reference']}, won {paired['only_candidate']}, McNemar p = {paired['p_value']:.2f}"
    interval = f"[{paired['low']:+.1%}, {paired['high']:+.1%}]"
    rows.append(("difference", "", f"{paired['difference']:+.1%} {interval}", note))
    return rows


def _interval(rate: dict[str, Any]) -> str:
    values = np.array([rate["rate"], rate["low"], rate["high"]]) * 100
    return f"{values[0]:.1f}% [{values[1]:.0f}, {values[2]:.0f}]"
