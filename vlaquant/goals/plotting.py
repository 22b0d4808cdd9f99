"""Pictures of scans and curves. Needs matplotlib."""

from pathlib import Path
from typing import Any

from vlaquant.errors import EvaluationError
from vlaquant.goals.progressive import Curve
from vlaquant.sensitivity import Scan

_MIB = 2**20


def check_plot(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before there is anything to draw.

    Raises:
        EvaluationError: matplotlib is not installed, or writes no such format.
    """
    figure, _ = _figure(1.0, 1.0)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise EvaluationError(f"{path}: cannot be drawn: its name must end in one of .{', .'.join(sorted(known))}")


def plot_scan(scan: Scan, path: Path) -> None:
    """The cost of every candidate along the groups of the model: measured as lines, estimated as dots."""
    figure, axes = _figure(max(8.0, 0.22 * len(scan.groups)), 6.0)
    places = range(len(scan.groups))
    for c, candidate in enumerate(scan.candidates):
        colour = f"C{c}"
        if scan.measured is not None:
            axes.plot(places, [row[c] for row in scan.costs("measured")], color=colour, label=f"{candidate}, measured")
        if scan.estimated is not None:
            values = [row[c] for row in scan.costs("estimated")]
            axes.plot(places, values, "o", color=colour, markersize=4, label=f"{candidate}, estimated")
    axes.set_xticks(places, [group.label for group in scan.groups], rotation=90, fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel(next(iter(scan.measured), "effect") if scan.measured else "estimated effect")
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_curve(curve: Curve, path: Path) -> None:
    """Action error against size."""
    figure, axes = _figure(6.0, 4.0)
    sizes = [step.mixture.bytes / _MIB for step in curve.steps]
    axes.plot(sizes, [step.figures["action_l1"] for step in curve.steps], "-", color="C0")
    for size, step in zip(sizes, curve.steps, strict=True):
        axes.plot(size, step.figures["action_l1"], "x" if step.misses else "o", color="C3" if step.misses else "C0")
        axes.annotate(f"{step.mixture.bits:.2f} bits", (size, step.figures["action_l1"]), fontsize=7)
    axes.set_xlabel("MiB of weights")
    axes.set_ylabel("action L1 on held-out observations")
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("matplotlib is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
