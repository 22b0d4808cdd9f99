"""Does rotation earn its place? The same recipes with and without it, on a language model and on the demo policy.

    python scripts/compare_rotation.py --model DIR --text FILE --work DIR --json FILE.json [--rows ROW …]
        [--windows 8] [--dtype float32]
    python scripts/compare_rotation.py --work DIR --json FILE.json [--rows ROW …]       # the demo policy

The first half of the text calibrates, the second half is measured. Rows that the JSON file holds already are kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from compare_language_recipes import halves
from tqdm import tqdm

import vlaquant
from vlaquant.evaluate.actions import compare
from vlaquant.evaluate.language import compare_text
from vlaquant.families.data import load_observations
from vlaquant.families.hf_samples import text_samples
from vlaquant.terminal import format_table

_POLICY = Path(__file__).parent.parent / "examples" / "demo_policy"
_EPISODES = Path(__file__).parent.parent / "examples" / "demo_episodes"
_AWQ = {"kind": "awq"}
_ROTATIONS: dict[str, list[dict[str, Any]]] = {
    "": [],
    " rotation": [{"kind": "rotation"}],
    " rotation residual": [{"kind": "rotation", "values": False}],
    " rotation values": [{"kind": "rotation", "residual": False}],
}

#: row -> (scheme, group size, transforms, quantizer)
ROWS: dict[str, tuple[str, int | None, list[dict[str, Any]], dict[str, Any]]] = {
    f"{scheme} {name}{rotation}": (scheme, group, [*first, *more], quantizer)
    for scheme, group in (("w4a16", 64), ("w3a16", 64), ("w2a16", 64), ("w4a8", 64), ("w8a8", None))
    for name, more, quantizer in (
        ("rtn", [], {"kind": "rtn"}),
        ("gptq", [], {"kind": "gptq"}),
        ("awq", [_AWQ], {"kind": "rtn", "clip": "awq"}),
        ("awq + gptq", [_AWQ], {"kind": "gptq"}),
    )
    for rotation, first in _ROTATIONS.items()
}


def recipe(row: str, parts: tuple[str, ...], calibration: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    scheme, group, transforms, quantizer = ROWS[row]
    overrides = {} if group is None else {"group_size": group}
    return {
        "rules": [{"part": part, "scheme": scheme, **overrides} for part in parts],
        "transforms": transforms,
        "quantizer": quantizer,
        "calibration": calibration,
        "seed": seed,
    }


def language(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Quantizes in memory, in the dtype that was asked for."""
    calibration, evaluation = halves(args.text, args.work)
    windows = text_samples(args.model, evaluation, 24, 512)[: args.windows]
    samples = text_samples(args.model, calibration, 24, 512)
    dtype = getattr(torch, args.dtype)
    reference = vlaquant.load(args.model).to(dtype)
    for row in tqdm(args.rows):
        chosen = recipe(row, ("language",), None, args.seed)
        made = vlaquant.quantize(vlaquant.load(args.model).to(dtype), chosen, samples=samples)
        error, _ = compare_text(made.model, reference, windows, lambda items: items)
        results[row] = {
            "perplexity": error.perplexity.candidate.value,
            "reference_perplexity": error.perplexity.reference.value,
            "divergence": error.divergence.value,
            "top1_agreement": error.top1_agreement.value,
            "tokens": error.tokens,
            "output_error": made.mean_relative_loss,
            "bytes": made.plan.bytes_after,
        }
        save(args.json, results)


def policy(args: argparse.Namespace, results: dict[str, Any]) -> None:
    data = {"kind": "episodes", "path": str(_EPISODES), "samples": 64}
    reference, observations = vlaquant.load(_POLICY), load_observations(_EPISODES, "evaluation")
    for row in tqdm(args.rows):
        output = args.work / row.replace(" ", "_")
        chosen = recipe(row, ("vision", "projector", "language"), data, args.seed)
        made = vlaquant.quantize(_POLICY, chosen, output=output, overwrite=True)
        found = compare(vlaquant.load(output), reference, observations, lambda items: items).figures
        assert found.token_agreement is not None
        assert found.bin_distance is not None
        results[row] = {
            "token_agreement": found.token_agreement.value,
            "bin_distance": found.bin_distance.value,
            "mean_l1": found.whole_chunk.l1.value,
            "output_error": made.mean_relative_loss,
            "bytes": made.manifest["bytes_on_disk"]["weights"],
        }
        save(args.json, results)


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    columns = list(next(iter(results.values())))
    rows = [tuple(f"{result[name]:.5g}" for name in columns) for result in results.values()]
    return format_table([("recipe", *columns), *((row, *cells) for row, cells in zip(results, rows, strict=True))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a language model; without one the demo policy")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=24, help="of text to measure on, at most 24")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the language model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    (policy if args.model is None else language)(args, results)
    print(table(results))


if __name__ == "__main__":
    main()
