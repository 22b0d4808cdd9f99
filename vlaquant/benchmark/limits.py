"""What this machine can do at best, measured: bytes read a second, and operations a second by number format.

A limit is the best of several ways to ask for it, each repeated; it is what was seen, not what a data sheet promises.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlaquant.evaluate.timing import CLOCKS, synchronize

#: Rows, columns and depth of the products; large enough that reading the matrices is a small part.
_GEMM = 2048
_REPEATS = 5
#: Some CPUs have only naive loops for some formats: what takes so many times as long as float32 is left at that.
_TRIAL = 256
_TOO_SLOW = 10
#: Bytes that are read, as a multiple of the last-level cache.
_READ = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """The best seen.

    Attributes:
        read_gb_per_s: bytes of memory, beyond the caches.
        fp32_gop_per_s: multiplications and additions of a float32 product.
        bf16_gop_per_s: of a bfloat16 product; 0 if that is hopelessly slow here.
        int8_gop_per_s: of a product of int8 codes, summed as int32; None if torch has none that is worth measuring.
        seen_in: figure -> the operation that reached it.
    """

    read_gb_per_s: float
    fp32_gop_per_s: float
    bf16_gop_per_s: float
    int8_gop_per_s: float | None
    seen_in: dict[str, str]

    def least_seconds(self, bytes_read: int, operations: int, arithmetic: str) -> float:
        """Time that no path can undercut that reads and computes so much: the longer of the two.

        Args:
            bytes_read: from memory.
            operations: multiplications and additions.
            arithmetic: ``fp32``, ``bf16`` or ``int8``; the next wider one counts where a format is not known or slower.
        """
        best = self.fp32_gop_per_s
        if arithmetic != "fp32":
            best = max(best, self.bf16_gop_per_s)
        if arithmetic == "int8":
            best = max(best, self.int8_gop_per_s or 0.0)
        return max(bytes_read / (1e9 * self.read_gb_per_s), operations / (1e9 * best))


def measure_limits(
    device: str, cache_bytes: int, clock: str = "wall", *, size: int = _GEMM, repeats: int = _REPEATS
) -> Limits:
    """Measure with the threads that torch has now; takes seconds.

    Args:
        device: ``cpu`` or ``cuda``.
        cache_bytes: of the last-level cache; so that reads miss it, many times as much is read.
        clock: key of :data:`~vlaquant.evaluate.timing.CLOCKS`.
        size: rows, columns and depth of the matrix products.
        repeats: of each operation.
    """
    reads, read_bytes = _reads(device, cache_bytes)
    found = {"read": _best(reads, device, clock, repeats)}
    operations = 2 * size**3
    trial = _products(device, min(size, _TRIAL))
    patience = _TOO_SLOW * _best(trial["fp32"], device, clock, repeats)[1]
    for name, products in _products(device, size).items():
        quick = products
        if name != "fp32":
            slow = {way for way, run in trial[name].items() if _best({way: run}, device, clock, repeats)[1] > patience}
            quick = {way: run for way, run in products.items() if way not in slow}
        if quick:
            found[name] = _best(quick, device, clock, repeats)
    speed = {
        name: (read_bytes if name == "read" else operations) / seconds / 1e9 for name, (_, seconds) in found.items()
    }
    return Limits(
        speed["read"],
        speed["fp32"],
        speed.get("bf16", 0.0),
        speed.get("int8"),
        {name: operation for name, (operation, _) in found.items()},
    )


def best_of(first: Limits, second: Limits) -> Limits:
    """The better figure of two measurements, each."""
    figures = {"read": "read_gb_per_s", "fp32": "fp32_gop_per_s", "bf16": "bf16_gop_per_s", "int8": "int8_gop_per_s"}
    better = {
        name: max(first, second, key=lambda limits, field=field: getattr(limits, field) or 0.0)  # type: ignore[misc]
        for name, field in figures.items()
    }
    return Limits(
        **{field: getattr(better[name], field) for name, field in figures.items()},
        seen_in={name: limits.seen_in[name] for name, limits in better.items() if name in limits.seen_in},
    )


def _best(ways: dict[str, Callable[[], Any]], device: str, clock: str, repeats: int) -> tuple[str, float]:
    """The fastest way, and its least seconds."""
    least: dict[str, float] = {}
    for name, way in ways.items():
        way()
        for _ in range(repeats):
            synchronize(device)
            started = CLOCKS[clock]()
            way()
            synchronize(device)
            least[name] = min(least.get(name, float("inf")), CLOCKS[clock]() - started)
    fastest = min(least, key=least.__getitem__)
    return fastest, least[fastest]


def _reads(device: str, cache_bytes: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """Operations that read a large buffer once and write next to nothing, and its bytes."""
    columns = 4096
    rows = max(_READ * cache_bytes // (4 * columns), 1)
    matrix = torch.ones(rows, columns, device=device)
    flat, vector = matrix.flatten(), torch.ones(columns, device=device)
    half = flat.numel() // 2
    # Each reads all of the buffer; which is fastest differs between machines
    ways: dict[str, Callable[[], Any]] = {
        "sum": flat.sum,
        "dot product": lambda: torch.dot(flat[:half], flat[half : 2 * half]),
        "matrix times vector": lambda: torch.mv(matrix, vector),
    }
    return ways, matrix.numel() * matrix.element_size()


def _products(device: str, size: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Number format -> ways to multiply two square matrices."""
    x = torch.randn(size, size, device=device)
    narrow = x.bfloat16()
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "fp32": {"F.linear": lambda: functional.linear(x, x)},
        "bf16": {"F.linear": lambda: functional.linear(narrow, narrow)},
    }
    prepacked = prepacked_fp32(x, size)
    if device == "cpu" and prepacked is not None:
        ways["fp32"]["mkl prepacked"] = lambda: prepacked(x)
    integers = _integer_products(device, size)
    if integers:
        ways["int8"] = integers
    return ways


def _integer_products(device: str, size: int) -> dict[str, Callable[[], Any]]:
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    ways: dict[str, Callable[[], Any]] = {"_int_mm": lambda: torch._int_mm(codes, codes.t())}  # noqa: SLF001
    if device == "cpu" and torch.backends.mkldnn.is_available():
        ways["oneDNN qlinear"] = _qlinear(codes, size)
    works = {}
    for name, way in ways.items():
        try:
            way()
        except RuntimeError:  # not in this build, or not for this device
            continue
        works[name] = way
    return works


def _qlinear(codes: Tensor, size: int) -> Callable[[], Any]:
    unsigned, zero = codes.view(torch.uint8) ^ 128, torch.zeros(size, dtype=torch.int32)
    one, shift = torch.ones(1), torch.full((1,), 128, dtype=torch.int32)
    packed, scale = torch.ops.onednn.qlinear_prepack(codes, None), torch.ones(size)
    linear = torch.ops.onednn.qlinear_pointwise.tensor
    return lambda: linear(unsigned, one, shift, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")


def prepacked_fp32(weight: Tensor, tokens: int) -> Callable[[Tensor], Tensor] | None:
    """``x @ W.T`` with a weight [n, k] that MKL laid out beforehand for x [tokens, k]; None without MKL."""
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkl, "_mkl_linear"):
        return None
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)  # noqa: SLF001 - no public name
    linear = torch.ops.mkl._mkl_linear  # noqa: SLF001
    return lambda x: linear(x, packed, weight, None, tokens)
