"""Success of the demo policy in the simulator at few bits, with weighted and with equal tokens, and against its size.

    python bench/closed_loop.py --work WORK --json bench/results/closed_loop.json

Each setting is quantized once a seed, with other calibration frames; all of them drive the same episodes (same initial
states) as the float policy. The paired test is McNemar's on the episodes of all seeds together.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from action_calibration import EPISODES, PARTS, POLICY, ROOT, WEIGHTS
from numpy.typing import NDArray
from tqdm import tqdm

import vlaquant
from vlaquant.checkpoint import weight_files
from vlaquant.evaluate.results import Outcome
from vlaquant.evaluate.rollouts import default_workers, outcomes_of, plan_jobs, run_jobs
from vlaquant.evaluate.statistics import mcnemar, paired_rates, wilson
from vlaquant.families.data import load_observations
from vlaquant.terminal import format_table

_GPTQ = {"quantizer": {"kind": "gptq"}}
_RTN = {"quantizer": {"kind": "rtn"}}
#: Name -> scheme of all parts, group size, method, name of the token weights
SETTINGS: dict[str, tuple[str, int | str, dict[str, Any], str]] = {
    "w8 channel rtn": ("w8a16", "channel", _RTN, "equal"),
    "w4 g64 gptq": ("w4a16", 64, _GPTQ, "equal"),
    "w3 g64 gptq": ("w3a16", 64, _GPTQ, "equal"),
    "w3 g64 gptq, weighted": ("w3a16", 64, _GPTQ, "gradient"),
    "w2 g64 gptq": ("w2a16", 64, _GPTQ, "equal"),
    "w2 g64 gptq, weighted": ("w2a16", 64, _GPTQ, "gradient"),
    "w2 channel gptq": ("w2a16", "channel", _GPTQ, "equal"),
    "w2 channel gptq, weighted": ("w2a16", "channel", _GPTQ, "gradient"),
    "w2 tensor gptq": ("w2a16", "tensor", _GPTQ, "equal"),
    "w2 tensor gptq, weighted": ("w2a16", "tensor", _GPTQ, "gradient"),
    "w2 channel rtn": ("w2a16", "channel", _RTN, "equal"),
    "w2 tensor rtn": ("w2a16", "tensor", _RTN, "equal"),
}
#: Which to compare: better than equal weights?
PAIRS = [(name, f"{name}, weighted") for name in SETTINGS if f"{name}, weighted" in SETTINGS]


def recipe(setting: str) -> dict[str, Any]:
    scheme, group, method, weights = SETTINGS[setting]
    rules = [{"part": part, "scheme": scheme, "group_size": group} for part in PARTS]
    weighing = {} if WEIGHTS[weights] is None else {"token_weights": WEIGHTS[weights]}
    return {"rules": rules, **method, **weighing}


def quantize_all(args: argparse.Namespace) -> dict[str, list[Path]]:
    frames = load_observations(EPISODES, "calibration", None)
    outputs: dict[str, list[Path]] = {}
    for setting in tqdm(args.settings, desc="recipes", disable=None):
        # Rounding to nearest looks at no data
        seeds = 1 if SETTINGS[setting][2] is _RTN else args.seeds
        for seed in range(seeds):
            chosen = np.random.default_rng(seed).permutation(len(frames))[: args.samples]
            output = args.work / f"{setting.replace(' ', '_').replace(',', '')}_{seed}"
            vlaquant.quantize(
                POLICY, recipe(setting), samples=[frames[i] for i in chosen], output=output, overwrite=True
            )
            outputs.setdefault(setting, []).append(output)
    return outputs


def mib(directory: Path) -> float:
    return sum(path.stat().st_size for path in weight_files(directory)) / 2**20


def together(outcomes: list[dict[str, list[tuple[int, Outcome]]]]) -> NDArray[np.bool_]:
    """Successes of all tasks, one seed after the other."""
    return np.array([one.success for tasks in outcomes for task in tasks.values() for _, one in task], dtype=bool)


def paired(reference: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> dict[str, Any]:
    """Who succeeded where the other failed, the difference with its interval, and McNemar's p."""
    lost, won = int((reference & ~candidate).sum()), int((candidate & ~reference).sum())
    low, high = paired_rates(lost, won, len(reference))
    difference = (won - lost) / len(reference)
    return {"lost": lost, "won": won, "difference": difference, "low": low, "high": high, "p": mcnemar(lost, won)}


def row(successes: NDArray[np.bool_], against: NDArray[np.bool_], size: float, seeds: int) -> dict[str, Any]:
    found, (low, high) = paired(against, successes), wilson(int(successes.sum()), len(successes))
    return {
        "mib": size,
        "success": float(successes.mean()),
        "low": low,
        "high": high,
        "episodes": len(successes),
        "seeds": [float(part.mean()) for part in np.split(successes, seeds)],
        "difference": found["difference"],
        "difference_low": found["low"],
        "difference_high": found["high"],
        "p": found["p"],
    }


def results_of(outputs: dict[str, list[Path]], outcomes: Any) -> dict[str, Any]:
    float_ones = outcomes_of(POLICY, outcomes)
    found = {name: [outcomes_of(path, outcomes) for path in paths] for name, paths in outputs.items()}
    rows = {"float": row(together([float_ones]), together([float_ones]), mib(POLICY), 1)}
    for name, ones in found.items():
        rows[name] = row(together(ones), together([float_ones] * len(ones)), mib(outputs[name][0]), len(ones))
    pairs = {}
    for plain, weighted in PAIRS:
        if plain in found and weighted in found:
            pairs[f"{weighted} against {plain}"] = paired(together(found[plain]), together(found[weighted]))
    return {"rows": rows, "pairs": pairs}


def table(results: dict[str, Any]) -> str:
    lines: list[tuple[str, ...]] = [("", "MiB", "success", "by seed", "against float, McNemar")]
    for name, one in results["rows"].items():
        seeds = " ".join(f"{value:.1%}" for value in one["seeds"])
        interval = f"[{one['difference_low']:+.1%}, {one['difference_high']:+.1%}]"
        lines.append(
            (
                name,
                f"{one['mib']:.2f}",
                f"{one['success']:.1%} [{one['low']:.0%}, {one['high']:.0%}]",
                seeds,
                f"{one['difference']:+.1%} {interval}, p = {one['p']:.2g}",
            )
        )
    text = format_table(lines)
    for name, one in results["pairs"].items():
        interval = f"[{one['low']:+.1%}, {one['high']:+.1%}]"
        text += (
            f"\n{name}: won {one['won']}, lost {one['lost']}, {one['difference']:+.1%} {interval}, p = {one['p']:.2g}"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/closed_loop.json")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=30, help="paired episodes a task and seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outputs = quantize_all(args)
    jobs = plan_jobs([POLICY, *(path for paths in outputs.values() for path in paths)], args.episodes)
    with tqdm(total=sum(len(job.seeds) for job in jobs), desc="episodes", disable=None) as bar:
        outcomes = run_jobs(jobs, workers=default_workers(), advance=bar.update)
    results = results_of(outputs, outcomes)
    args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
