"""Sensitivity of the demo policy, and what mixed precision gains over uniform, on held-out observations.

python bench/sensitivity.py --json bench/results/sensitivity_demo.json
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

import vlaquant
from vlaquant.engine.fingerprint import package_versions
from vlaquant.evaluate.actions import Predictions, ask
from vlaquant.families.data import load_observations
from vlaquant.families.openvla import OPENVLA
from vlaquant.models.openvla.actions import action_statistics, normalize
from vlaquant.numerics import round_weight
from vlaquant.recipe import Budget, Recipe, load_recipe
from vlaquant.sensitivity import Method, Scan, mix, with_rules
from vlaquant.sensitivity.estimated import drawn_loss

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


def answers(model: nn.Module, observations: list[Any]) -> list[Predictions]:
    return [ask(model, observation) for observation in observations]


def errors(mine: list[Predictions], theirs: list[Predictions]) -> dict[str, NDArray[np.float64]]:
    """Bin distance and action L1 of each observation."""
    bins = [np.abs(np.subtract(a.bins, b.bins)).mean() for a, b in zip(mine, theirs, strict=True)]  # type: ignore[arg-type]
    actions = [np.abs(a.actions - b.actions).mean() for a, b in zip(mine, theirs, strict=True)]
    return {"bin_distance": np.array(bins), "action_l1": np.array(actions)}


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
            loss = drawn_loss(decision, seed=0, sample=position)
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


def scans(every: list[Any], seeds: int) -> dict[int, Scan]:
    found = {}
    for seed in range(seeds):
        found[seed] = vlaquant.sensitivity(_POLICY, recipe(), samples=chosen(every, seed))
        print(f"seed {seed}: ρ {found[seed].rank_correlation()}, {found[seed].seconds}", flush=True)
    return found


def mixtures(found: dict[int, Scan], every: list[Any], held_out: list[Any]) -> dict[str, dict[str, Any]]:
    """Row -> figures: means over observations for each seed, and the paired comparison with the uniform row."""
    theirs = answers(vlaquant.load(_POLICY), held_out)
    measured: dict[str, list[dict[str, NDArray[np.float64]]]] = {}
    bits: dict[str, list[float]] = {}
    for seed, scan in found.items():
        samples = chosen(every, seed)
        rows = {f"{scheme} uniform": without_budget(scheme) for scheme in _BUDGETS}
        methods: tuple[Method, ...] = ("estimated", "measured")
        for limit in (limit for limits in _BUDGETS.values() for limit in limits):
            for method in methods:
                mixture = mix(scan, Budget(candidates=_CANDIDATES, bits=limit, method=method))
                label = f"{limit} bits, {method}"
                rows[label] = with_rules(recipe(), mixture, vlaquant.load(_POLICY), OPENVLA)
                bits.setdefault(label, []).append(mixture.bits)
        for label, asked in rows.items():
            model = vlaquant.load(_POLICY)
            vlaquant.quantize(model, asked, samples=samples)
            measured.setdefault(label, []).append(errors(answers(model, held_out), theirs))
            print(seed, label, {name: float(one.mean()) for name, one in measured[label][-1].items()}, flush=True)
    uniform = {f"{limit} bits, ": f"{scheme} uniform" for scheme, limits in _BUDGETS.items() for limit in limits}
    rows_out: dict[str, dict[str, Any]] = {}
    for label, by_seed in measured.items():
        base = next((row for start, row in uniform.items() if label.startswith(start)), None)
        rows_out[label] = {"bits": bits.get(label)} | {
            name: {"by_seed": [float(one[name].mean()) for one in by_seed]} for name in by_seed[0]
        }
        for name in by_seed[0] if base else ():
            rows_out[label][name]["against"] = base
            rows_out[label][name] |= compared(
                np.mean([one[name] for one in by_seed], axis=0),
                np.mean([one[name] for one in measured[str(base)]], axis=0),
            )
    return rows_out


def compared(mine: NDArray[np.float64], base: NDArray[np.float64]) -> dict[str, float]:
    """Paired bootstrap over observations, seeds averaged: the difference, and the share of draws in which it is ≥ 0."""
    difference = mine - base
    draws = np.random.default_rng(0).integers(len(difference), size=(10_000, len(difference)))
    means = difference[draws].mean(axis=1)
    return {"difference": float(difference.mean()), "p_not_better": float((means >= 0).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--observations", type=int, default=200, help="held-out ones")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration observations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    every = load_observations(_EPISODES, "calibration")
    held_out = load_observations(_EPISODES, "evaluation", args.observations)
    found = scans(every, args.seeds)
    result = {
        "kind": "sensitivity of the demo policy",
        "settings": {"samples": _SAMPLES, "seeds": args.seeds, "quantizer": "gptq", "group_size": 64, "threads": 1},
        "observations": len(held_out),
        "groups": len(found[0].groups),
        "rank_correlation": {str(seed): scan.rank_correlation() for seed, scan in found.items()},
        "seconds": {str(seed): scan.seconds for seed, scan in found.items()},
        "variants": variants(chosen(every, 0)),
        "mixtures": mixtures(found, every, held_out),
        "scan": {name: value for name, value in found[0].to_dict().items() if name in ("measured", "estimated")}
        | {"groups": [group.label for group in found[0].groups], "candidates": list(_CANDIDATES)},
        "versions": package_versions(),
        "total_seconds": time.perf_counter() - started,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("rank_correlation", "variants", "mixtures")}, indent=1))


if __name__ == "__main__":
    main()
