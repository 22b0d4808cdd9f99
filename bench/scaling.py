"""How calibration cost grows with samples, sequence length, layers and width: seconds and peak memory of each run.

    python bench/scaling.py [--json bench/results/scaling.json] [--repeats 3]

One axis changes at a time around a small random Llama; every run is a process of its own (GPTQ, W4A16 in groups of 64,
float32), so that its peak memory is its own: until the last block is packed, and with the verification, which runs the
packed model once. The median of the repeats counts. ``scripts/make_figures.py`` draws it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vlaquant
from vlaquant.engine.log import peak_memory

BASE = {"samples": 16, "length": 256, "layers": 8, "width": 512}
AXES = {
    "samples": (8, 16, 32, 64),
    "length": (128, 256, 512, 1024),
    "layers": (4, 8, 16, 32),
    "width": (256, 512, 1024, 2048),
}
RECIPE = {"rules": [{"part": "language", "scheme": "w4a16", "group_size": 64}], "quantizer": {"kind": "gptq"}}


def make_model(directory: Path, *, layers: int, width: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=512,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def one_run(directory: Path, samples: int, length: int) -> None:
    """In a process of its own: quantize, and print what it took."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 512, (1, length), generator=generator) for _ in range(samples)]
    before = peak_memory()
    started = time.perf_counter()
    vlaquant.quantize(directory / "model", RECIPE, samples=data, output=directory / "out")
    seconds = time.perf_counter() - started
    lines = (directory / "out.log.jsonl").read_text(encoding="utf-8").splitlines()
    calibration = max(line["peak_memory"] for line in map(json.loads, lines) if line["event"] == "stage")
    peaks = {"calibration": calibration / 2**20, "peak": peak_memory() / 2**20, "before": before / 2**20}
    print(json.dumps({"seconds": seconds, **peaks}))


def measure(settings: dict[str, int], repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_model(directory / "model", layers=settings["layers"], width=settings["width"])
        runs = []
        for _ in range(repeats):
            command = [sys.executable, __file__, "--run", folder, str(settings["samples"]), str(settings["length"])]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            subprocess.run(["rm", "-r", str(directory / "out"), str(directory / "out.log.jsonl")], check=True)
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return settings | {
        "seconds": round(medians["seconds"], 2),
        "calibration_mib": round(medians["calibration"] - medians["before"]),
        "with_verification_mib": round(medians["peak"] - medians["before"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/scaling.json"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="the file keeps the others")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=3, metavar=("DIRECTORY", "SAMPLES", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        one_run(Path(args.run[0]), int(args.run[1]), int(args.run[2]))
        return
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "repeats": args.repeats}
    results = json.loads(args.json.read_text(encoding="utf-8"))["axes"] if args.json.is_file() else {}
    for axis in args.axes:
        results[axis] = [measure(BASE | {axis: value}, args.repeats) for value in AXES[axis]]
        args.json.write_text(json.dumps({"facts": facts, "axes": results}, indent=2) + "\n", encoding="utf-8")
        for point in results[axis]:
            print(
                f"{axis} {point[axis]:>5}: {point['seconds']:7.2f} s; above import {point['calibration_mib']:5} MiB, "
                f"with verification {point['with_verification_mib']:5} MiB"
            )


if __name__ == "__main__":
    main()
