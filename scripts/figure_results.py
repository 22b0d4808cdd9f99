"""What the figures show that are drawn from files of results."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "bench" / "results"
#: name -> {what: number or list of numbers}; of ``summary`` the pages quote.
Numbers = dict[str, Any]

#: Rows of the results that are drawn, by their keys in the file.
ROWS = {
    "w4 rtn": "W4 rounding",
    "w4 awq": "W4 AWQ",
    "w4 gptq": "W4 GPTQ",
    "w3 gptq": "W3 GPTQ",
    "w8a8 smoothquant": "W8A8 SmoothQuant",
    "w2 rtn": "W2 rounding",
    "w2 gptq": "W2 GPTQ",
    "w2 tensor rtn": "W2 rounding, one scale",
}


def results() -> Numbers:
    """What ``bench/results/demo_recipes.json`` says of the rows that are drawn."""
    found = json.loads((RESULTS / "demo_recipes.json").read_text(encoding="utf-8"))
    rows = []
    for key, name in ROWS.items():
        one = found[key]
        success = _success(one["rollouts"]["candidate"]) if one["rollouts"] else None
        rows.append(
            {
                "name": name,
                "MiB": one["bytes"]["disk"] / 2**20,
                "L1": one["actions"]["mean_l1"],
                "success": success,
            }
        )
    one = found["w4 gptq"]
    size = one["bytes"]["reference_disk"] / 2**20
    return {"rows": rows, "float MiB": size, "float success": _success(one["rollouts"]["reference"]), "summary": {}}


def scaling() -> Numbers:
    """What ``bench/results/scaling.json`` says: axis -> its values, with the seconds and the MiB of each."""
    axes = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))["axes"]
    drawn = {
        axis: {
            "values": [point[axis] for point in points],
            "seconds": [point["seconds"] for point in points],
            "MiB": [point["calibration_mib"] for point in points],
            "MiB with verification": [point["with_verification_mib"] for point in points],
        }
        for axis, points in axes.items()
    }
    return {"axes": drawn, "summary": {}}


def samples() -> Numbers:
    """What ``bench/results/action_calibration.json`` says: kind and weights -> number of samples -> divergences."""
    lines: dict[str, dict[str, list[float]]] = {}
    for name, row in json.loads((RESULTS / "action_calibration.json").read_text(encoding="utf-8"))["samples"].items():
        _, weights, kind, count = name.split(", ")
        lines.setdefault(f"{kind}, {weights}", {})[count] = row["divergence"]["seeds"]
    return {"lines": lines, "summary": {}}


def success() -> Numbers:
    """What ``bench/results/closed_loop.json`` says: size, success and its interval, by setting."""
    found = json.loads((RESULTS / "closed_loop.json").read_text(encoding="utf-8"))["rows"]
    rows = [
        {"name": name, "MiB": row["mib"], "success": [row["success"], row["low"], row["high"]]}
        for name, row in found.items()
    ]
    return {"rows": rows, "summary": {}}


def _success(rollouts: dict[str, Any]) -> list[float]:
    return [rollouts["all"][key] for key in ("rate", "low", "high")]


#: Figures that are drawn from files of results.
FROM_FILES = {"results": results, "scaling": scaling, "samples": samples, "success": success}
