"""Results of the benchmarks as text, no line longer than 100 columns."""

import textwrap
from typing import Any

from vlaquant.terminal import WIDTH, format_table

_MIB = 2**20


def shapes_table(result: dict[str, Any]) -> str:
    """What ``vlaquant bench --shapes`` prints: a table for each shape and number of tokens, then what is not in it."""
    settings, limits = result["settings"], result["limits"]
    read, fp32, bf16, int8 = (limits[name] for name in list(limits)[:4])
    integers = "no int8 GEMM" if int8 is None else f"best int8 GEMM {int8:.0f} Gop/s"
    lines = [
        f"{_heading(result)}, activations in {settings['dtype']}",
        *_warning(result),
        f"limits seen: read {read:.1f} GB/s, best fp32 GEMM {fp32:.0f} Gop/s, bf16 {bf16:.0f} Gop/s, {integers}",
    ]
    columns = ("scheme", "path", "ms", "x fp32", "x bf16", "x prepack", "x peer", "error", "limit")
    for shape in settings["shapes"]:
        for tokens in settings["tokens"]:
            rows = [row for row in result["rows"] if (row["shape"], row["tokens"]) == (shape, tokens)]
            lines += ["", f"{shape}, {tokens} tokens", format_table([columns, *map(_shape_row, rows)])]
    lines += _absences(result)
    return "\n".join(lines)


def _shape_row(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("x_fp32", "x_bf16", "x_prepacked", "x_best_peer")
    ratios = ("-" if row[name] is None else f"{row[name]:.2f}" for name in names)
    return (
        row["scheme"] or "float",
        row["path"][:36],
        f"{row['median_ms']:.3f}",
        *ratios,
        f"{row['error']:.0e}",
        f"{row['fraction_of_limit']:.0%}",
    )


def _absences(result: dict[str, Any]) -> list[str]:
    """What was not timed, or is not what its name says."""
    told = [
        f"left out: {one['path']} for {one['scheme'] or 'float'} {one['shape']}, {one['tokens']} tokens: "
        + one["reason"]
        for one in result["left_out"]
    ]
    exact = {
        (row["path"], row["scheme"])
        for row in result["rows"]
        if not row["rounds_activations"] and "a8" in row["scheme"]
    }
    told += [f"{path} for {scheme}: its result shows no rounding of activations" for path, scheme in sorted(exact)]
    told += [f"peer {package}: {reason}" for package, reason in result["peers_missing"].items()]
    lines = [line for one in told for line in textwrap.wrap(one, WIDTH, subsequent_indent="    ")]
    return ["", *lines] if lines else []


def action_table(result: dict[str, Any]) -> str:
    """What ``vlaquant bench DIR`` prints: one action of each version, whole and by part, in medians."""
    versions = list(result["versions"])
    lines = [_heading(result), *_warning(result), result["settings"]["observed"], ""]
    table: list[tuple[str, ...]] = [("milliseconds (median)", *versions)]
    of = result["versions"]
    table.append(("whole action", *(f"{of[name]['median_ms']:.2f}" for name in versions)))
    table.append(("95th percentile", *(f"{of[name]['p95_ms']:.2f}" for name in versions)))
    for part in dict.fromkeys(part for name in versions for part in of[name]["parts"]):
        cells = []
        for name in versions:
            found = of[name]["parts"].get(part)
            cells.append("-" if found is None else f"{found['median_ms']:.2f}")
        table.append((_part_label(part, of[versions[0]]["parts"].get(part)), *cells))
    table.append(("MiB in memory", *(f"{of[name]['resident_bytes'] / _MIB:.1f}" for name in versions)))
    lines.append(format_table(table))
    lines += ["", *(f"{one['times']:.2f}x: {one['of']} against {one['against']}" for one in result["ratios"])]
    return "\n".join(lines).rstrip()


def _heading(result: dict[str, Any]) -> str:
    settings = result["settings"]
    threads = f"{settings['threads']} thread" + ("s" if settings["threads"] > 1 else "")
    return f"{result['machine']['cpu']}, {threads}, {settings['clock']} time, {settings['rounds']} rounds"


def _warning(result: dict[str, Any]) -> list[str]:
    """Of other work on the machine when the measurement began."""
    load, cores = result["machine"]["load_average"], result["machine"]["cores"]
    if load is None or load + result["settings"]["threads"] <= cores:
        return []
    told = f"WARNING: this machine was busy (load {load:.1f}, {cores} cores): measure again when it is quiet"
    return textwrap.wrap(told, WIDTH)


def _part_label(part: str, found: dict[str, Any] | None) -> str:
    calls = 1.0 if found is None else found["calls"]
    return f"  {part}" if calls <= 1 else f"  {part} ({calls:g} calls)"
