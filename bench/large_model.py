"""Quantizing a checkpoint that is larger than the memory: seconds, and peak resident memory of the whole process.

    python scripts/make_synthetic_checkpoint.py --output DIR --episodes EPISODES --observations 128
    python bench/large_model.py --model DIR --episodes EPISODES --work WORK [--json bench/results/large_model.json]

RTN runs to the end. GPTQ and AWQ run until --blocks language blocks are finished, and the time of the others is
extrapolated from the median of these. The weights may be random: cost does not depend on their values.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import vlaquant
from vlaquant.engine.log import RunLog, peak_memory
from vlaquant.engine.run import RunOptions
from vlaquant.engine.work import work_path

RULES = [{"part": "language", "scheme": "w4a16", "group_size": 128}]
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"rules": RULES},
    "gptq": {"rules": RULES, "quantizer": {"kind": "gptq"}},
    "awq": {"rules": RULES, "transforms": [{"kind": "awq"}], "quantizer": {"kind": "rtn", "clip": "awq"}},
}
#: Bytes that each may hold. The prediction, which is refused beyond that, is an upper estimate of what is measured.
LIMITS = {"rtn": 3 * 10**9, "gptq": 9 * 10**9, "awq": 9 * 10**9}


class Enough(Exception):  # noqa: N818  not an error
    """As many language blocks as were asked for are finished."""


def stop_after(blocks: int) -> None:
    """Let the run end when so many blocks of the language model are in the log."""
    write = RunLog.write
    done = 0

    def counting(log: RunLog, event: str, **values: Any) -> None:
        nonlocal done
        write(log, event, **values)
        done += event == "stage" and bool(values["layers"])
        if done == blocks:
            raise Enough

    RunLog.write = counting  # type: ignore[method-assign, assignment]


def one_run(name: str, model: Path, episodes: Path, output: Path, samples: int, blocks: int) -> None:
    """In a process of its own: quantize, and print what it took."""
    recipe = dict(RECIPES[name])
    if name != "rtn":
        recipe["calibration"] = {"kind": "episodes", "path": str(episodes), "samples": samples}
        stop_after(blocks)
    started, before = time.perf_counter(), peak_memory()
    finished = True
    try:
        vlaquant.quantize(
            model, recipe, output=output, options=RunOptions(max_memory=LIMITS[name]), overwrite=True, progress=True
        )
    except Enough:
        finished = False
    log = work_path(output) / "log.jsonl" if not finished else output.parent / f"{output.name}.log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stages = [line for line in lines if line["event"] == "stage"]
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "peak": peak_memory(),
                "import": before,
                "finished": finished,
                "said": [line["text"] for line in lines if line["event"] == "note"],
                "float_stage_seconds": [stage["seconds"] for stage in stages if not stage["layers"]],
                "stage_seconds": [stage["seconds"] for stage in stages if stage["layers"]],
            }
        )
    )


def disk_speed(model: Path) -> float:
    """Bytes a second of reading the checkpoint as plain files, after dropping them from the page cache."""
    files = sorted(model.glob("*.safetensors"))
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    buffer = bytearray(8 * 2**20)
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return sum(path.stat().st_size for path in files) / (time.perf_counter() - started)


def summary(run: dict[str, Any], blocks_in_all: int) -> dict[str, Any]:
    result = {
        "seconds": round(run["seconds"], 1),
        "peak_gb": round(run["peak"] / 1e9, 2),
        "import_gb": round(run["import"] / 1e9, 2),
        "finished": run["finished"],
        "said": run["said"],
        "median_block_seconds": round(statistics.median(run["stage_seconds"]), 1),
        "blocks": len(run["stage_seconds"]),
    }
    if not run["finished"]:
        left = blocks_in_all - len(run["stage_seconds"])
        result["float_stages_seconds"] = round(sum(run["float_stage_seconds"]), 1)
        result["extrapolated_minutes"] = round((run["seconds"] + left * result["median_block_seconds"]) / 60, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--episodes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the outputs, which are deleted")
    parser.add_argument("--json", type=Path, default=Path("bench/results/large_model.json"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--run", choices=RECIPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    output = args.work / "out"
    if args.run is not None:
        one_run(args.run, args.model, args.episodes, output, args.samples, args.blocks)
        return
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    blocks_in_all = config["text_config"]["num_hidden_layers"]
    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
    results["facts"] = {
        "source_bytes": sum(path.stat().st_size for path in args.model.glob("*.safetensors")),
        "disk_gb_per_second": round(disk_speed(args.model) / 1e9, 2),
        "threads": torch.get_num_threads(),
        "samples": args.samples,
        "torch": torch.__version__,
    }
    for name in args.only:
        shutil.rmtree(args.work, ignore_errors=True)
        args.work.mkdir(parents=True)
        command = [sys.executable, __file__, "--run", name, *sys.argv[1:]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = summary(json.loads(done.stdout.splitlines()[-1]), blocks_in_all)
        print(name, json.dumps(results[name], indent=2))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    main()
