"""How long the solvers take for one layer on this machine, and what their time is made of.

    python bench/solver_speed.py [--only gptq,awq] [--shapes 576,1536] [--profile] [--json FILE]

Square weights of random values with correlated inputs, 4 bits, groups of 64 up to 1024 columns and of 128 beyond.
Seconds are of the processor, the least of some rounds, so that other work on the machine disturbs little.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vlaquant.calibrate import ActStats
from vlaquant.families import FoldGroup
from vlaquant.numerics import quantize_weight
from vlaquant.packing import pack_rows
from vlaquant.passes.awq import awq_clip
from vlaquant.passes.gptq import gptq
from vlaquant.passes.layer import Work, quantize_layers
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.passes.transform import transform_group_
from vlaquant.recipe import Awq, Gptq
from vlaquant.scheme import Scheme, get_scheme
from vlaquant.terminal import format_table

_SAMPLED = 256


def statistics_of(k: int) -> ActStats:
    """Of tokens that lie near a few directions, with channels of different size."""
    tokens, directions = 2 * k, k // 8
    x = torch.randn(tokens, directions) @ torch.randn(directions, k) / directions**0.5 + 0.3 * torch.randn(tokens, k)
    x *= torch.exp(0.5 * torch.randn(k))
    return ActStats(x.amin(dim=0), x.amax(dim=0), x.abs().mean(dim=0), x.T @ x / tokens, x[:_SAMPLED], tokens)


def solvers(k: int, scheme: Scheme) -> dict[str, Callable[[], object]]:
    """Name -> one layer [k, k] solved."""
    weight, stats, spec = torch.randn(k, k) * 0.02, statistics_of(k), scheme.weight
    hessian, narrow, dtype = stats.hessian, weight.bfloat16(), torch.bfloat16
    assert hessian is not None
    codes = quantize_weight(weight, spec, scale_dtype=dtype).codes

    def awq() -> object:
        works = {"layer": Work(weight, None, scheme, stats, dtype)}
        source = nn.ModuleDict({"norm": nn.LayerNorm(k), "layer": nn.Linear(k, k)})
        return transform_group_(source, FoldGroup("norm", ("layer",)), works, Awq())

    def rtn_packed() -> Tensor:
        return pack_rows(round_to_nearest(narrow, spec, scale_dtype=dtype).codes, spec.bits)

    return {
        "gptq": lambda: gptq(weight, hessian, spec, scale_dtype=dtype),
        "gptq in order": lambda: gptq(weight, hessian, spec, scale_dtype=dtype, act_order=False),
        "gptq with record": lambda: quantize_layers({"layer": Work(weight, None, scheme, stats, dtype)}, Gptq()),
        "awq search": awq,
        "awq clip": lambda: awq_clip(weight, hessian, spec, scale_dtype=dtype),
        "mse clip": lambda: round_to_nearest(weight, spec, scale_dtype=dtype, clip="mse"),
        "rtn, packed": rtn_packed,
        "pack": lambda: pack_rows(codes, spec.bits),
    }


def seconds_of(solve: Callable[[], object], rounds: int) -> float:
    solve()
    best = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        solve()
        best = min(best, time.process_time() - started)
    return best


def print_profile(name: str, solve: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        solve()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = [f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}" for event in events[:6]]
    print(f"{name}: {', '.join(shares)}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="576,1536,4096")
    parser.add_argument("--only", help="names that contain one of these, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="say which operations take the time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    results: list[dict[str, Any]] = []
    for k in map(int, args.shapes.split(",")):
        scheme = get_scheme("w4a16").with_weight(group_size=64 if k <= 1024 else 128)
        for name, solve in solvers(k, scheme).items():
            if args.only and not any(part in name for part in args.only.split(",")):
                continue
            seconds = seconds_of(solve, rounds=2 if k > 2048 else 5)
            results.append({"solver": name, "k": k, "ms": seconds * 1e3, "weights_per_second": k * k / seconds})
            if args.profile:
                print_profile(f"{name} {k}", solve)
    rows = [("solver", "k", "ms", "M weights/s")]
    rows += [(r["solver"], str(r["k"]), f"{r['ms']:.1f}", f"{r['weights_per_second'] / 1e6:.1f}") for r in results]
    print(format_table(rows))
    if args.json is not None:
        machine = {"machine": platform.machine(), "threads": args.threads, "torch": torch.__version__}
        args.json.write_text(json.dumps(machine | {"rows": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
