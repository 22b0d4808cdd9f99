"""What a measurement was made on: CPU and its instruction sets, GPUs, threads, versions, commit."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vlaquant.kernels.native.library import find_library

#: Instruction set -> names that an operating system has for it; all of one alternative must be there.
_INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "AVX2": (("avx2",),),
    "AVX-512": (("avx512f", "avx512bw"), ("avx512_f", "avx512_bw")),
    "VNNI": (("avx512_vnni",), ("avx512vnni",), ("avx_vnni",)),
    "AVX512_BF16": (("avx512_bf16",),),
    "AMX": (("amx_int8", "amx_bf16"),),
    "NEON dot product": (("asimddp",), ("hw.optional.arm.feat_dotprod",)),
}
_X86 = ("AVX2", "AVX-512", "VNNI", "AVX512_BF16", "AMX")
_ARM = ("NEON dot product",)

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 32 * 2**20
_PACKAGES = ("vlaquant", "torch", "transformers", "triton", "torchao", "onnxruntime", "openvino", "auto-round-lib")
_VARIABLES = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "VLAQUANT_KERNEL", "VLAQUANT_ISA")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def machine() -> dict[str, Any]:
    """All facts of this machine that a measurement may depend on, as plain values."""
    flags = cpu_flags()
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "instruction_sets": instruction_sets(flags, platform.machine()),
        "cpu_flags": " ".join(sorted(flags)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "last_level_cache_bytes": last_level_cache(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus(),
        "compiler": compiler(),
        "native_kernels": native_kernels(),
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
        "commit": commit(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def cpu_model() -> str:
    """As the system calls it."""
    if _CPUINFO.is_file():
        for field in ("model name", "Model", "Hardware"):
            found = re.search(rf"^{field}\s*:\s*(.+)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
            if found is not None:
                return found.group(1).strip()
    return platform.processor() or "unknown"


def cpu_flags() -> set[str]:
    """Names of the CPU's features in small letters: Linux' own, on other systems those that torch knows."""
    if _CPUINFO.is_file():
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            return set(found.group(1).lower().split())
    if platform.system() == "Darwin":
        lines = (_output_of(["sysctl", "hw.optional.arm"]) or "").lower().splitlines()
        return {line.split(":")[0] for line in lines if line.endswith(": 1")}
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    return set()


def instruction_sets(flags: Iterable[str], architecture: str) -> dict[str, bool]:
    """Which of the instruction sets that matter to kernels are there, of those that the architecture can have."""
    flags = set(flags)
    names = _ARM if architecture.lower() in {"aarch64", "arm64"} else _X86
    return {name: any(flags.issuperset(wanted) for wanted in _INSTRUCTION_SETS[name]) for name in names}


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core can use; 32 MiB where the system does not say."""
    sizes = [(path / "size").read_text(encoding="utf-8").strip() for path in _CACHES.glob("index*")]
    found = [re.fullmatch(r"(\d+)([KMG]?)", size) for size in sizes]
    return max((int(one[1]) * _UNITS[one[2]] for one in found if one is not None), default=_UNKNOWN_CACHE)


def gpus() -> list[dict[str, Any]]:
    """CUDA devices."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": one.name, "capability": f"{one.major}.{one.minor}", "memory_bytes": one.total_memory}
        for one in properties
    ]


def native_kernels() -> str:
    """The instruction set that they use and whose threads, or why there are none."""
    found = find_library()
    if isinstance(found, str):
        return found
    threads = "torch's threads" if found.threads else "one thread: no OpenMP runtime with GOMP_parallel is loaded"
    return f"{found.instruction_set}, {threads}"


def compiler() -> str | None:
    """First line of what the C compiler says of itself (``$CC``, else cc, gcc or clang); None if there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        said = None if path is None else _output_of([path, "--version"])
        if said:
            return said.splitlines()[0]
    return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Package -> installed version, None if it is not."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Commit of the checkout that this code runs from, with ``-dirty`` if it has changes; None if it is in none."""
    here = Path(__file__).resolve()
    if _output_of(["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name]) is None:
        return None
    head = _output_of(["git", "-C", str(here.parent), "rev-parse", "HEAD"])
    changes = _output_of(["git", "-C", str(here.parent), "status", "--porcelain"])
    return None if head is None else head.strip() + ("-dirty" if changes else "")


def _output_of(command: list[str]) -> str | None:
    """What a command prints; None if there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
