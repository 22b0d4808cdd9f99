"""A Markdown table of every family × every scheme: tiny random models, each verified in a fresh process.

    python scripts/family_table.py [PART OF A NAME ...]

For each: how many Linears were quantized, kept float and why, and are dead (no output depends on them); the bytes that
no rule is about; and how far the output is from the float one.
"""

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny_families import SCHEMES, TINY, Outcome, quantized
from transformers.utils import logging

_HEADING = ("family", "scheme", "quantized", "kept float", "dead", "bytes", "not covered", "error", "another process")
_SHORT = {"equal bit for bit": "equal"}


def row(name: str, scheme: str, outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    plan = outcome.plan
    kept = Counter(_short(layer.reason) for layer in plan.layers if layer.scheme is None)
    left = sum(other.bytes for other in plan.others)
    return (
        name,
        scheme,
        str(len(plan.quantized)),
        "; ".join(f"{count} {reason}" for reason, count in kept.items()) or "none",
        str(sum(layer.dead for layer in plan.layers)),
        f"{plan.bytes_before:,} → {plan.bytes_after:,}",
        f"{left:,}",
        f"{outcome.error:.2%}",
        f"{_SHORT.get(outcome.verified, outcome.verified)}; {'as in memory' if outcome.same else 'NOT as in memory'}",
    )


def _short(reason: str) -> str:
    """What several layers have in common: without names of modules and numbers."""
    return re.sub(r"\s*\(.*\)|[:;,].*", "", re.sub(r"\S+\.\S+", "…", reason))


def main() -> None:
    """Print the table for the names that hold one of the arguments."""
    logging.disable_progress_bar()
    wanted = [name for name in TINY if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    rows: list[tuple[str, ...]] = [_HEADING]
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            directory = TINY[name].save(Path(folder, "float"), patch)
            for scheme in SCHEMES:
                rows.append(row(name, scheme, quantized(name, scheme, directory, Path(folder, scheme))))
                print(f"{name}, {scheme}", file=sys.stderr)
    rows.insert(1, ("---",) * len(_HEADING))
    print("\n".join(f"| {' | '.join(one)} |" for one in rows))


if __name__ == "__main__":
    main()
