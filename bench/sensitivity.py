"""Sensitivity of the demo policy, and what mixed precision gains over uniform, on held-out observations.

python bench/sensitivity.py --json bench/results/sensitivity_demo.json [--parts scan variants mixtures]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

import vlaquant
from vlaquant.calibrate.running import seeded
from vlaquant.engine.fingerprint import package_versions
from vlaquant.evaluate.action_figures import Predictions
from vlaquant.evaluate.actions import ask
from vlaquant.families import Decision
from vlaquant.families.data import load_observations
from vlaquant.families.objectives import objective
from vlaquant.families.openvla import OPENVLA
from vlaquant.models.openvla.actions import action_statistics, normalize
from vlaquant.numerics import round_weight
from vlaquant.recipe import Budget, Recipe, load_recipe
from vlaquant.sensitivity import Scan, mix, with_rules
from vlaquant.sensitivity.effects import effect

_EXAMPLES = Path(__file__).parent.parent / "examples"
_POLICY, _EPISODES = _EXAMPLES / "demo_policy", _EXAMPLES / "demo_episodes"
_PARTS = ("vision", "projector", "language")
_SAMPLES = 64
_CANDIDATES = ("w2a16", "w3a16", "w4a16", "w8a16")
#: Label of a uniform row -> the budgets in bits a weight that are compared with it.
_BUDGETS = {"w4a16": (4.25, 4.0), "w3a16": (3.25, 3.0)}


def recipe(scheme: str = "w4a16") -> Recipe:
    return load_recipe(
        {
            "rules": [
                {"part": part, "scheme": scheme, "group_size": 64} for part in ("vision", "projector", "language")
            ],
            "quantizer": {"kind": "gptq"},
            "budget": {"candidates": _CANDIDATES, "samples": _SAMPLES},
        }
    )


def without_budget(scheme: str) -> Recipe:
    return recipe(scheme).model_copy(update={"budget": None})


def chosen(every: list[Any], seed: int) -> list[Any]:
    """The calibration observations of a seed."""
    return [every[i] for i in np.random.default_rng(seed).choice(len(every), _SAMPLES, replace=False)]


def answers(model: Any, observations: list[Any]) -> list[tuple[Predictions, Decision]]:
    """The chosen action of each observation, and what it was chosen from."""
    assert OPENVLA.decide is not None
    with torch.inference_mode():
        decisions = [OPENVLA.decide(model, OPENVLA.inputs(model, observation)) for observation in observations]
    return [(ask(model, observation), decision) for observation, decision in zip(observations, decisions, strict=True)]


def errors(
    mine: list[tuple[Predictions, Decision]], theirs: list[tuple[Predictions, Decision]]
) -> dict[str, NDArray[np.float64]]:
    """Of each observation: distance of the chosen bins, action L1, and the smooth figures of a scan."""
    rows = []
    for (action, decision), (other, reference) in zip(mine, theirs, strict=True):
        moved = effect(reference, decision)
        assert action.bins is not None
        assert other.bins is not None
        rows.append(
            {
                "bin_distance": np.abs(action.bins - other.bins).mean(),
                "action_l1": np.abs(action.actions - other.actions).mean(),
                "expected_bin_distance": moved["bin_distance"],
                "divergence": moved["divergence"],
            }
        )
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def variants(samples: list[Any]) -> dict[str, dict[str, float]]:
    """Spearman's ρ with the measured divergence of other ways to estimate it.

    ``drawn`` actions of the policy or ``demonstrated`` ones; (Σ_t ∂L/∂y_t δ x_t)² ``summed`` over the tokens of a
    layer, Σ_t (…)² ``by token``, or Σ g² δ² (``diagonal``). ``output error``: Σ_t ‖δ x_t‖² as a share of Σ_t ‖W x_t‖².
    """
    # Rounding to nearest stands in for GPTQ: what is compared are the estimates
    model: Any = vlaquant.load(_POLICY).float().requires_grad_(False)  # noqa: FBT003
    rounded = vlaquant.sensitivity(model, rtn_recipe(), samples=samples, methods=["measured"])
    changes = weight_changes(model, rounded)
    owner = {name: g for g, group in enumerate(rounded.groups) for name in group.names}
    names = [f"{source}, {how}" for source in ("drawn", "demonstrated") for how in ("summed", "by token", "diagonal")]
    sums = {name: torch.zeros(len(rounded.groups), len(_CANDIDATES)) for name in [*names, "output error"]}
    for position, sample in enumerate(samples):
        for source in ("drawn", "demonstrated"):
            seen = gradients(model, sample, position, source, list(owner))
            products = torch.zeros_like(sums["output error"])
            for name, (x, dy) in seen.items():
                g = owner[name]
                gradient = dy.T @ x
                for c, candidate in enumerate(_CANDIDATES):
                    change = changes[candidate][name]
                    moved = x @ change.T
                    products[g, c] += (gradient * change).sum()
                    sums[f"{source}, by token"][g, c] += (dy * moved).sum(-1).square().sum()
                    sums[f"{source}, diagonal"][g, c] += (gradient * change).square().sum()
                    if source == "drawn":
                        power = (x @ model.get_submodule(name).weight.T).square().sum()
                        sums["output error"][g, c] += moved.square().sum() / power
            sums[f"{source}, summed"] += products.square()
    measured = np.asarray(rounded.costs("measured"))
    return {name: correlations(measured, found.numpy()) for name, found in sums.items()}


def rtn_recipe() -> Recipe:
    return load_recipe(recipe().resolved() | {"quantizer": {"kind": "rtn"}})


def weight_changes(model: nn.Module, scan: Scan) -> dict[str, dict[str, Tensor]]:
    changes: dict[str, dict[str, Tensor]] = {}
    for candidate in _CANDIDATES:
        changes[candidate] = {}
        for group in scan.groups:
            for name, scheme in zip(group.names, group.schemes[candidate], strict=True):
                weight = model.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                changes[candidate][name] = round_weight(weight, scheme.weight, scale_dtype=torch.bfloat16) - weight
    return changes


def correlations(measured: NDArray[np.float64], found: NDArray[np.float64]) -> dict[str, float]:
    pairs = {name: (measured[:, c], found[:, c]) for c, name in enumerate(_CANDIDATES)}
    pairs["all"] = measured.ravel(), found.ravel()
    return {name: round(float(spearmanr(*pair).statistic), 4) for name, pair in pairs.items()}


def gradients(
    model: Any, sample: Any, position: int, source: str, names: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> its input [t, k] and the gradient of the loss by its output [t, n]."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [model.get_submodule(name).register_forward_hook(_watch(name, seen)) for name in names]
    with torch.enable_grad():
        inputs = OPENVLA.inputs(model, sample)
        assert OPENVLA.decide is not None
        decision = OPENVLA.decide(model, inputs)
        if source == "drawn":
            with seeded(position):
                loss = objective(decision)
        else:
            loss = nn.functional.cross_entropy(decision.output, demonstrated(model, sample), reduction="sum")
        loss.backward()
    for handle in handles:
        handle.remove()
    return seen


def demonstrated(model: Any, sample: Any) -> Tensor:
    stats = action_statistics(model.config.norm_stats, None)
    return torch.from_numpy(model.action_tokens.encode(normalize(sample.action, stats)).reshape(-1))


def _watch(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        y = output if output.requires_grad else output.detach().requires_grad_().clone()
        y.register_hook(lambda dy: seen.update({name: (x, dy.reshape(-1, dy.shape[-1]))}))
        return y

    return hook


def mixtures(every: list[Any], held_out: list[Any], seeds: int) -> dict[str, dict[str, Any]]:
    """Row -> figures: means over observations for each seed, and the paired comparison with the uniform row."""
    theirs = answers(vlaquant.load(_POLICY), held_out)
    measured: dict[str, list[dict[str, NDArray[np.float64]]]] = {}
    skeleton = vlaquant.load(_POLICY)
    for seed in range(seeds):
        samples = chosen(every, seed)
        scan = vlaquant.sensitivity(_POLICY, recipe(), samples=samples, methods=["estimated"])
        rows = {f"{scheme} uniform": without_budget(scheme) for scheme in _BUDGETS}
        for limit in (limit for limits in _BUDGETS.values() for limit in limits):
            mixture = mix(scan, Budget(candidates=_CANDIDATES, bits=limit))
            rows[f"{limit} bits"] = with_rules(recipe(), mixture, skeleton, OPENVLA)
        for label, asked in rows.items():
            model = vlaquant.load(_POLICY)
            vlaquant.quantize(model, asked, samples=samples)
            measured.setdefault(label, []).append(errors(answers(model, held_out), theirs))
            print(seed, label, {name: float(one.mean()) for name, one in measured[label][-1].items()}, flush=True)
    bases = {f"{limit} bits": f"{scheme} uniform" for scheme, limits in _BUDGETS.items() for limit in limits}
    return {label: _row(by_seed, bases.get(label), measured) for label, by_seed in measured.items()}


def _row(by_seed: list[dict[str, Any]], base: str | None, measured: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"against": base}
    for name in by_seed[0]:
        row[name] = {"by_seed": [float(one[name].mean()) for one in by_seed]}
        if base is not None:
            mine, uniform = (np.mean([one[name] for one in of], axis=0) for of in (by_seed, measured[base]))
            row[name] |= compared(mine, uniform)
    return row


def compared(mine: NDArray[np.float64], base: NDArray[np.float64]) -> dict[str, float]:
    """Paired bootstrap over observations, seeds averaged: the difference, and the share of draws in which it is ≥ 0."""
    difference = mine - base
    draws = np.random.default_rng(0).integers(len(difference), size=(10_000, len(difference)))
    means = difference[draws].mean(axis=1)
    return {"difference": float(difference.mean()), "p_not_better": float((means >= 0).mean())}


def scanned(every: list[Any]) -> dict[str, Any]:
    """One scan by both methods."""
    scan = vlaquant.sensitivity(_POLICY, recipe(), samples=chosen(every, 0))
    return {
        "groups": [group.label for group in scan.groups],
        "rank_correlation": scan.rank_correlation(),
        "seconds": scan.seconds,
        "measured": scan.measured,
        "estimated": scan.estimated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="other parts that it holds stay")
    parser.add_argument("--parts", nargs="+", choices=("scan", "variants", "mixtures"), default=["scan", "mixtures"])
    parser.add_argument("--observations", type=int, default=200, help="held-out ones")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration observations, for the mixtures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    every = load_observations(_EPISODES, "calibration")
    held_out = load_observations(_EPISODES, "evaluation", args.observations)
    settings = {
        "samples": _SAMPLES,
        "quantizer": "gptq",
        "group_size": 64,
        "candidates": list(_CANDIDATES),
        "threads": 1,
    }
    result: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    result |= {"kind": "sensitivity of the demo policy", "settings": settings, "versions": package_versions()}
    for part in args.parts:
        if part == "scan":
            result[part] = scanned(every)
        elif part == "variants":
            result[part] = variants(chosen(every, 0))
        else:
            result |= {"observations": len(held_out), "seeds": args.seeds}
            result[part] = mixtures(every, held_out, args.seeds)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(result[part], indent=1), flush=True)


if __name__ == "__main__":
    main()
