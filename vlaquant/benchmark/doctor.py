"""What this machine has, which kernel would run for the common schemes, and why not a faster one."""

import textwrap
from typing import Any

import torch

from vlaquant.evaluate.machine import machine
from vlaquant.kernels import KERNELS, Query, explain
from vlaquant.scheme import Scheme, get_scheme
from vlaquant.terminal import WIDTH, format_table

_GIB = 2**30
#: n and k of the layer that is asked about: a multiple of everything that a kernel may want.
_FEATURES = 4096
_DTYPES = (torch.float32, torch.bfloat16)


def common_schemes() -> list[Scheme]:
    """The schemes that recipes use most, with names that say the group size."""
    w4a16 = get_scheme("w4a16")
    return [w4a16, w4a16.with_weight(group_size=64), *map(get_scheme, ("w8a16", "w8a8", "w8a8_static", "w4a8"))]


def diagnose() -> dict[str, Any]:
    """Facts of the machine, and for each scheme and dtype of activations the kernel and why those before it cannot.

    Raises:
        VlaquantError: the environment variable that forces a kernel names an unknown one.
    """
    found = machine()
    devices = ["cpu", *(["cuda"] if found["gpus"] else [])]
    rows = [_choice(scheme, dtype, device) for device in devices for scheme in common_schemes() for dtype in _DTYPES]
    return {"machine": found, "kernels": rows, "advice": _advice(found, rows)}


def _choice(scheme: Scheme, dtype: torch.dtype, device: str) -> dict[str, Any]:
    reasons = explain(Query(scheme, _FEATURES, _FEATURES, dtype, device))
    chosen = next(name for name, reason in reasons if reason is None)
    before = reasons[: [name for name, _ in reasons].index(chosen)]
    return {
        "scheme": scheme.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "kernel": chosen,
        "slow": chosen == KERNELS[-1].name,
        "refused": [{"kernel": name, "reason": reason} for name, reason in before],
    }


def _advice(found: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """What can be done about slow rows. What a kernel itself wants is in its reason."""
    forced = found["environment"].get("VLAQUANT_KERNEL")
    if forced:
        return [f"unset VLAQUANT_KERNEL: it forces {forced!r} on every layer"]
    fast = {(row["device"], row["scheme"], row["dtype"]): row["kernel"] for row in rows if not row["slow"]}
    slow: dict[str, list[str]] = {}
    for row in rows:
        if not row["slow"]:
            continue
        others = [key[2] for key in fast if key[:2] == (row["device"], row["scheme"])]
        remedy = "no dtype helps: see above what a faster kernel wants, or choose another scheme"
        if others:
            kernel = fast[row["device"], row["scheme"], others[0]]
            remedy = f"use the model in {others[0]}, where {kernel} runs"
        slow.setdefault(remedy, []).append(_where(row))
    return [f"only the slow reference kernel computes {', '.join(where)}: {remedy}" for remedy, where in slow.items()]


def report(diagnosis: dict[str, Any]) -> str:
    """The diagnosis as text, no line longer than :data:`~vlaquant.terminal.WIDTH`."""
    found = diagnosis["machine"]
    lines = [*_facts(found), "", f"Kernel of a layer of {_FEATURES} x {_FEATURES}, by scheme and dtype of activations"]
    columns = ("device", "scheme", "dtype", "kernel")
    rows = [columns, *(tuple(str(row[column]) for column in columns) for row in diagnosis["kernels"])]
    lines += ["", format_table(rows), "", "Why not a kernel that would be preferred"]
    for (kernel, reason), where in _by_reason(diagnosis["kernels"]).items():
        lines += ["", *_wrapped(f"{kernel}: {reason}"), *_wrapped(", ".join(where), indent="    ")]
    if diagnosis["advice"]:
        lines += ["", "What to do"]
        for advice in diagnosis["advice"]:
            lines += _wrapped(f"- {advice}")
    return "\n".join(lines)


def _facts(found: dict[str, Any]) -> list[str]:
    sets = [f"{name} {'yes' if has else 'no'}" for name, has in found["instruction_sets"].items()]
    installed = [f"{name} {version or '-'}" for name, version in found["versions"].items()]
    facts = [
        ("CPU", f"{found['cpu']} ({found['architecture']}), {found['last_level_cache_bytes'] / 2**20:.0f} MiB cache"),
        ("instructions", ", ".join(sets)),
        ("threads", f"{found['cores']} cores, torch uses {found['torch_threads']} threads"),
        *[
            ("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / _GIB:.0f} GiB")
            for gpu in found["gpus"] or []
        ],
        *([] if found["gpus"] else [("GPU", "none that torch can use (CUDA)")]),
        ("compiler", found["compiler"] or "none found (cc, gcc, clang or $CC)"),
        ("native", found["native_kernels"]),
        ("versions", f"Python {found['python']}, {', '.join(installed)}"),
        ("commit", found["commit"] or "not run from a git checkout"),
    ]
    lines: list[str] = []
    for label, text in facts:
        lines += textwrap.wrap(f"{label:<14}{text}", WIDTH, subsequent_indent=" " * 14)
    return lines


def _by_reason(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """(kernel, why not) -> the rows that it is true of."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for refused in row["refused"]:
            found.setdefault((refused["kernel"], refused["reason"]), []).append(_where(row))
    return found


def _where(row: dict[str, Any]) -> str:
    return f"{row['scheme']} {row['dtype']}" + ("" if row["device"] == "cpu" else f" {row['device']}")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ")
