"""GPTQ side by side with llm-compressor: the same model, tokens, settings, dtype and threads; interleaved, medians.

    python scripts/unpack_smollm2.py MODEL
    python -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python bench/calibration_speed.py --model MODEL --text FILE --llmcompressor-python PEER/bin/python --work WORK

Every run is a process of its own that measures itself: from reading the model to the written checkpoint. Within its
time vlaquant also verifies in a fresh process what it wrote; llm-compressor does not. Perplexity of both outputs is
measured here by the same code, on text that was not used for calibration.
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlaquant
from vlaquant.engine.fingerprint import package_versions
from vlaquant.engine.log import peak_memory
from vlaquant.evaluate.language import compare_text
from vlaquant.families.causal_lm import text_samples

BITS, GROUP_SIZE, DAMP = 4, 64, 0.01
RECIPE = {
    "rules": [{"part": "language", "scheme": f"w{BITS}a16", "group_size": GROUP_SIZE}],
    "quantizer": {"kind": "gptq", "damp": DAMP, "act_order": True},
}


def our_run(settings: dict[str, Any]) -> None:
    """In a process of its own."""
    torch.set_num_threads(settings["threads"])
    started = time.perf_counter()
    tokens = load_file(settings["tokens"])["tokens"]
    vlaquant.quantize(settings["model"], RECIPE, samples=list(tokens.split(1)), output=settings["output"])
    total = time.perf_counter() - started
    log = Path(f"{settings['output']}.log.jsonl").read_text(encoding="utf-8").splitlines()
    stages = [json.loads(line) for line in log if '"stage"' in line]
    seconds = {"stages": sum(stage["seconds"] for stage in stages if "seconds" in stage)}
    print(json.dumps({"total": total, "seconds": seconds, "peak": peak_memory(), "versions": package_versions()}))


def run(command: list[str], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    threads = {name: str(settings["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [*command, str(path)], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def float32_copy(model: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def perplexities(outputs: dict[str, Path], model: Path, text: Path, windows: int, length: int) -> dict[str, float]:
    data = text_samples(model, text, windows, length)
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    found: dict[str, float] = {}
    for name, output in outputs.items():
        candidate = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
        error, _ = compare_text(candidate, reference, data, lambda items: items)
        found |= {name: error.perplexity, "float": error.reference_perplexity}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, help="the first half calibrates, the second half is measured")
    parser.add_argument("--llmcompressor-python", type=Path)
    parser.add_argument("--work", type=Path, help="folder for outputs")
    parser.add_argument("--json", type=Path, default=Path("bench/results/calibration_speed.json"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="for the perplexity")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        our_run(json.loads(args.run.read_text(encoding="utf-8")))
        return
    work: Path = args.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = float32_copy(args.model, work / "model")
    lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("first", lines[: len(lines) // 2]), ("second", lines[len(lines) // 2 :])):
        (work / f"{name}.txt").write_text("".join(part), encoding="utf-8")
    tokens = torch.cat(text_samples(model, work / "first.txt", args.samples, args.length))
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    commands = {
        "vlaquant": [sys.executable, __file__, "--run"],
        "llmcompressor": [str(args.llmcompressor_python), str(Path(__file__).parent / "peers/llmcompressor_gptq.py")],
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    settings = {"model": str(model), "tokens": str(work / "tokens.safetensors"), "threads": args.threads}
    settings |= {"bits": BITS, "group_size": GROUP_SIZE, "damp": DAMP}
    outputs = {name: work / name for name in commands}
    for repeat in range(args.repeats):
        for name, command in commands.items():
            shutil.rmtree(outputs[name], ignore_errors=True)
            runs[name].append(run(command, settings | {"output": str(outputs[name])}, work))
            print(repeat, name, json.dumps(runs[name][-1]), flush=True)
    medians = {name: statistics.median(one["total"] for one in found) for name, found in runs.items()}
    result = {
        "setting": {"samples": args.samples, "length": args.length, "threads": args.threads, "dtype": "float32"},
        "median_seconds": medians,
        "ratio": medians["llmcompressor"] / medians["vlaquant"],
        "median_peak_mib": {
            name: round(statistics.median(one["peak"] for one in found) / 2**20) for name, found in runs.items()
        },
        "perplexity": perplexities(outputs, model, work / "second.txt", args.windows, args.length),
        "runs": runs,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()
