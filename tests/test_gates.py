"""Gates: what misses them is set aside under another name, and what passes says by how much."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import llama, observations, openvla, save_llama, save_observations, save_openvla
from tiny_pi0 import pi0, robot_observations
from torch import nn

import vlaquant
from vlaquant.cli import main
from vlaquant.errors import EvaluationError, GateError, PlanError, RecipeError
from vlaquant.evaluate.sight import image_sensitivity
from vlaquant.goals import reaching
from vlaquant.goals.gates import missed
from vlaquant.pipeline import progressive
from vlaquant.recipe import load_recipe


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process of verification has tests of its own."""
    monkeypatch.setattr("vlaquant.export.writing.verify", lambda *_: {"tensors": 0, "output": "not compared"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_openvla(tmp_path / "source", openvla())


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    save_observations(tmp_path / "episodes", "calibration", observations(8))
    return save_observations(tmp_path / "episodes", "evaluation", observations(5, seed=1))


def recipe(episodes: Path, scheme: str = "w8a16", **changes: Any) -> dict[str, Any]:
    return {
        "rules": [{"part": "language", "scheme": scheme, "group_size": 32}],
        "calibration": {"kind": "episodes", "path": str(episodes), "samples": 8},
        **changes,
    }


def mixed(**changes: Any) -> dict[str, Any]:
    return {"candidates": ["w2a16", "w4a16", "w8a16"], "samples": 4, **changes}


def still(items: Any) -> Any:
    return items


def test_a_model_that_passes_takes_its_name(source: Path, episodes: Path, tmp_path: Path) -> None:
    gates = {"action_l1": 5.0, "bin_distance": 250.0, "gripper_flips": 1.0, "image_sensitivity": 0.01}
    result = vlaquant.quantize(source, recipe(episodes, "w2a16", require=gates), output=tmp_path / "out")
    assert result.output == tmp_path / "out"
    measured = json.loads((tmp_path / "out" / "vlaquant.json").read_text(encoding="utf-8"))["measured"]
    assert measured == json.loads(json.dumps(result.manifest["measured"]))
    assert measured["passed"] is True
    assert measured["samples"] == 5, "held-out observations"
    assert set(gates) <= measured.keys()
    assert 0 < measured["action_l1"] < 5.0
    assert "gates passed" in str(result)
    assert not list(tmp_path.glob("out.*ed"))
    assert (tmp_path / "out.log.jsonl").is_file()
    vlaquant.load(tmp_path / "out")


def test_a_model_that_misses_is_set_aside(
    source: Path, episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    asked = recipe(episodes, "w2a16", require={"action_l1": 1e-6, "gripper_flips": 1.0})
    path.write_text(yaml.safe_dump(asked), encoding="utf-8")
    arguments = ["--config", str(path), "--model", str(source), "--output", str(tmp_path / "out")]
    assert main(["quantize", *arguments]) == 1
    message = capsys.readouterr().err
    assert "action_l1 is 0." in message
    assert "at most 1e-06 is allowed" in message
    assert "out.rejected" in message
    assert "raise_precision" in message, "what to do"
    assert "gripper_flips" not in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unchecked").exists()
    manifest = json.loads((tmp_path / "out.rejected" / "vlaquant.json").read_text(encoding="utf-8"))
    assert manifest["measured"]["passed"] is False
    vlaquant.load(tmp_path / "out.rejected")


def test_an_older_output_stays_when_the_new_one_misses(source: Path, episodes: Path, tmp_path: Path) -> None:
    vlaquant.quantize(source, recipe(episodes), output=tmp_path / "out")
    before = (tmp_path / "out" / "vlaquant.json").read_bytes()
    asked = recipe(episodes, "w2a16", require={"action_l1": 1e-6})
    with pytest.raises(GateError):
        vlaquant.quantize(source, asked, output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "vlaquant.json").read_bytes() == before


def test_precision_is_raised_until_it_passes(source: Path, episodes: Path, tmp_path: Path) -> None:
    gate = {"bin_distance": 1e9}
    low = vlaquant.quantize(source, recipe(episodes, budget=mixed(bits=3.1), require=gate), output=tmp_path / "low")
    gate = {"bin_distance": 0.6 * low.manifest["measured"]["bin_distance"]}
    asked = recipe(episodes, budget=mixed(bits=3.1), require=gate, on_miss="raise_precision")
    result = vlaquant.quantize(source, asked, output=tmp_path / "out")
    rounds = result.manifest["measured"]["rounds"]
    assert len(rounds) > 1
    assert rounds[0]["missed"]
    assert not rounds[-1]["missed"]
    assert result.manifest["measured"]["bin_distance"] <= gate["bin_distance"]
    assert result.plan.bytes_after > low.plan.bytes_after


def test_nothing_is_left_to_raise(source: Path, episodes: Path, tmp_path: Path) -> None:
    budget = mixed(bits=3.5, candidates=["w2a16", "w3a16"])
    asked = recipe(episodes, budget=budget, require={"action_l1": 1e-12}, on_miss="raise_precision")
    with pytest.raises(GateError, match="every layer has its best candidate"):
        vlaquant.quantize(source, asked, output=tmp_path / "out")
    manifest = json.loads((tmp_path / "out.rejected" / "vlaquant.json").read_text(encoding="utf-8"))
    assert len(manifest["measured"]["rounds"]) > 1
    assert not (tmp_path / "out").exists()


def test_a_policy_gone_blind_is_found(source: Path, tmp_path: Path) -> None:
    seeing = openvla()
    blind = copy.deepcopy(seeing)
    nn.init.zeros_(blind.projector.fc2.weight)
    seen = observations(4)
    assert image_sensitivity(seeing, seeing, seen, still).ratio.value == 1.0
    ratio = image_sensitivity(blind, seeing, seen, still).ratio.value
    assert ratio == 0.0
    assert missed({"image_sensitivity": 0.5}, {"image_sensitivity": ratio})
    with pytest.raises(EvaluationError, match="no measure of sight"):
        image_sensitivity(seeing, blind, seen, still)


def test_a_run_that_blinds_the_policy_fails(
    source: Path, episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other gates are wide open; the images reach nothing in what is loaded back."""

    def load_blind(directory: Path) -> Any:
        model: Any = vlaquant.load(directory)
        if directory != source:
            nn.init.zeros_(model.projector.fc3.weight)
        return model

    monkeypatch.setattr("vlaquant.goals.gates.load", load_blind)
    asked = recipe(episodes, require={"action_l1": 50.0, "image_sensitivity": 0.5})
    with pytest.raises(GateError, match=r"image_sensitivity is 0 of the float policy's, wanted 0\.5 to 2"):
        vlaquant.quantize(source, asked, output=tmp_path / "out")


def test_sight_of_a_flow_policy_is_measured_from_the_same_noise() -> None:
    policy = pi0()
    blind = copy.deepcopy(policy)
    for name, parameter in blind.named_parameters():
        if "multi_modal_projector" in name:
            nn.init.zeros_(parameter)
    assert image_sensitivity(blind, policy, robot_observations(3), still).ratio.value == 0.0


@pytest.mark.parametrize(
    ("gates", "figures", "count"),
    [
        ({"action_l1": 0.1}, {"action_l1": 0.1}, 0),
        ({"action_l1": 0.1}, {"action_l1": 0.1001}, 1),
        ({"action_l1": 0.1}, {"action_l1": float("nan")}, 1),
        ({"image_sensitivity": 0.5}, {"image_sensitivity": 0.49}, 1),
        ({"image_sensitivity": 0.5}, {"image_sensitivity": 2.1}, 1),
        ({"image_sensitivity": 0.5}, {"image_sensitivity": 1.3}, 0),
        ({"image_sensitivity": 0.5}, {"image_sensitivity": float("nan")}, 1),
        ({"success_drop": 0.0, "gripper_flips": 0.1}, {"success_drop": -0.1, "gripper_flips": 0.2}, 1),
    ],
)
def test_missed(gates: dict[str, float], figures: dict[str, float], count: int) -> None:
    assert len(missed(gates, figures)) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"require": {}}, "names no gate"),
        ({"require": {"action_l1": 0.1}, "on_miss": "raise_precision"}, "in `budget:` the candidates"),
        ({"require": {"action_11": 0.1}}, "did you mean 'action_l1'"),
        ({"require": {"action_l1": 0.1}, "calibration": {"kind": "text", "path": "t"}}, "needs `path:`"),
    ],
)
def test_recipes_that_make_no_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(tmp_path, **changes))


def test_gates_that_cannot_be_measured(source: Path, episodes: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RecipeError, match=r"perplexity_ratio cannot be measured .* family openvla"):
        vlaquant.quantize(source, recipe(episodes, require={"perplexity_ratio": 1.1}), output=output)
    calibration = {"kind": "episodes", "path": str(episodes), "split": "evaluation"}
    asked = recipe(episodes, require={"action_l1": 0.1}, calibration=calibration)
    with pytest.raises(RecipeError, match="proves nothing"):
        vlaquant.quantize(source, asked, output=output)
    with pytest.raises(RecipeError, match="written directory"):
        vlaquant.quantize(source, recipe(episodes, require={"action_l1": 0.1}))
    with pytest.raises(RecipeError, match="written directory"):
        vlaquant.quantize(openvla(), recipe(episodes, require={"action_l1": 0.1}), output=output)
    assert not list(tmp_path.glob("out*"))


def test_language_models_have_a_gate_of_their_own(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", llama())
    for name in ("calibration", "evaluation"):
        (tmp_path / name).write_text("What action should the robot take to push ? " * 60, encoding="utf-8")
    asked: dict[str, Any] = {
        "rules": [{"part": "language", "scheme": "w8a16", "group_size": 32}],
        "calibration": {"kind": "text", "path": str(tmp_path / "calibration"), "samples": 4, "sequence_length": 32},
        "require": {"perplexity_ratio": 1.5, "path": str(tmp_path / "evaluation"), "samples": 3},
    }
    result = vlaquant.quantize(model, asked, output=tmp_path / "out")
    assert 0.9 < result.manifest["measured"]["perplexity_ratio"] < 1.1
    asked["require"] |= {"perplexity_ratio": 1e-3}
    with pytest.raises(GateError, match="perplexity_ratio"):
        vlaquant.quantize(model, asked, output=tmp_path / "out2")
    asked["require"] = {"action_l1": 0.1, "path": str(tmp_path / "evaluation")}
    with pytest.raises(RecipeError, match="takes no actions"):
        vlaquant.quantize(model, asked, output=tmp_path / "out3")


def test_a_run_stopped_at_the_gates_goes_on_there(
    source: Path, episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    asked = recipe(episodes, require={"action_l1": 5.0})
    with monkeypatch.context() as patch:
        patch.setattr(reaching, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            vlaquant.quantize(source, asked, output=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing unchecked under that name"
    assert (tmp_path / "out.unchecked").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr("vlaquant.engine.loop.quantize_layers", stop)
        result = vlaquant.quantize(source, asked, output=tmp_path / "out", resume=True)
    assert result.manifest["measured"]["passed"]
    assert (tmp_path / "out").is_dir()


def test_progressive_goes_down_to_the_tolerance(
    source: Path, episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve_for(limit: float, errors: list[float]) -> Any:
        """Down a curve whose steps have these errors."""
        given = iter(errors)
        monkeypatch.setattr("vlaquant.goals.progressive.measure", lambda *_, **__: {"action_l1": next(given)})
        return progressive(source, recipe(episodes, budget=mixed(max_action_l1=limit, steps=3)))[1]

    curve = curve_for(0.1, [0.01, 0.05, 0.02])
    bits = [step.mixture.bits for step in curve.steps]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == pytest.approx(9.0)
    assert curve.best.bits == bits[-1] == pytest.approx(3.0)
    curve = curve_for(0.1, [0.01, 0.2])
    assert [len(step.misses) for step in curve.steps] == [0, 1], "it stops at the first step beyond the tolerance"
    assert curve.best is curve.steps[0].mixture
    assert "kept" in str(curve)
    with pytest.raises(PlanError, match="even the most precise"):
        _ = curve_for(0.1, [0.2]).best
    with pytest.raises(RecipeError, match="has no tolerance"):
        progressive(source, recipe(episodes, budget=mixed(bits=4.0)))


def test_a_tolerance_as_the_budget_of_a_run(source: Path, episodes: Path, tmp_path: Path) -> None:
    asked = recipe(episodes, budget=mixed(max_action_l1=1e9, steps=2))
    result = vlaquant.quantize(source, asked, output=tmp_path / "out")
    assert {layer.scheme.weight.bits for layer in result.plan.quantized.values() if layer.scheme is not None} == {2}


def test_the_command(source: Path, episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(episodes, model=str(source), budget=mixed(bits=4.0))), encoding="utf-8")
    picture = tmp_path / "scan.svg"
    arguments = ["--config", str(path), "--samples", "2", "--json", str(tmp_path / "scan.json"), "--plot", str(picture)]
    pytest.importorskip("matplotlib")
    assert main(["sensitivity", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Spearman's ρ" in printed
    assert "bits a weight" in printed, "the mixture under the recipe's budget"
    assert json.loads((tmp_path / "scan.json").read_text(encoding="utf-8"))["samples"] == 2
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert main(["sensitivity", "--config", str(path), "--measured", "--samples", "1"]) == 0
    assert "Spearman" not in capsys.readouterr().out
    assert main(["sensitivity", "--config", str(path), "--progressive"]) == 2
    assert "has no tolerance" in capsys.readouterr().err
    path.write_text(
        yaml.safe_dump(recipe(episodes, model=str(source), budget=mixed(max_action_l1=1e9, steps=2))), encoding="utf-8"
    )
    assert main(["sensitivity", "--config", str(path), "--progressive", "--plot", str(picture)]) == 0
    assert "MiB" in capsys.readouterr().out


def test_a_scan_leaves_its_source_alone(source: Path, episodes: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    vlaquant.sensitivity(source, recipe(episodes, budget=mixed()), methods=["estimated"])
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}
    assert torch.is_grad_enabled()
