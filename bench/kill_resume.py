"""Kill `vlaquant quantize` at random moments, go on with --resume, and compare every file with an uninterrupted run.

    python bench/kill_resume.py --model DIR --config RECIPE [--kills 20] [--seed 0] [--in-a-row 1]
        [--within run|stages] --json bench/results/kill_resume_NAME.json

Moments are drawn from the whole run, or from the time in which it works on stages: small models spend most of a run on
starting Python and on verification.

Exit code 1 if a resumed output differs in a byte, if a resume fails, or if a killed run left something that passes for
a finished checkpoint.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vlaquant.checkpoint import read_manifest
from vlaquant.checkpoint.identity import sha256
from vlaquant.engine.work import work_path
from vlaquant.errors import CheckpointError

_EARLIEST = 0.5
_MOST_STARTS = 4


def start(args: argparse.Namespace, output: Path, *more: str) -> subprocess.Popen[str]:
    """The real command, in a process group of its own: its verification runs in a child."""
    command = [sys.executable, "-m", "vlaquant", "quantize", "--model", str(args.model), "--config"]
    return subprocess.Popen(
        [*command, str(args.config), "--output", str(output), *args.more, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def to_its_end(args: argparse.Namespace, output: Path, *more: str) -> tuple[float, str | None]:
    """Seconds, and the last line that it said if it failed."""
    started = time.perf_counter()
    process = start(args, output, *more)
    _, said = process.communicate()
    seconds = time.perf_counter() - started
    return seconds, None if process.returncode == 0 else (said.strip().splitlines() or ["no message"])[-1]


def killed(args: argparse.Namespace, output: Path, moment: float, *more: str) -> bool:
    """Run for ``moment`` seconds and kill everything; False if it ended before."""
    process = start(args, output, *more)
    try:
        process.communicate(timeout=moment)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


def sums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below, by relative path."""
    return {str(path.relative_to(directory)): sha256(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def accepted(folder: Path) -> list[Path]:
    """Directories that vlaquant takes for finished checkpoints."""
    found = []
    for manifest in folder.rglob("vlaquant.json"):
        try:
            read_manifest(manifest.parent)
        except CheckpointError:
            continue
        found.append(manifest.parent)
    return found


def finished_stages(output: Path) -> int:
    return len(list(work_path(output).glob("stage-*.json")))


def stage_times(log: Path, begun: float) -> tuple[int, float, float]:
    """How many stages a run had, and from when to when (seconds after ``begun``) it worked on them."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    ends = [line["time"] - begun for line in lines if line["event"] == "stage"]
    return len(ends), lines[0]["time"] - begun, ends[-1]


def one_try(args: argparse.Namespace, folder: Path, wanted: dict[str, str], moments: list[float]) -> dict[str, Any]:
    """Begin, be killed at each of ``moments`` (seconds after a start), go on to the end, compare."""
    folder.mkdir()
    output = folder / "out"
    problems: list[str] = []
    stages: list[int] = []
    for number, moment in enumerate(moments):
        if output.exists() or not killed(args, output, moment, *(["--resume"] if number else [])):
            break
        stages.append(finished_stages(output))
        # The kill may come when all is done: then the output is there, and has to be the right one
        if output.exists() and sums(output) != wanted:
            problems.append(f"killed after {moment:.1f} s, it left an output that differs")
        problems += [f"{path.name} passes for finished" for path in accepted(folder) if path != output]
    starts, resume_seconds = len(stages), 0.0
    error: str | None = None
    while not output.exists() and starts < _MOST_STARTS + len(moments):
        starts += 1
        resume_seconds, error = to_its_end(args, output, "--resume")
    if not output.exists():
        problems.append(f"it did not go on: {error}")
    elif sums(output) != wanted:
        found = sums(output)
        differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        problems.append(f"{len(differing)} files differ: {', '.join(differing[:5])}")
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    return {
        "killed_after_seconds": [round(moment, 2) for moment in moments[: len(stages)]],
        "finished_stages": stages,
        "starts": starts,
        "last_start_seconds": round(resume_seconds, 2),
        "left_behind": left,
        "problems": problems,
    }


def report(args: argparse.Namespace, seconds: float, stages: int, tries: list[dict[str, Any]]) -> dict[str, Any]:
    resumed = [one for one in tries if one["finished_stages"] and one["last_start_seconds"]]
    saved = [seconds - one["last_start_seconds"] for one in resumed if one["finished_stages"][-1]]
    return {
        "model": args.model.resolve().name,
        "recipe": args.config.name,
        "more": args.more,
        "seed": args.seed,
        "within": args.within,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "uninterrupted_seconds": round(seconds, 2),
        "stages": stages,
        "kills": sum(len(one["killed_after_seconds"]) for one in tries),
        "resumed": len(resumed),
        "resumed_with_finished_stages": len(saved),
        "identical": sum(not one["problems"] for one in tries),
        "tries": len(tries),
        "median_seconds_saved": round(statistics.median(saved), 2) if saved else None,
        "runs": tries,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    parser.add_argument("--in-a-row", type=int, default=1, help="kills of each run before it may end")
    parser.add_argument("--within", choices=("run", "stages"), default="run", help="when to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for all outputs (default: the system's for such things)")
    parser.add_argument("more", nargs="*", metavar="-- OPTION", help="more options of `vlaquant quantize`")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    moments = random.Random(args.seed)
    if args.scratch is not None:
        args.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        whole = Path(folder, "whole", "out")
        whole.parent.mkdir()
        begun = time.time()
        seconds, error = to_its_end(args, whole)
        if error is not None:
            print(f"the uninterrupted run failed: {error}", file=sys.stderr)
            return 1
        wanted = sums(whole)
        stages, first, last = stage_times(whole.with_name("out.log.jsonl"), begun)
        print(f"uninterrupted: {seconds:.1f} s, {stages} stages from {first:.1f} to {last:.1f} s", flush=True)
        span = (first, last) if args.within == "stages" else (_EARLIEST, seconds)
        tries = []
        for number in range(args.kills):
            when = [moments.uniform(*span) for _ in range(args.in_a_row)]
            tries.append(one_try(args, Path(folder, f"kill{number}"), wanted, when))
            print(f"{number + 1:>3}: {json.dumps(tries[-1])}", flush=True)
            subprocess.run(["rm", "-r", str(Path(folder, f"kill{number}"))], check=True)
    result = report(args, seconds, stages, tries)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['identical']} of {result['tries']} identical; {result['kills']} kills", flush=True)
    return 0 if result["identical"] == result["tries"] else 1


if __name__ == "__main__":
    sys.exit(main())
