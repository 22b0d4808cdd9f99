"""One Linear, float against packed, on this machine: interleaved, each round once a path, median of the rounds.

python bench/linear_kernels.py [--json bench/results/linear_kernels.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.kernels import select_kernel
from vlaquant.linear import from_quantized
from vlaquant.numerics import quantize_weight
from vlaquant.plan import format_table
from vlaquant.scheme import get_scheme

_SHAPES = ((2048, 2048), (4096, 4096))
_TOKENS = (1, 8, 32, 256)
_SCHEMES = ("w4a16", "w8a16", "w8a8")
_ROUNDS = 15


def paths(k: int, n: int, dtype: torch.dtype) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Name -> (kernel, layer) for the float layer and each scheme, with the same random weight."""
    linear = nn.Linear(k, n, bias=False).to(dtype)
    layers: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {"float": ("F.linear", linear)}
    for name in _SCHEMES:
        scheme = get_scheme(name)
        codes = quantize_weight(linear.weight, scheme.weight, scale_dtype=dtype)
        packed = from_quantized(codes, scheme, None, dtype=dtype)
        layers[name] = (select_kernel(packed.query(dtype)).name, packed)
    return layers


@torch.inference_mode()
def measure(k: int, n: int, tokens: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    x = torch.randn(tokens, k, dtype=dtype)
    layers = paths(k, n, dtype)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for round_ in range(_ROUNDS + 2):
        for name, (_, layer) in layers.items():
            started = time.perf_counter()
            layer(x)
            if round_ >= 2:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return [
        {
            "in_features": k,
            "out_features": n,
            "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "path": name,
            "kernel": layers[name][0],
            "median_ms": medians[name],
            "times_faster_than_float": medians["float"] / medians[name],
        }
        for name in layers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "linear_kernels.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    results = [
        row
        for k, n in _SHAPES
        for tokens in _TOKENS
        for dtype in (torch.bfloat16, torch.float32)
        for row in measure(k, n, tokens, dtype)
    ]
    machine = {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(machine | {"rows": results}, indent=2) + "\n", encoding="utf-8")
    columns = ("in_features", "out_features", "tokens", "dtype", "path", "kernel")
    rows: list[tuple[str, ...]] = [(*columns, "median ms", "x float")]
    for row in results:
        cells = tuple(str(row[column]) for column in columns)
        rows.append((*cells, f"{row['median_ms']:.3f}", f"{row['times_faster_than_float']:.2f}"))
    print(format_table(rows))


if __name__ == "__main__":
    main()
