"""Plans for policies at their published sizes, without their weights: what is covered, what is not, and how many bytes.

python scripts/plan_full_size.py [MODEL …] [--json FILE] [--written DIRECTORY] [--write DIRECTORY]

Every parameter is in the plan, which is checked. Sizes are those of bfloat16 weights. ``--written`` is a directory that
``configs/openvla_small.yaml`` made of an OpenVLA-7B; its weight files are compared with the prediction. ``--write``
gives models of transformers' classes random weights, quantizes them in memory into folders there, and compares those.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from full_size_models import MODELS, build
from torch import nn
from transformers import PreTrainedModel

import vlaquant
from vlaquant.checkpoint import read_manifest, weight_files
from vlaquant.families import family_of_model
from vlaquant.plan import Plan, make_plan
from vlaquant.recipe import load_recipe

_SMALL = Path(__file__).resolve().parent.parent / "configs" / "openvla_small.yaml"


def _rules(four: str, eight: str, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """Parts in four bits, parts in eight, and rules of another kind."""
    return [
        *({"part": part, "scheme": "w4a16"} for part in four.split()),
        *({"part": part, "scheme": "w8a16"} for part in eight.split()),
        *more,
    ]


_WORDS = {"part": "language", "modules": "embedding", "scheme": "w8a16"}

#: Four bits where most weights are, eight for what sees and for embeddings; states and actions stay float.
RECIPES: dict[str, Any] = {
    "OpenVLA-7B": _SMALL,
    "OpenVLA-OFT": _SMALL,
    "π0": {
        "rules": _rules("language expert", "vision projector", _WORDS, {**_WORDS, "part": "expert"}),
    },
    "π0.5": {"rules": _rules("language expert", "vision projector", _WORDS)},
    "SmolVLA": {"rules": _rules("language expert", "vision projector", _WORDS), "on_indivisible": "nearest"},
    "GR00T N1.7": {
        "rules": _rules(
            "language expert",
            "vision fusion",
            _WORDS,
            {"part": "action", "modules": "bank", "embodiment": 0, "scheme": "float"},
        ),
    },
}


def plan_of(name: str) -> tuple[nn.Module, Plan]:
    """The model and its plan.

    Raises:
        AssertionError: a parameter is missing in the plan, or there twice.
    """
    model, recipe = build(name), load_recipe(RECIPES[name])
    plan = make_plan(model, family_of_model(model), recipe)
    listed = [*(layer.name for layer in plan.layers), *(table.name for table in plan.tables)]
    owned = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in set(listed)}
    wanted = Counter(name for name, _ in model.named_parameters())
    assert wanted == Counter([*owned, *(other.name for other in plan.others)])
    assert plan.bytes_before == sum(parameter.nbytes for parameter in model.parameters())
    return model, plan


def facts(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """What a table of several models shows."""
    kept = Counter(layer.reason for layer in plan.layers if layer.scheme is None)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "linears": len(plan.layers),
        "quantized": len(plan.quantized),
        "dead": sum(layer.dead for layer in plan.layers),
        "kept_float": dict(kept),
        "tables": {table.name: f"{table.stored}: {table.reason}" for table in plan.tables},
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "not_covered": {
            kind: {
                "tensors": len(found),
                "parameters": sum(one.parameters for one in found),
                "megabytes": round(sum(one.bytes for one in found) / 1e6, 3),
            }
            for kind, found in plan.not_covered.items()
        },
    }


def compare(directory: Path, plan: Plan) -> dict[str, Any]:
    """Bytes of the weight files of a directory, and what the plan said.

    Raises:
        AssertionError: the directory was made of another model or with another recipe.
    """
    manifest = read_manifest(directory)
    assert manifest["plan"] == json.loads(json.dumps(plan.to_dict())), "not a directory of this plan"
    written = sum(path.stat().st_size for path in weight_files(directory))
    return {"predicted": plan.bytes_after, "written": written, "ratio": round(written / plan.bytes_after, 6)}


def write(name: str, plan: Plan, directory: Path) -> dict[str, Any]:
    """Quantize random weights by the recipe of the plan, and :func:`compare` the directory."""
    model, draw = build(name), torch.Generator().manual_seed(0)
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter not in drawn:
                values = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0.0, 0.02, generator=draw)
                drawn[parameter] = nn.Parameter(values, requires_grad=False)
            setattr(module, leaf, drawn[parameter])
    vlaquant.quantize(model, RECIPES[name], output=directory)
    return compare(directory, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print plans for policies at their published sizes.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the tables say here too")
    parser.add_argument("--written", type=Path, metavar="DIR", help="a quantized OpenVLA-7B to compare with")
    parser.add_argument("--write", type=Path, metavar="DIR", help="folder for quantized models with random weights")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(MODELS))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}; choose from {', '.join(MODELS)}")
    found = {}
    for name in args.models or MODELS:
        model, plan = plan_of(name)
        found[name] = facts(model, plan)
        size = f"{plan.bytes_before / 1e9:.2f} GB → {plan.bytes_after / 1e9:.2f} GB"
        print(f"{name}: {found[name]['parameters'] / 1e6:,.2f} M parameters, {size}\n\n{plan}\n")
        if args.write is not None and isinstance(model, PreTrainedModel):
            found[name]["checkpoint"] = write(name, plan, args.write / name)
            print(f"{name}: {found[name]['checkpoint']}\n")
        if args.written is not None and name == "OpenVLA-7B":
            found[name]["checkpoint"] = compare(args.written, plan)
            print(f"{args.written.name}: {found[name]['checkpoint']}\n")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
