"""What calibration does to the action: weighted tokens against equal ones, and how many samples of what kind it takes.

    python bench/action_calibration.py --contests weights samples --json bench/results/action_calibration.json

Policy and data are the demo's. Each seed draws other frames for calibration, from the split that is not measured on.
Errors are against the float policy on held-out frames: of the action that is chosen, and the Kullback-Leibler
divergence of the distributions that its tokens are chosen from, given the demonstrated ones before. Methods are
compared frame by frame: the difference is a mean over seeds, and its interval is a bootstrap over episodes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

import vlaquant
from vlaquant.evaluate.actions import ask
from vlaquant.families import family_of_model
from vlaquant.families.data import load_observations
from vlaquant.families.observation import Observation
from vlaquant.terminal import format_table

ROOT = Path(__file__).parent.parent
POLICY, EPISODES = ROOT / "examples" / "demo_policy", ROOT / "examples" / "demo_episodes"
PARTS = ("vision", "projector", "language")
RESAMPLES = 20000
#: Figure -> digits that it is shown with.
FIGURES = {"divergence": 4, "bin_distance": 3, "action_l1": 4}

WEIGHTS: dict[str, dict[str, Any] | None] = {
    "equal": None,
    "types": {"kind": "types", "image": 0.1, "text": 0.1, "action": 1.0},
    "gradient": {"kind": "gradient"},
    "gradient^½": {"kind": "gradient", "power": 0.5},
}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quantizer": {"kind": "gptq"}},
    "awq": {"transforms": [{"kind": "awq"}], "quantizer": {"kind": "rtn", "clip": "awq"}},
}


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Of one policy to n frames: bins [n, tokens], actions [n, chunk, dims], log p [n, tokens, vocabulary]."""

    bins: NDArray[np.float64]
    actions: NDArray[np.float64]
    log_p: torch.Tensor


class Bench:
    """The float policy's answers, and frames to draw from."""

    def __init__(self) -> None:
        self.frames = load_observations(EPISODES, "calibration", None)
        self.held_out = load_observations(EPISODES, "evaluation", None)
        self.episodes = np.array([frame.episode for frame in self.held_out])
        self.wanted = self._answers(vlaquant.load(POLICY))

    def draw(self, count: int, seed: int, kind: str = "robot") -> list[Observation]:
        chosen = np.random.default_rng(seed).permutation(len(self.frames))[:count]
        frames = [self.frames[index] for index in chosen]
        if kind == "robot":
            return frames
        grey = Image.new("RGB", frames[0].image.size, (128, 128, 128))
        return [replace(frame, images=(grey,)) for frame in frames]

    def errors(self, recipe: dict[str, Any], samples: Sequence[Observation]) -> dict[str, NDArray[np.float64]]:
        """Of each held-out frame: distance of the chosen bins, and of the action."""
        model = vlaquant.load(POLICY)
        vlaquant.quantize(model, recipe, samples=samples)
        return self.errors_of(model)

    def errors_of(self, model: torch.nn.Module) -> dict[str, NDArray[np.float64]]:
        """Likewise, of a model that is quantized already."""
        found, wanted = self._answers(model), self.wanted
        divergence = (wanted.log_p.exp() * (wanted.log_p - found.log_p)).sum(dim=-1).mean(dim=-1)
        return {
            "divergence": divergence.double().numpy(),
            "bin_distance": np.abs(found.bins - wanted.bins).mean(axis=1),
            "action_l1": np.abs(found.actions - wanted.actions).mean(axis=(1, 2)),
        }

    def _answers(self, model: torch.nn.Module) -> "Answers":
        answers = [ask(model, observation) for observation in self.held_out]
        bins = np.concatenate([answer.bins for answer in answers if answer.bins is not None])
        family, log_p = family_of_model(model), []
        with torch.inference_mode():
            for observation in self.held_out:
                logits = family.run(model, family.inputs(model, observation))[0, -bins.shape[1] :]
                log_p.append(logits.float().log_softmax(dim=-1))
        return Answers(bins.astype(np.float64), np.concatenate([a.actions for a in answers]), torch.stack(log_p))

    def paired(self, better: Sequence[NDArray[np.float64]], than: Sequence[NDArray[np.float64]]) -> dict[str, float]:
        """Mean difference over seeds and frames, 95 % interval, and the share of resamples in which it is not below 0.

        Whole episodes are drawn, as their frames are alike, and in each the differences are means over the seeds.
        """
        difference = np.mean([b - t for b, t in zip(better, than, strict=True)], axis=0)
        sums, counts = (
            np.array([values[self.episodes == episode].sum() for episode in np.unique(self.episodes)])
            for values in (difference, np.ones(len(difference)))
        )
        drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        p = float((1 + (means >= 0).sum()) / (1 + RESAMPLES))
        return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "p": p}


def recipe(bits: int, method: str, weights: dict[str, Any] | None) -> dict[str, Any]:
    rules = [{"part": part, "scheme": f"w{bits}a16", "group_size": 64} for part in PARTS]
    return {"rules": rules, **METHODS[method], **({} if weights is None else {"token_weights": weights})}


def weights_contest(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for bits in args.bits:
        for method in args.methods:
            found = {
                name: [
                    bench.errors(recipe(bits, method, weights), bench.draw(args.samples, seed))
                    for seed in tqdm(range(args.seeds), desc=f"w{bits} {method} {name}", disable=None)
                ]
                for name, weights in WEIGHTS.items()
            }
            for name, seeds in found.items():
                row = summary(seeds)
                if name != "equal":
                    row["against_equal"] = {
                        key: bench.paired([one[key] for one in seeds], [one[key] for one in found["equal"]])
                        for key in seeds[0]
                    }
                rows[f"w{bits} g64 {method}, {name}"] = row
    return rows


def samples_contest(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in ("robot", "text only"):
        for name in ("equal", args.weights):
            for count in (min(count, len(bench.frames)) for count in args.counts):
                seeds = [
                    bench.errors(recipe(args.bits[0], "gptq", WEIGHTS[name]), bench.draw(count, seed, kind))
                    for seed in tqdm(range(args.seeds), desc=f"{kind} {name} {count}", disable=None)
                ]
                rows[f"w{args.bits[0]} g64 gptq, {name}, {kind}, {count}"] = summary(seeds)
    return rows


def summary(seeds: Sequence[dict[str, NDArray[np.float64]]]) -> dict[str, Any]:
    return {
        key: {"mean": float(np.mean([one[key] for one in seeds])), "seeds": [float(one[key].mean()) for one in seeds]}
        for key in seeds[0]
    }


def table(rows: dict[str, Any]) -> str:
    lines: list[tuple[str, ...]] = [
        ("", "divergence", "bin distance", "action L1", "against equal weights, divergence")
    ]
    for name, row in rows.items():
        against = row.get("against_equal", {}).get("divergence")
        figures = [_spread(row[key]["seeds"], digits) for key, digits in FIGURES.items()]
        note = ""
        if against is not None:
            interval = f"[{against['low']:+.4f}, {against['high']:+.4f}]"
            note = f"{against['difference']:+.4f} {interval}, p = {against['p']:.1e}"
        lines.append((name, *figures, note))
    return format_table(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ±{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contests", nargs="+", choices=["weights", "samples"], default=["weights", "samples"])
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/action_calibration.json")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--weights", choices=WEIGHTS, default="gradient", help="for the contest of samples")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench()
    results: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    for contest, run in (("weights", weights_contest), ("samples", samples_contest)):
        if contest in args.contests:
            results[contest] = run(bench, args)
            args.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(table(results[contest]))


if __name__ == "__main__":
    main()
