"""Quantize one policy in many ways and compare: action error for all, paired closed-loop episodes for some.

python scripts/compare_recipes.py --work DIR --json bench/results/recipes.json [--rollouts 30]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vlaquant
from vlaquant.evaluate.actions import compare
from vlaquant.evaluate.evaluation import disk
from vlaquant.evaluate.figures import Figure
from vlaquant.evaluate.results import ActionFigures, Rollouts
from vlaquant.evaluate.rollouts import default_workers, outcomes_of, plan_jobs, run_jobs, summarize
from vlaquant.families.data import load_observations
from vlaquant.terminal import format_table

_POLICY = Path(__file__).parent.parent / "examples" / "demo_policy"
_EPISODES = Path(__file__).parent.parent / "examples" / "demo_episodes"
_SMOOTH = {"kind": "smoothquant", "alpha": 0.5}
_AWQ = {"kind": "awq"}

#: row -> (scheme, overrides, transforms, quantizer, whether it drives the robot)
RECIPES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any], bool]] = {
    **{
        f"w{bits} {name}": (scheme, {"group_size": 64}, transforms, quantizer, drives)
        for bits, scheme in ((4, "w4a16"), (3, "w3a16"), (2, "w2a16"))
        for name, transforms, quantizer, drives in (
            ("rtn", [], {"kind": "rtn"}, bits < 4),
            ("rtn mse", [], {"kind": "rtn", "clip": "mse"}, False),
            ("awq", [_AWQ], {"kind": "rtn", "clip": "awq"}, bits == 4),
            ("gptq", [], {"kind": "gptq"}, bits == 4),
            ("awq + gptq", [_AWQ], {"kind": "gptq"}, False),
            ("smoothquant + gptq", [_SMOOTH], {"kind": "gptq"}, False),
        )
    },
    # Too coarse on purpose: the measurement has to see damage where there is some
    "w2 channel rtn": ("w2a16", {"group_size": "channel"}, [], {"kind": "rtn"}, True),
    "w2 tensor rtn": ("w2a16", {"group_size": "tensor"}, [], {"kind": "rtn"}, True),
    "w8a8 rtn": ("w8a8", {}, [], {"kind": "rtn"}, False),
    "w8a8 smoothquant": ("w8a8", {}, [_SMOOTH], {"kind": "rtn"}, True),
    "w8a8 smoothquant + gptq": ("w8a8", {}, [_SMOOTH], {"kind": "gptq"}, False),
    "w8a8 static smoothquant": ("w8a8_static", {}, [_SMOOTH], {"kind": "rtn"}, False),
}


def recipe(row: str) -> dict[str, Any]:
    scheme, overrides, transforms, quantizer, _ = RECIPES[row]
    parts = ("vision", "projector", "language")
    return {
        "family": "openvla",
        "rules": [{"part": part, "scheme": scheme, **overrides} for part in parts],
        "transforms": transforms,
        "quantizer": quantizer,
        "calibration": {"kind": "episodes", "path": str(_EPISODES), "samples": 64},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the quantized policies go")
    parser.add_argument("--rollouts", type=int, default=0, help="paired episodes a task for the rows that drive")
    parser.add_argument("--json", type=Path, required=True, help="rows that it holds already are kept")
    parser.add_argument("--rows", nargs="*", choices=RECIPES, default=list(RECIPES), metavar="ROW", help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    directories = {row: args.work / row.replace(" ", "_") for row in RECIPES}
    reference, observations = vlaquant.load(_POLICY), load_observations(_EPISODES, "evaluation")
    for row in tqdm(args.rows, desc="recipes"):
        quantized = vlaquant.quantize(_POLICY, recipe(row), output=directories[row], overwrite=True)
        actions = compare(vlaquant.load(directories[row]), reference, observations, lambda items: items).figures
        size = disk(_POLICY, directories[row])
        results[row] = {
            "bytes": {"disk": int(size.candidate.value), "reference_disk": int(size.reference.value)},
            "actions": in_short(actions),
            "rollouts": None,
            "mean_relative_loss": quantized.mean_relative_loss,
        }
    if args.rollouts > 0:
        driving = [row for row in args.rows if RECIPES[row][-1]]
        jobs = plan_jobs([_POLICY, *(directories[row] for row in driving)], args.rollouts)
        with tqdm(total=sum(len(job.seeds) for job in jobs), desc="episodes") as bar:
            outcomes = run_jobs(jobs, workers=default_workers(), advance=bar.update)
        float_outcomes = outcomes_of(_POLICY, outcomes)
        for row in driving:
            driven = summarize(outcomes_of(directories[row], outcomes), float_outcomes)
            results[row]["rollouts"] = in_figures(driven)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


def in_short(actions: ActionFigures) -> dict[str, Any]:
    """What of the comparison is kept."""
    assert actions.token_agreement is not None
    assert actions.bin_distance is not None
    return {
        "mean_l1": actions.whole_chunk.l1.value,
        "mean_mse": actions.whole_chunk.mse.value,
        "l1": [figure.value for figure in actions.whole_chunk.l1_by_dimension],
        "token_agreement": actions.token_agreement.value,
        "bin_distance": actions.bin_distance.value,
        "gripper_flips": actions.gripper_flips.value,
        "observations": actions.observations,
    }


def in_figures(driven: Rollouts) -> dict[str, Any]:
    """Rates by task and of all of them, and the paired test."""
    tasks = {**driven.tasks, "all": driven.success}

    def rate(figure: Figure) -> dict[str, Any]:
        return {"rate": figure.value, "low": figure.low, "high": figure.high, "episodes": figure.count}

    apart = driven.success.difference
    return {
        "max_steps": driven.max_steps,
        "candidate": {name: rate(of.candidate) for name, of in tasks.items()},
        "reference": {name: rate(of.reference) for name, of in tasks.items()},
        "paired": {
            "only_reference": driven.only_reference,
            "only_candidate": driven.only_candidate,
            "p_value": driven.p_value.value,
            "difference": apart.value,
            "low": apart.low,
            "high": apart.high,
        },
    }


def table(results: dict[str, Any]) -> str:
    rows = [("recipe", "MiB", "output error", "equal tokens", "bin distance", "action L1", "success", "McNemar p")]
    for row, result in results.items():
        actions, rollouts = result["actions"], result.get("rollouts")
        success = rollouts["candidate"]["all"] if rollouts else None
        rows.append(
            (
                row,
                f"{result['bytes']['disk'] / 2**20:.2f}",
                f"{result['mean_relative_loss']:.2e}",
                f"{actions['token_agreement']:.1%}",
                f"{actions['bin_distance']:.2f}",
                f"{actions['mean_l1']:.4f}",
                f"{success['rate']:.1%} [{success['low']:.0%}, {success['high']:.0%}]" if success else "",
                f"{rollouts['paired']['p_value']:.2f}" if rollouts else "",
            )
        )
    return format_table(rows)


if __name__ == "__main__":
    main()
