"""Draw docs/images/*.svg: what docs/concepts.md explains, on the shipped policy, and results of bench/results.

python scripts/make_figures.py [--only NAME …] [--output DIR]

Each file holds the numbers that were drawn (in its metadata) and the colours for light and for dark pages.
"""

import argparse
import io
import json
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from figure_numbers import FIGURES, GROUPS, Numbers, measure, rounded
from figure_results import FROM_FILES
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"

#: Stand-ins that become colours of the page; the others are readable on both (tests/test_figures.py).
INK, PAPER = "#0a0b0c", "#f0e0d1"
LIGHT, DARK = {"ink": "#1f2328", "paper": "#ffffff"}, {"ink": "#e6edf3", "paper": "#0d1117"}
BLUE, ORANGE, GREEN, RED, GREY = "#3b82f6", "#d97706", "#059669", "#e5484d", "#848d97"

_STYLE = (
    f"svg{{color:{LIGHT['ink']};--paper:{LIGHT['paper']}}}"
    f"@media (prefers-color-scheme:dark){{svg{{color:{DARK['ink']};--paper:{DARK['paper']}}}}}"
)
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlaquant",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "lines.linewidth": 1.8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def grid(drawn: Numbers) -> Figure:
    figure, axes = _panels(2, sharey=True)
    values = drawn["values"]
    for ax, name in zip(axes, ("symmetric", "asymmetric"), strict=True):
        rounded, numbers = drawn[name]["rounded"], drawn["summary"]
        for level in drawn[name]["levels"]:
            ax.axhline(level, color=GREY, linewidth=0.6)
        ax.vlines(range(len(values)), values, rounded, color=RED, linewidth=1.2)
        ax.plot(values, "o", color=BLUE, markersize=3)
        scale, zero = numbers[f"{name} scale"], numbers[f"{name} zero"]
        ax.set_title(f"{name}: S = {scale:.4f}, Z = {zero}")
        ax.set_xlabel("the 64 weights of one group, sorted")
    axes[0].set_ylabel("weight, and its 16 codes as lines")
    axes[0].set_ylim(min(drawn["symmetric"]["levels"]) * 1.05, max(values) * 1.1)
    return figure


def granularity(drawn: Numbers) -> Figure:
    figure, (left, right) = _panels(2)
    for bits, colour, marker in ((2, RED, "s"), (3, ORANGE, "^"), (4, BLUE, "o"), (8, GREEN, "D")):
        left.plot(*zip(*drawn[f"{bits} bits"], strict=True), marker=marker, color=colour, label=f"{bits} bits")
    right.plot(*zip(*drawn["4 bits"], strict=True), marker="o", color=BLUE)
    for (x, y), group in zip(drawn["4 bits"], GROUPS, strict=True):
        name = f"groups of {group}" if isinstance(group, int) else f"one scale per {group}"
        right.annotate(name, (x, y), (4, 6), textcoords="offset points", fontsize=9, rotation=25)
    right.set(xlim=(3.98, 4.72), ylim=(0, 0.09), title="4 bits alone")
    left.set_yscale("log")
    left.set_ylabel("squared error, share of the weights'")
    for ax in (left, right):
        ax.set_xlabel("bits for a weight, its share of the scales included")
    left.legend()
    return figure


def outliers(drawn: Numbers) -> Figure:
    figure, axes = _panels(2)
    for ax, what in zip(axes, ("input", "weight"), strict=True):
        for when, colour in (("before", ORANGE), ("after", BLUE)):
            values = drawn[f"{what} {when}"]
            ax.plot(values, color=colour, linewidth=1, label=f"{when} SmoothQuant")
        ax.set_xlabel("input channel")
        ax.set_ylim(bottom=0)
    axes[0].set_title("largest activation of each channel")
    axes[1].set_title("largest weight of each column")
    axes[0].legend()
    return figure


def tokens(drawn: Numbers) -> Figure:
    figure, (ax,) = _panels(1)
    for kind, colour in (("text", ORANGE), ("image", BLUE), ("action", GREEN)):
        places = [place for place, one in enumerate(drawn["kinds"]) if one == kind]
        ax.bar(places, [drawn["peaks"][place] for place in places], color=colour, label=kind)
    ax.axhline(drawn["static"], color=RED)
    ax.annotate("the static range reaches up to here", (0.02, 0.88), xycoords="axes fraction", fontsize=9)
    ax.set_xlabel("token of one observation")
    ax.set_ylabel("largest |x| of the token")
    ax.legend(loc="upper center")
    return figure


def awq(drawn: Numbers) -> Figure:
    figure, axes = _panels(2)
    for ax, fold in zip(axes, ("most", "least"), strict=True):
        ratios, errors = zip(*drawn[fold], strict=True)
        best = min(range(len(errors)), key=errors.__getitem__)
        ax.plot(ratios, [100 * error for error in errors], "o-", color=BLUE, markersize=4)
        ax.plot(ratios[best], 100 * errors[best], "o", color=GREEN, markersize=9, label="the one that is taken")
        ax.axhline(100 * errors[0], color=GREY, linestyle="--", linewidth=1.2, label="no scale")
        ax.set_title(f"the fold in which it helps {fold}")
        ax.set_xlabel("exponent of the scale")
        ax.set_ylim(0, 250 * errors[0])
    axes[0].set_ylabel("output error, %")
    axes[0].legend()
    return figure


def rounding(drawn: Numbers) -> Figure:
    figure, axes = _panels(2)
    for ax, what in zip(axes, ("weight", "output"), strict=True):
        for method, colour, marker in (("nearest", ORANGE, "o"), ("gptq", BLUE, "D")):
            errors = [100 * error for error in drawn[method][what]]
            ax.plot(errors, marker, color=colour, markersize=5, label={"nearest": "to nearest", "gptq": "GPTQ"}[method])
        ax.set_title(f"squared error of the {what}, %")
        ax.set_xlabel("Linear of the language model")
        ax.set_xticks(range(0, len(errors), 5))
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[0].legend()
    return figure


def results(drawn: Numbers) -> Figure:
    figure, (left, right) = _panels(2)
    for row in drawn["rows"]:
        colour = next((one for word, one in _METHODS.items() if word in row["name"]), GREY)
        left.plot(row["MiB"], row["L1"], "o", color=colour, markersize=7)
        offset = _LABELS.get(row["name"], (8, -3))
        align = "right" if offset[0] < 0 else "left"
        left.annotate(row["name"], (row["MiB"], row["L1"]), offset, textcoords="offset points", fontsize=8, ha=align)
    left.axvline(drawn["float MiB"], color=GREY, linestyle="--", linewidth=1.2)
    left.annotate("float", (drawn["float MiB"], 0.03), (-30, 0), textcoords="offset points", fontsize=9)
    left.set(yscale="log", xlim=(0, drawn["float MiB"] * 1.06), ylim=(8e-4, 1))
    left.set_title("mean change of an action, against MiB")
    driven = [row for row in drawn["rows"] if row["success"]]
    driven = [{"name": "float", "success": drawn["float success"]}, *driven]
    for place, row in enumerate(reversed(driven)):
        rate, low, high = (100 * share for share in row["success"])
        colour = next((one for word, one in _METHODS.items() if word in row["name"]), GREY)
        right.plot([low, high], [place, place], color=colour)
        right.plot(rate, place, "o", color=colour, markersize=7)
    right.set_yticks(range(len(driven)), [row["name"] for row in reversed(driven)])
    right.set_xlim(0, 101)
    right.set_title("success in 150 episodes, %")
    return figure


def scaling(drawn: Numbers) -> Figure:
    figure, panels = plt.subplots(2, len(drawn["axes"]), figsize=(9, 4.6), layout="constrained")
    for column, (axis, points) in enumerate(drawn["axes"].items()):
        panels[0][column].plot(points["values"], points["seconds"], "o-", color=BLUE)
        panels[1][column].plot(points["values"], points["MiB"], "o-", color=ORANGE, label="calibration")
        panels[1][column].plot(
            points["values"], points["MiB with verification"], "o--", color=GREY, label="with verification"
        )
        for ax in panels[:, column]:
            ax.set(xscale="log", ylim=(0, None), xticks=points["values"])
            ax.set_xticklabels(points["values"])
            ax.minorticks_off()
        panels[0][column].set_title(axis)
    panels[0][0].set_ylabel("seconds")
    panels[1][0].set_ylabel("memory above import, MiB")
    panels[1][0].legend()
    return figure


def samples(drawn: Numbers) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for (name, points), colour, style in zip(
        drawn["lines"].items(), (BLUE, GREEN, GREY, ORANGE), ("o-", "s-", "o--", "s--"), strict=True
    ):
        counts = [int(count) for count in points]
        means = [sum(seeds) / len(seeds) for seeds in points.values()]
        ax.plot(counts, means, style, color=colour, label=f"{name} weights")
        for count, seeds in zip(counts, points.values(), strict=True):
            ax.plot([count] * len(seeds), seeds, ".", color=colour, alpha=0.5)
    ax.set(xscale="log", yscale="log", xticks=counts, xlabel="calibration samples", ylabel="divergence, nats a token")
    ax.set_xticklabels(counts)
    ax.set_yticks([0.0005, 0.001, 0.002, 0.004], ["0.0005", "0.001", "0.002", "0.004"])
    ax.minorticks_off()
    ax.legend()
    return figure


def success(drawn: Numbers) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    kinds = {"rtn": (RED, "rounding"), "weighted": (GREEN, "GPTQ, weighted"), "gptq": (BLUE, "GPTQ")}
    named = set()
    for row in drawn["rows"]:
        colour, kind = next((one for word, one in kinds.items() if word in row["name"]), (GREY, "float"))
        rate, low, high = (100 * share for share in row["success"])
        # Methods of one size side by side
        place = row["MiB"] * {GREEN: 1.012, RED: 0.988}.get(colour, 1.0)
        label = None if kind in named else kind
        ax.errorbar(place, rate, [[rate - low], [high - rate]], fmt="o", color=colour, label=label, linewidth=1.2)
        named.add(kind)
    ax.set(
        xscale="log", xticks=(2, 3, 4, 6, 8), xlabel="MiB of weights", ylabel="success in episodes, %", ylim=(60, 101)
    )
    ax.set_xticklabels((2, 3, 4, 6, 8))
    ax.minorticks_off()
    ax.legend(loc="lower right")
    return figure


_METHODS = {"GPTQ": BLUE, "AWQ": GREEN, "SmoothQuant": ORANGE, "rounding": RED}


def _panels(count: int, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(9, 3.6), layout="constrained", squeeze=False, **options)
    return figure, axes[0]


#: Where names would lie on each other: how many points beside the dot they begin, or end.
_LABELS = {"W4 rounding": (8, 3), "W4 AWQ": (8, -6), "W3 GPTQ": (-8, -3), "W4 GPTQ": (8, -7)}

#: Figure -> (how it is drawn, its title for who cannot see it).
DRAWN: dict[str, tuple[Callable[[Numbers], Figure], str]] = {
    "grid": (grid, "The 64 weights of one group and the grids of 4 bits, symmetric and asymmetric"),
    "granularity": (granularity, "Error of weights against bits, for five granularities"),
    "outliers": (outliers, "Largest activation and weight of each channel, before and after SmoothQuant"),
    "tokens": (tokens, "Largest value of each token of one observation, and a static range"),
    "awq": (awq, "Output error against the exponent of AWQ's scale"),
    "rounding": (rounding, "Error of weights and of outputs, rounded to nearest and with GPTQ"),
    "results": (results, "Change of actions against size, and success in simulated episodes, by recipe"),
    "scaling": (scaling, "Seconds and memory of a GPTQ run against samples, length, layers and width"),
    "samples": (
        samples,
        "Divergence of actions at W3 against samples of calibration, by their kind and by token weights",
    ),
    "success": (success, "Success in simulated episodes against MiB of weights, by method"),
}


def themed(svg: str, title: str, numbers: Numbers) -> str:
    """The drawing with the page's colours, a title, and the numbers that were drawn."""
    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = f"<title>{escape(title)}</title><style>{_STYLE}</style><metadata>{escape(json.dumps(numbers))}</metadata>"
    end = svg.index(">") + 1
    svg = svg[: end - 1] + ' role="img">' + head + svg[end:]
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def draw(name: str, numbers: Numbers) -> str:
    """One figure as the text of an SVG file."""
    drawing, title = DRAWN[name]
    with plt.rc_context(_RC):
        figure = drawing(numbers)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return themed(file.getvalue(), title, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=DRAWN, default=list(DRAWN), metavar="NAME", help="only these")
    parser.add_argument("--output", type=Path, default=IMAGES)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    measured = measure() if set(args.only) - set(FROM_FILES) else None
    for name in args.only:
        numbers = FIGURES[name](measured) if measured and name in FIGURES else FROM_FILES[name]()
        (args.output / f"{name}.svg").write_text(draw(name, rounded(numbers)), encoding="utf-8")
        print(f"{name}: {json.dumps(rounded(numbers)['summary'])}")


if __name__ == "__main__":
    main()
