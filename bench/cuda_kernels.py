"""The Triton kernels on a CUDA device, against cuBLAS and PyTorch's own int4 kernel, at the shapes of a 7B model.

python bench/cuda_kernels.py [--json bench/results/cuda_kernels.json]

Each call is captured in a CUDA graph with as many copies of its weight as the L2 cache cannot hold, and the graph is
replayed between two events: what counts is the median of the rounds, in which the paths take turns. Fractions are of
what this device reads and multiplies at best, measured in the same way. Every path is compared with the reference
kernel first, and one that is far off is reported and not timed.

``--dry-run`` takes the same steps on a CPU with small shapes, plain clocks and, where ``TRITON_INTERPRET=1`` is set,
interpreted kernels. Its times mean nothing, and it writes no file unless it is told where to.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlaquant.evaluate.machine import machine
from vlaquant.kernels import Kernel, unpack
from vlaquant.kernels.reference import REFERENCE
from vlaquant.kernels.triton_w4a16 import TRITON_W4A16
from vlaquant.kernels.triton_w8a8 import TRITON_W8A8
from vlaquant.linear import QuantLinear, from_quantized
from vlaquant.numerics import quantize_weight
from vlaquant.scheme import get_scheme
from vlaquant.terminal import format_table

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # in_features, out_features
TOKENS = (1, 4, 16, 64, 256, 1024)
_ROUNDS = 15
_L2_TIMES = 3
_FAR_OFF = 0.02
_INNER_K_TILES = 8  # of _weight_int4pack_mm; taken by all GPUs that have the kernel
_INT_MM_TOKENS = 17  # torch._int_mm takes no fewer on CUDA

#: A weight -> a call for activations [t, k].
Maker = Callable[[], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a layer.

    Attributes:
        name: in the table.
        make: a call with a copy of the weight of its own.
        weight_bytes: that a call reads.
        arithmetic: ``bf16`` or ``int8``.
        wanted: what it should give, to compare with; None to leave it.
    """

    name: str
    make: Maker
    weight_bytes: int
    arithmetic: str
    wanted: Callable[[Tensor], Tensor] | None


def layer_of(scheme: str, k: int, n: int, device: str) -> QuantLinear:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    spec = get_scheme(scheme)
    codes = quantize_weight(weight, spec.weight, scale_dtype=torch.bfloat16)
    return from_quantized(codes, spec, None, dtype=torch.bfloat16)


def reference(layer: QuantLinear) -> Callable[[Tensor], Tensor]:
    return lambda x: REFERENCE.run(x, layer.stored(), (), layer.query(x.dtype))


def ours(layer: QuantLinear, kernel: Kernel) -> Contender:
    stored, query = layer.stored(), layer.query()

    def make() -> Callable[[Tensor], Tensor]:
        own = stored._replace(weight=stored.weight.clone())
        prepared = kernel.prepare(own, query)
        return lambda x: kernel.run(x, own, prepared, query)

    weight_bytes = sum(one.numel() * one.element_size() for one in (stored.weight, stored.scale))
    return Contender(kernel.name, make, weight_bytes, "bf16" if kernel is TRITON_W4A16 else "int8", reference(layer))


def cublas(layer: QuantLinear) -> Contender:
    weight = layer.dequantize()

    def make() -> Callable[[Tensor], Tensor]:
        own = weight.clone()
        return lambda x: functional.linear(x, own)

    return Contender("bf16 F.linear", make, 2 * weight.numel(), "bf16", reference(layer))


def int4pack(layer: QuantLinear) -> Contender:
    """PyTorch's ``_weight_int4pack_mm``: (u - 8) · scale + zero, with the even column in the high bits of a byte."""
    weight = unpack(layer.stored(), layer.query())
    unsigned = (weight.codes + 8).to(torch.uint8)
    pairs = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
    scale = weight.scale.T.contiguous()
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
    size = layer.scheme.weight.group_size

    def make() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES)  # noqa: SLF001
        matmul = torch.ops.aten._weight_int4pack_mm  # noqa: SLF001
        return lambda x: matmul(x, packed, size, scale_and_zero)

    weight_bytes = pairs.numel() + 2 * scale_and_zero.numel()
    return Contender("torch int4pack", make, weight_bytes, "bf16", reference(layer))


def int_mm(layer: QuantLinear, tokens: int) -> Contender:
    """PyTorch's int8 product alone, from codes to int32: without quantizing, scales or bias."""
    weight = layer.stored().weight
    codes = torch.randint(-127, 128, (tokens, weight.shape[1]), dtype=torch.int8, device=weight.device)

    def make() -> Callable[[Tensor], Tensor]:
        own = weight.clone().T
        return lambda _: torch._int_mm(codes, own)  # noqa: SLF001

    return Contender("torch _int_mm (product only)", make, weight.numel(), "int8", None)


def contenders(k: int, n: int, tokens: int, device: str) -> Iterator[Contender]:
    w4a16, w8a8 = layer_of("w4a16", k, n, device), layer_of("w8a8", k, n, device)
    yield cublas(w4a16)
    for layer, kernel in ((w4a16, TRITON_W4A16), (w8a8, TRITON_W8A8)):
        if (reason := kernel.why_not(layer.query())) is None:
            yield ours(layer, kernel)
        else:
            print(f"{kernel.name}: {reason}")
    if device == "cuda":
        yield int4pack(w4a16)
        if tokens >= _INT_MM_TOKENS:
            yield int_mm(w8a8, tokens)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


class Timer:
    """Seconds of one call out of a series; on a GPU from a captured graph."""

    def __init__(self, calls: list[Callable[[], object]], device: str) -> None:
        self.calls, self.device = calls, device
        for call in calls:  # block sizes are chosen and kernels compiled before the capture
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                for call in calls:
                    call()

    def seconds(self) -> float:
        if self.device != "cuda":
            started = time.perf_counter()
            for call in self.calls:
                call()
            return (time.perf_counter() - started) / len(self.calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(self.calls)


def copies(weight_bytes: int, device: str) -> int:
    """How many weights are taken in turn, so that none is found in the cache."""
    if device != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size
    return max(-(-_L2_TIMES * cache // weight_bytes), 4)


def timer_of(path: Contender, x: Tensor, device: str) -> Timer:
    runs = [path.make() for _ in range(copies(path.weight_bytes, device))]
    return Timer([lambda run=run: run(x) for run in runs], device)  # type: ignore[misc]


def measure(k: int, n: int, tokens: int, device: str, rounds: int, limits: dict[str, float]) -> list[dict[str, Any]]:
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    rows, timers = [], {}
    for path in contenders(k, n, tokens, device):
        row: dict[str, Any] = {"in_features": k, "out_features": n, "tokens": tokens, "path": path.name}
        rows.append(row)
        if path.wanted is not None:
            row["error"] = relative_error(path.make()(x), path.wanted(x))
            if not row["error"] < _FAR_OFF:
                continue
        timers[path.name] = (timer_of(path, x, device), path)
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for round_ in range(rounds + 1):
        for name, (timer, _) in timers.items():
            if (found := timer.seconds()) and round_ > 0:
                seconds[name].append(found)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for row in rows:
        if row["path"] in timers:
            row.update(rates(medians[row["path"]], timers[row["path"]][1], x, n, limits))
            row["times_faster_than_bf16"] = medians["bf16 F.linear"] / medians[row["path"]]
    return rows


def rates(seconds: float, path: Contender, x: Tensor, n: int, limits: dict[str, float]) -> dict[str, float]:
    tokens, k = x.shape
    moved = path.weight_bytes + 2 * tokens * (k + n)
    return {
        "median_us": seconds * 1e6,
        "fraction_of_bandwidth": moved / seconds / limits["bytes_per_second"],
        "fraction_of_peak": 2 * tokens * n * k / seconds / limits[f"{path.arithmetic}_per_second"],
    }


def measured_limits(device: str, *, size: int, count: int) -> dict[str, float]:
    """The best that this device reads (a sum) or copies, and multiplies, in bytes and operations a second."""
    data = torch.ones(count, device=device)
    target = torch.empty_like(data)
    left, right = (torch.ones(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    codes = left.to(torch.int8)

    def best(call: Callable[[], object]) -> float:
        timer = Timer([call], device)
        return min(timer.seconds() for _ in range(_ROUNDS))

    operations = 2 * size**3
    return {
        "bytes_per_second": max(4 * count / best(data.sum), 8 * count / best(lambda: target.copy_(data))),
        "bf16_per_second": operations / best(lambda: left @ right.T),
        "int8_per_second": operations / best(lambda: torch._int_mm(codes, codes.T)),  # noqa: SLF001
    }


def table(rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], name: str, form: str) -> str:
        return format(row[name], form) if name in row else "-"

    lines = [("k", "n", "tokens", "path", "us", "x bf16", "of bandwidth", "of peak", "error")]
    lines += [
        (
            str(row["in_features"]),
            str(row["out_features"]),
            str(row["tokens"]),
            row["path"],
            cell(row, "median_us", ".1f"),
            cell(row, "times_faster_than_bf16", ".2f"),
            cell(row, "fraction_of_bandwidth", ".0%"),
            cell(row, "fraction_of_peak", ".0%"),
            cell(row, "error", ".1e"),
        )
        for row in rows
    ]
    return format_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--dry-run", action="store_true", help="small, and on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run does without")
    shapes = ((256, 48),) if args.dry_run else SHAPES
    file = args.json
    if file is None and not args.dry_run:
        file = Path(__file__).parent / "results" / "cuda_kernels.json"
    with torch.inference_mode():
        limits = measured_limits(device, size=64 if args.dry_run else 8192, count=2**12 if args.dry_run else 2**28)
        rows = []
        for (k, n), tokens in itertools.product(shapes, args.tokens):
            rows += measure(k, n, tokens, device, args.rounds, limits)
    print(table(rows))
    if file is not None:
        facts = {"machine": machine(), "limits": limits, "rounds": args.rounds, "dry_run": args.dry_run}
        file.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
