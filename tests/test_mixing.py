"""Budgets: the mixture fits, is the best that does, and is written as the plan says."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, observations, openvla, save_llama, save_observations, save_openvla
from torch import nn

import vlaquant
from vlaquant.errors import PlanError, RecipeError
from vlaquant.families import FAMILIES
from vlaquant.linear import W4A16Linear
from vlaquant.recipe import Budget, load_recipe
from vlaquant.sensitivity import Scan, mix, with_rules, write_scan

WINDOWS = [torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
RULES = [{"part": "language", "scheme": "w4a16", "group_size": 32}]
CANDIDATES = ["w2a16", "w4a16", "w8a16"]


def budget(**changes: Any) -> dict[str, Any]:
    return {"candidates": CANDIDATES, "samples": 2, **changes}


@pytest.fixture(scope="module")
def scan() -> Scan:
    recipe = {"rules": RULES, "budget": budget()}
    return vlaquant.sensitivity(llama(), recipe, samples=WINDOWS, methods=["estimated"])


def stored_bits(model: nn.Module) -> float:
    """Average over the packed layers, from their buffers."""
    layers = [module for module in model.modules() if isinstance(module, W4A16Linear)]
    stored = [tensor.nbytes for one in layers for name, tensor in one.state_dict().items() if "shape" not in name]
    return 8 * sum(stored) / sum(one.in_features * one.out_features for one in layers)


@pytest.mark.parametrize("bits", [3.0, 3.3, 4.5, 6.1, 8.5])
def test_the_best_of_all_mixtures_that_fit(scan: Scan, bits: float) -> None:
    mixture = mix(scan, Budget(**budget(bits=bits)))
    assert mixture.bits <= bits
    costs, groups = scan.costs("estimated"), scan.groups
    total = sum(one.weights for one in groups)
    sizes = [[one.weight_bytes[name] for name in CANDIDATES] for one in groups]
    best = min(
        sum(row[c] for row, c in zip(costs, choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(groups))
        if 8 * sum(row[c] for row, c in zip(sizes, choice, strict=True)) <= bits * total
    )
    assert mixture.cost == pytest.approx(best, rel=1e-9)


def test_uniform_bits_are_what_a_uniform_mixture_stores(scan: Scan) -> None:
    """Codes of 4 bits and one float32 scale for 32 of them; float32 because that is the dtype of the tiny model."""
    assert scan.groups[0].weight_bytes["w4a16"] * 8 == 5.0 * scan.groups[0].weights


def test_out_of_reach(scan: Scan) -> None:
    with pytest.raises(PlanError, match=r"bits: 1\.5 cannot be reached; the candidates reach 3\.000 to 9\.000 bits"):
        mix(scan, Budget(**budget(bits=1.5)))
    with pytest.raises(PlanError, match=r"size: 5,000 bytes cannot be reached; the candidates reach [\d,]+ to"):
        mix(scan, Budget(**budget(size=5000)))
    with pytest.raises(RecipeError, match="no limit"):
        mix(scan, Budget(**budget()))
    with pytest.raises(RecipeError, match="scan was made with"):
        mix(scan, Budget(candidates=("w3a16", "w4a16"), bits=4.0))


def test_more_than_enough_takes_the_best_everywhere(scan: Scan) -> None:
    assert {scan.candidates[c] for c in mix(scan, Budget(**budget(bits=30.0))).choice} == {"w8a16"}


def table(tmp_path: Path, scan: Scan, **milliseconds: float) -> Path:
    shapes = {f"{n}x{k}" for one in scan.groups for n, k in one.shapes}
    rows = [
        {"kind": kind, "tokens": 1, "shape": shape, "scheme": f"{scheme}_g32", "median_ms": factor * value}
        for shape in shapes
        for scheme, value in milliseconds.items()
        for kind, factor in (("layer", 1.0), ("peer", 0.01))
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return path


def test_a_budget_of_latency(scan: Scan, tmp_path: Path) -> None:
    path = table(tmp_path, scan, w2a16=0.5, w4a16=1.0, w8a16=2.0)
    layers = sum(len(one.names) for one in scan.groups)
    mixture = mix(scan, Budget(**budget(latency=path, latency_ms=1.0 * layers)))
    spent = sum(
        {"w2a16": 0.5, "w4a16": 1.0, "w8a16": 2.0}[scan.candidates[c]] * len(one.names)
        for one, c in zip(scan.groups, mixture.choice, strict=True)
    )
    assert 0.9 * layers < spent <= layers
    with pytest.raises(PlanError, match=rf"the candidates reach {layers / 2:.3f} to {2 * layers:.3f} ms"):
        mix(scan, Budget(**budget(latency=path, latency_ms=1.0)))
    with pytest.raises(RecipeError, match=r"no median of w2a16_g32 at .* vlaquant bench --shapes 128x64"):
        mix(scan, Budget(**budget(latency=table(tmp_path, scan, w4a16=1.0), latency_ms=9.0)))
    with pytest.raises(RecipeError, match="no table"):
        mix(scan, Budget(**budget(latency=tmp_path / "nothing.json", latency_ms=9.0)))


def test_the_model_is_the_mixture() -> None:
    model = llama()
    result = vlaquant.quantize(model, {"rules": RULES, "budget": budget(bits=5.0)}, samples=WINDOWS)
    assert 4.5 < stored_bits(model) <= 5.0
    names = {layer.scheme.name for layer in result.plan.quantized.values() if layer.scheme is not None}
    assert len(names) > 1
    assert result.recipe.budget is None
    reason = result.plan.quantized["model.layers.0.mlp.down_proj"].reason
    assert reason.startswith("mixed: w"), reason
    assert " costs " in reason
    assert "mixed precision" in str(result.plan)
    again = llama()
    vlaquant.quantize(again, load_recipe(result.recipe.resolved()), samples=WINDOWS)
    tensors = again.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_raising_goes_up_until_nothing_is_left(scan: Scan) -> None:
    mixture, costs = mix(scan, Budget(**budget(bits=3.1))), []
    while True:
        costs.append(mixture.cost)
        lifted = mixture.raised()
        if lifted is None:
            break
        assert lifted.bytes > mixture.bytes
        mixture = lifted
    assert costs == sorted(costs, reverse=True)
    assert 2 < len(costs) < 30
    assert {scan.candidates[c] for c in mixture.choice} == {"w8a16"}


def test_rules_that_have_nothing_left_to_decide_are_dropped(scan: Scan) -> None:
    recipe = load_recipe({"rules": [*RULES, {"part": "head", "scheme": "w8a16"}], "budget": budget(bits=4.0)})
    made = with_rules(recipe, mix(scan, Budget(**budget(bits=4.0))), llama(), FAMILIES["hf"])
    assert [rule.part for rule in made.rules if rule.part] == ["head"]
    plan = vlaquant.plan(llama(), made)
    assert plan.quantized["lm_head"].reason == "rule 'head'"


def policy_recipe(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    episodes = save_observations(tmp_path / "episodes", "calibration", observations(8))
    return {
        "rules": [{"part": part, "scheme": "w4a16", "group_size": 32} for part in ("language", "vision")],
        "calibration": {"kind": "episodes", "path": str(episodes), "samples": 8},
        "budget": budget(**changes),
    }


def test_a_written_directory_keeps_to_its_size(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "source", openvla(dtype=torch.bfloat16))
    recipe = policy_recipe(tmp_path)
    made = vlaquant.sensitivity(source, recipe, methods=["estimated"])
    least, most = (
        made.fixed_bytes + made.header_bytes + sum(end(one.bytes.values()) for one in made.groups) for end in (min, max)
    )
    size = (least + most) // 2
    write_scan(tmp_path / "scan.json", made.to_dict())
    with_scan = recipe | {"budget": budget(size=size, scan=str(tmp_path / "scan.json"))}
    result = vlaquant.quantize(source, with_scan, output=tmp_path / "out")
    written = result.manifest["bytes_on_disk"]["weights"]
    assert 0.9 * size < written <= size
    dead = [layer for layer in result.plan.quantized.values() if layer.dead]
    assert dead
    assert all("rule 'vision'" in layer.reason for layer in dead), "what nothing reads is left to its rule"


def test_a_scan_of_other_rules_is_refused(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "source", openvla())
    recipe = policy_recipe(tmp_path, bits=5.0)
    write_scan(tmp_path / "scan.json", vlaquant.sensitivity(source, recipe, methods=["estimated"]).to_dict())
    recipe["budget"]["scan"] = str(tmp_path / "scan.json")
    for change, message in (
        ({"quantizer": {"kind": "gptq"}}, "other quantizer"),
        ({"rules": recipe["rules"][:1]}, "other rules"),
        ({"budget": recipe["budget"] | {"layers": "*.mlp.*"}}, r"other budget\.layers"),
    ):
        with pytest.raises(RecipeError, match=message):
            vlaquant.quantize(source, recipe | change, output=tmp_path / "out")
    (tmp_path / "scan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match="no scan"):
        vlaquant.quantize(source, recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_takes_the_scan_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaquant.export.writing.verify", lambda *_: {"tensors": 0, "output": "not compared"})
    source = save_llama(tmp_path / "source", llama())
    recipe = {"rules": RULES, "budget": budget(bits=5.0)}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vlaquant.engine.loop.quantize_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            vlaquant.quantize(source, recipe, samples=WINDOWS, output=tmp_path / "out")
    assert (tmp_path / "out.sensitivity.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr("vlaquant.goals.reaching.sensitivity", stop)
        changed = {"rules": RULES, "budget": budget(bits=5.0, samples=3)}
        with pytest.raises(KeyboardInterrupt):
            vlaquant.quantize(source, changed, samples=WINDOWS, output=tmp_path / "out", resume=True)
        result = vlaquant.quantize(source, recipe, samples=WINDOWS, output=tmp_path / "out", resume=True)
    assert result.output == tmp_path / "out"
