"""Quantize a language model in many ways; perplexity in vlaquant's loader and in transformers' own.

    python scripts/compare_language_recipes.py --model DIR --text FILE --work DIR --json bench/results/smollm2.json

The first half of the text calibrates, the second half is measured.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import vlaquant
from vlaquant.evaluate.language import compare_text
from vlaquant.families.hf_samples import text_samples
from vlaquant.terminal import format_table

_AWQ = [{"kind": "awq"}]
_SMOOTH = [{"kind": "smoothquant", "alpha": 0.5}]

#: row -> (scheme, group size, transforms, quantizer)
ROWS: dict[str, tuple[str, int | None, list[dict[str, Any]], dict[str, Any]]] = {
    f"w{bits}a16 g64 {name}": (f"w{bits}a16", 64, transforms, quantizer)
    for bits in (4, 3)
    for name, transforms, quantizer in (
        ("rtn", [], {"kind": "rtn"}),
        ("awq", _AWQ, {"kind": "rtn", "clip": "awq"}),
        ("gptq", [], {"kind": "gptq"}),
    )
} | {
    "w8a8 rtn": ("w8a8", None, [], {"kind": "rtn"}),
    "w8a8 smoothquant": ("w8a8", None, _SMOOTH, {"kind": "rtn"}),
}


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    """The text in two files: for calibration, and for measuring."""
    work.mkdir(parents=True, exist_ok=True)
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    paths = (work / "calibration.txt", work / "evaluation.txt")
    for path, part in zip(paths, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


def recipe(row: str, text: Path, samples: int, length: int) -> dict[str, Any]:
    scheme, group_size, transforms, quantizer = ROWS[row]
    rule = {"part": "language", "scheme": scheme} | ({} if group_size is None else {"group_size": group_size})
    calibration = {"kind": "text", "path": str(text), "samples": samples, "sequence_length": length}
    return {"rules": [rule], "transforms": transforms, "quantizer": quantizer, "calibration": calibration}


def measure(model: Path, output: Path, windows: list[torch.Tensor], reference: torch.nn.Module) -> dict[str, Any]:
    ours = vlaquant.load(output)
    error, seconds = compare_text(ours, reference, windows, lambda items: items)
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
    same, _ = compare_text(theirs, reference, windows, lambda items: items)
    size = (output / "model.safetensors").stat().st_size
    measured, in_transformers = error.perplexity.candidate.value, same.perplexity.candidate.value
    return {
        "perplexity": measured,
        "reference_perplexity": error.perplexity.reference.value,
        "divergence": error.divergence.value,
        "top1_agreement": error.top1_agreement.value,
        "tokens": error.tokens,
        "perplexity_in_transformers": in_transformers,
        "loaders_differ_by": abs(in_transformers / measured - 1.0),
        "latency": {who: percentiles_ms(values) for who, values in seconds.items()},
        "bytes_on_disk": size,
        "reference_bytes_on_disk": (model / "model.safetensors").stat().st_size,
    }


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    return {f"p{share}_ms": float(np.percentile(seconds, share)) * 1e3 for share in (50, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32, help="windows for calibration")
    parser.add_argument("--windows", type=int, default=24, help="windows for measuring")
    parser.add_argument("--sequence-length", type=int, default=512)
    args = parser.parse_args()
    calibration, evaluation = halves(args.text, args.work)
    windows = text_samples(args.model, evaluation, args.windows, args.sequence_length)
    reference = vlaquant.load(args.model)
    results: dict[str, Any] = {}
    for row in tqdm(ROWS):
        output = args.work / row.replace(" ", "_")
        chosen = recipe(row, calibration, args.samples, args.sequence_length)
        quantized = vlaquant.quantize(args.model, chosen, output=output, overwrite=True)
        results[row] = measure(args.model, output, windows, reference) | {
            "mean_relative_loss": quantized.mean_relative_loss
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"windows": len(windows), "rows": results}, indent=2) + "\n", encoding="utf-8")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("recipe", "perplexity", "in transformers", "divergence", "output error", "MiB")]
    first = next(iter(results.values()))
    size = f"{first['reference_bytes_on_disk'] / 2**20:.0f}"
    rows.append(("float", f"{first['reference_perplexity']:.3f}", "", "0", "0", size))
    for row, result in results.items():
        rows.append(
            (
                row,
                f"{result['perplexity']:.3f}",
                f"{result['perplexity_in_transformers']:.3f} ({result['loaders_differ_by']:.1e})",
                f"{result['divergence']:.4f}",
                f"{result['mean_relative_loss']:.2e}" if result["mean_relative_loss"] is not None else "",
                f"{result['bytes_on_disk'] / 2**20:.0f}",
            )
        )
    return format_table(rows)


if __name__ == "__main__":
    main()
