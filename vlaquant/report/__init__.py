"""Results → one HTML file that explains them, and the charts in it.

    inside = measure(Path("build/demo-w4a16"), Path("examples/demo_policy"), Path("examples/demo_episodes"))
    report = read_report("build/demo-w4a16", evaluation="build/demo-w4a16.eval.json", measured=inside)
    bytes_by_part(report.parts)                      # a notebook shows each of these charts
    layer_errors(report.layers)
    weight_histogram(inside.weights[0])              # of the layer with the largest error
    outlier_map(inside.outliers)
    action_trace(inside.trace)
    action_errors(report.evaluation)
    bytes_by_part(bytes_of(vlaquant.plan("examples/demo_policy", "recipe.yaml")))  # before there is any output
    Path("errors.svg").write_text(layer_errors(report.layers).svg())
    Path("report.html").write_text(render(report))

``data`` reads what other commands wrote, ``measuring`` looks into both models, and everything else draws. Drawing needs
no model and no network.
"""

from vlaquant.report.chart import Chart, Table
from vlaquant.report.charts_actions import action_errors, action_trace, latency_parts, success_rates
from vlaquant.report.charts_layers import bytes_by_part, layer_errors
from vlaquant.report.charts_models import pareto
from vlaquant.report.charts_weights import outlier_map, weight_histogram
from vlaquant.report.data import Report, bytes_of, read_report
from vlaquant.report.measured import Measured
from vlaquant.report.measuring import measure
from vlaquant.report.page import render, render_comparison

__all__ = [
    "Chart",
    "Measured",
    "Report",
    "Table",
    "action_errors",
    "action_trace",
    "bytes_by_part",
    "bytes_of",
    "latency_parts",
    "layer_errors",
    "measure",
    "outlier_map",
    "pareto",
    "read_report",
    "render",
    "render_comparison",
    "success_rates",
    "weight_histogram",
]
