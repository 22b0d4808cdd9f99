"""Closed-loop success of a policy, and of the same policy with its eyes or ears covered.

    python scripts/evaluate_demo_policy.py --model examples/demo_policy --json bench/results/demo_policy.json

A policy that still succeeds on black images, or when told to do another task, would prove nothing about quantization.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlaquant.evaluate.metaworld import MAX_STEPS
from vlaquant.evaluate.results import Outcome
from vlaquant.evaluate.rollouts import (
    FIRST_SEED,
    TAMPERINGS,
    Job,
    default_workers,
    outcomes_of,
    plan_jobs,
    run_jobs,
    success,
)
from vlaquant.terminal import format_table


def rates(outcomes: dict[str, list[tuple[int, Outcome]]]) -> dict[str, Any]:
    """Success of each task and of all: {task: {successes, episodes, low, high, rate}}."""
    everything = {**outcomes, "all": [one for task in outcomes.values() for one in task]}
    found = {name: success([outcome for _, outcome in one]) for name, one in everything.items()}
    return {
        name: {
            "successes": round(figure.value * figure.count),
            "episodes": figure.count,
            "low": figure.low,
            "high": figure.high,
            "rate": figure.value,
        }
        for name, figure in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=50, help="episodes a task")
    parser.add_argument("--tampered-episodes", type=int, default=20, help="episodes a task for each tampering")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jobs: list[Job] = []
    for tampering in TAMPERINGS:
        count = args.episodes if tampering == TAMPERINGS[0] else args.tampered_episodes
        jobs += plan_jobs([args.model], count, Job(args.model, "", (), tampering))
    with tqdm(total=sum(len(job.seeds) for job in jobs)) as bar:
        outcomes = run_jobs(jobs, workers=default_workers(), advance=bar.update)
    result = {tampering: rates(outcomes_of(args.model, outcomes, tampering)) for tampering in TAMPERINGS}
    if args.json is not None:
        stamped = {"model": args.model.name, "first_seed": FIRST_SEED, "max_steps": MAX_STEPS, "success": result}
        args.json.write_text(json.dumps(stamped, indent=2) + "\n", encoding="utf-8")
    rows: list[tuple[str, ...]] = [("task", *TAMPERINGS)]
    for task in result[TAMPERINGS[0]]:
        cells = [result[tampering][task] for tampering in TAMPERINGS]
        rows.append((task, *(f"{c['rate']:.1%} of {c['episodes']} [{c['low']:.0%}, {c['high']:.0%}]" for c in cells)))
    print(format_table(rows))


if __name__ == "__main__":
    main()
