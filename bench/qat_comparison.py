"""What a short fine-tune with rounded weights adds to quantizing after training: the demo policy on held-out frames.

    python bench/qat_comparison.py --json bench/results/qat_demo.json

All rows see the same calibration frames. Errors are those of :mod:`action_calibration`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from action_calibration import PARTS, POLICY, ROOT, Bench, summary, table

import vlaquant
from vlaquant.training import Training, finetune


def rows(args: argparse.Namespace) -> dict[str, dict[str, Any] | Training]:
    """Row -> quantizer, or training."""
    trainings = {
        f"qat, follows {follow}, {rate:g}": Training(args.steps, rate, args.batch, follow)
        for follow in ("float", "demonstration")
        for rate in args.rates
    }
    quantizers: dict[str, dict[str, Any] | Training] = {
        "rounding": {"kind": "rtn"},
        "gptq": {"kind": "gptq"},
        "gptq, refit": {"kind": "gptq", "refit": True},
    }
    return quantizers | trainings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/qat_demo.json")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench, results = Bench(), dict[str, Any]()
    for bits in args.bits:
        rules = [{"part": part, "scheme": f"w{bits}a16", "group_size": 64} for part in PARTS]
        for name, how in rows(args).items():
            found, seconds = [], []
            for seed in range(args.seeds):
                model, samples, started = vlaquant.load(POLICY), bench.draw(args.samples, seed), time.perf_counter()
                if isinstance(how, Training):
                    finetune(model, {"rules": rules, "seed": seed}, how, samples)
                else:
                    vlaquant.quantize(model, {"rules": rules, "quantizer": how}, samples=samples)
                seconds.append(time.perf_counter() - started)
                found.append(bench.errors_of(model))
            results[f"w{bits} g64 {name}"] = summary(found) | {"seconds": seconds}
            args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
