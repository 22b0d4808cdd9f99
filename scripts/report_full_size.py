"""A report with the shape of OpenVLA-7B, to see how large such a page becomes and how fast it opens.

python scripts/report_full_size.py --run DIR --output FILE [--reference DIR --episodes DIR]

The plan is that of the published model at its full size (437 Linears, 32 blocks) and of configs/openvla_w4a16_awq.yaml.
The error of each layer is NOT of that model: it comes from ``--run``, a quantized directory with layers of the same
names, such as one of an eighth of the width that scripts/make_synthetic_checkpoint.py makes. The page says so.
"""

import argparse
from pathlib import Path

from full_size_models import build

from vlaquant.checkpoint import read_manifest
from vlaquant.families import family_of_model
from vlaquant.plan import make_plan
from vlaquant.recipe import load_recipe
from vlaquant.report import measure, render
from vlaquant.report.data import Report, make_report
from vlaquant.report.measured import Measured

_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "openvla_w4a16_awq.yaml"


def full_size_report(run: Path, measured: Measured | None) -> Report:
    """The plan of the full size, with the figures of ``run``.

    Raises:
        AssertionError: its layers are others.
    """
    model, recipe = build("OpenVLA-7B"), load_recipe(_CONFIG)
    plan = make_plan(model, family_of_model(model), recipe)
    small = read_manifest(run)
    assert {record["name"] for record in small["layers"]} == set(plan.quantized), "not layers of the same names"
    manifest = {
        "plan": plan.to_dict(),
        "recipe": recipe.resolved(),
        **{key: small[key] for key in ("layers", "transforms", "versions")},
    }
    origin = (
        f"Plan and bytes: OpenVLA-7B at its published size. Errors, scales, weights and activations: {run.name}, a "
        "smaller model with layers of the same names."
    )
    return make_report("openvla-7b-w4a16", manifest, measured=measured, origin=origin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a quantized directory with layers of the same names")
    parser.add_argument("--reference", type=Path, help="what it was made of")
    parser.add_argument("--episodes", type=Path, help="recorded episodes for it")
    parser.add_argument("--output", type=Path, required=True, help="the page")
    args = parser.parse_args()
    measured = None if args.reference is None else measure(args.run, args.reference, args.episodes)
    report = full_size_report(args.run, measured)
    args.output.write_text(render(report), encoding="utf-8")
    print(f"{args.output}: {len(report.layers)} layers, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
