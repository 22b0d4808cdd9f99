"""Whole evaluations of written directories: their JSON, equal models, a planted defect, memory in a fresh process."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import documents
import jsonschema
import pytest
import torch
from made_reports import both, evaluated, words
from safetensors.torch import load_file, save_file
from staged import skip_verification
from test_demo_policy import EPISODES, POLICY
from tiny import llama, observations, openvla, save_llama, save_observations, save_openvla
from tiny_pi0 import pi0, robot_observations, save_pi0

import vlaquant
from vlaquant.errors import EvaluationError
from vlaquant.evaluate import evaluation
from vlaquant.evaluate.evaluation import evaluate_language, evaluate_policy
from vlaquant.evaluate.figures import Figure
from vlaquant.evaluate.latency import policy_rate
from vlaquant.evaluate.memory import memory, run_fresh
from vlaquant.evaluate.metaworld import why_not
from vlaquant.evaluate.results import PolicyEvaluation, from_dict, read, schema, to_dict
from vlaquant.evaluate.rollouts import ClosedLoop, roll_out
from vlaquant.evaluate.table import table
from vlaquant.families import FAMILIES
from vlaquant.goals.gates import measure as measure_gates
from vlaquant.goals.gates import missed
from vlaquant.recipe import load_recipe
from vlaquant.report import measure, read_report, render
from vlaquant.report.sections import verdict
from vlaquant.terminal import WIDTH

GATES = {"action_l1": 0.02, "image_sensitivity": 0.5}


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two processes, which have a test of their own."""
    monkeypatch.setattr(evaluation, "memory", lambda *_: evaluated().system.memory)


def valid(result: Any) -> dict[str, Any]:
    """The result's JSON, after it was held against the schema and read back."""
    data = json.loads(json.dumps(to_dict(result), allow_nan=False))
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert to_dict(from_dict(data, "here")) == data
    return data


def figures(data: Any) -> list[dict[str, Any]]:
    """Everything in it that is a figure."""
    if isinstance(data, dict):
        return (
            [data] if {"value", "unit"} <= data.keys() else [one for value in data.values() for one in figures(value)]
        )
    return [one for value in data for one in figures(value)] if isinstance(data, list) else []


@pytest.mark.usefixtures("unmeasured")
def test_a_policy_against_itself_is_exactly_equal(tmp_path: Path) -> None:
    seen = [one for task in range(3) for one in observations(4, seed=task)]
    along = [replace(one, episode=place // 4) for place, one in enumerate(seen)]
    episodes = save_observations(tmp_path / "episodes", "evaluation", along)
    policy = save_openvla(tmp_path / "policy", openvla(parallel=False))
    result = evaluate_policy(shutil.copytree(policy, tmp_path / "copy"), policy, episodes)
    data = valid(result)
    actions, inside = result.actions, result.inside
    for errors in (actions.whole_chunk, actions.first_step):
        all_of = [errors.l1, errors.mse, *errors.l1_by_dimension, *errors.mse_by_dimension]
        assert {end for figure in all_of for end in (figure.value, figure.low, figure.high)} == {0.0}
    compared = [actions.demonstration, actions.boundary_jump, actions.jerk, inside.image_sensitivity]
    for of in compared:
        assert of is not None
        assert (of.ratio.value, of.ratio.low, of.ratio.high, of.difference.value) == (1.0, 1.0, 1.0, 0.0)
        assert of.reference.value > 0.0
    assert {figure.value for figure in inside.sqnr.values()} == {math.inf}
    assert data["inside"]["sqnr"]["language"]["value"] == "Infinity"
    assert actions.token_agreement is not None
    assert actions.token_agreement.value == 1.0
    assert actions.gripper_flips.value == 0.0
    assert (actions.observations, actions.episodes) == (12, 3)
    assert result.system.disk.ratio.value == 1.0
    assert result.system.latency.p99.candidate.value >= result.system.latency.p50.candidate.value > 0
    assert {"vision", "prefill", "decode"} <= result.system.parts.keys()
    found = figures(data)
    assert len(found) > 100
    assert all(one["unit"] and one["of"] and one["count"] >= 0 for one in found)
    assert max(map(len, table(result).splitlines())) <= WIDTH


@pytest.mark.usefixtures("unmeasured")
def test_a_policy_that_denoises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)
    episodes = save_observations(tmp_path / "episodes", "evaluation", robot_observations(3, cameras=1))
    source = save_pi0(tmp_path / "pi0", pi0())
    vlaquant.quantize(source, {"rules": [{"part": "expert", "scheme": "w8a16"}]}, output=tmp_path / "packed")
    result = evaluate_policy(tmp_path / "packed", source, episodes, control_hz=1e9)
    valid(result)
    velocity = result.inside.velocity
    assert velocity is not None
    assert len(velocity) == 3
    assert 0 < velocity[0].value < 0.1
    assert result.inside.sqnr["language"].value == math.inf, "only the expert was quantized"
    assert 20 < result.inside.sqnr["expert"].value < 80
    assert result.actions.token_agreement is None
    printed = table(result)
    assert "velocity error" in printed
    assert "too slow for 1e+09" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= WIDTH


@pytest.mark.usefixtures("unmeasured")
def test_language_models(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model", llama())
    (tmp_path / "text").write_text("What action should the robot take to push ? " * 60, encoding="utf-8")
    result = evaluate_language(
        shutil.copytree(source, tmp_path / "copy"), source, tmp_path / "text", count=3, length=32
    )
    valid(result)
    found = result.language
    assert (found.perplexity.ratio.value, found.divergence.value, found.top1_agreement.value) == (1.0, 0.0, 1.0)
    assert max(map(len, table(result).splitlines())) <= WIDTH
    valid(words())


def test_memory_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors as they are counted here; and the process holds at least these."""
    policy = openvla()
    source = save_openvla(tmp_path / "policy", policy)
    skip_verification(monkeypatch)
    rules = [{"part": part, "scheme": "w4a16", "group_size": 64} for part in ("vision", "projector", "language")]
    vlaquant.quantize(source, {"rules": rules}, output=tmp_path / "packed")
    inputs = FAMILIES["openvla"].example(policy)
    held = memory(source, tmp_path / "packed", FAMILIES["openvla"], inputs)
    counted = sum(tensor.numel() * tensor.element_size() for tensor in (*policy.parameters(), *policy.buffers()))
    assert held.tensors.reference.value == pytest.approx(counted, rel=0.01)
    assert held.tensors.ratio.value < 0.8
    assert held.peak.reference.value > counted
    if held.resident is not None:
        assert held.before_loading is not None
        assert held.before_loading.candidate.value < held.resident.candidate.value <= held.peak.candidate.value
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(EvaluationError, match="a fresh process could not load it and act: it ended with status 1"):
        run_fresh(source, FAMILIES["openvla"], inputs)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo policy in 8 bits, which is harmless."""
    rules = [{"part": part, "scheme": "w8a16"} for part in ("vision", "projector", "language")]
    output = tmp_path_factory.mktemp("planted") / "w8"
    with pytest.MonkeyPatch.context() as patch:
        skip_verification(patch)
        vlaquant.quantize(POLICY, {"rules": rules}, output=output)
    return output


def zeroed(directory: Path, name: str, target: Path) -> Path:
    """A copy in which all weights of a layer are zero."""
    shutil.copytree(directory, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{name}.weight_scale"] = torch.zeros_like(tensors[f"{name}.weight_scale"])
    save_file(tensors, file, {"format": "pt"})
    return target


@pytest.mark.usefixtures("unmeasured")
def test_a_planted_regression_is_found_named_and_refused(quantized: Path, tmp_path: Path) -> None:
    planted = "language_model.model.layers.1.mlp.down_proj"
    broken = zeroed(quantized, planted, tmp_path / "broken")
    recipe = load_recipe(
        {
            "rules": [{"part": "language", "scheme": "w8a16"}],
            "calibration": {"kind": "episodes", "path": str(EPISODES), "samples": 4},
            "require": GATES | {"samples": 12},
        }
    )
    assert recipe.require is not None
    limits, verdicts = recipe.require.gates, {}
    for directory in (quantized, broken):
        result = evaluate_policy(directory, POLICY, EPISODES, count=12)
        file = tmp_path / f"{directory.name}.json"
        file.write_text(json.dumps(valid(result)), encoding="utf-8")
        fails = missed(limits, measure_gates(directory, POLICY, recipe, recipe.require, show=False))
        report = read_report(_with_gates(directory), evaluation=file, measured=measure(directory, POLICY))
        verdicts[directory.name] = (result, fails, verdict(report), render(report))
    result, fails, told, page = verdicts["w8"]
    assert result.actions.whole_chunk.l1.value < 0.01
    assert min(figure.value for figure in result.inside.sqnr.values()) > 20
    assert fails == []
    assert (told.mood, told.words) == ("good", "All 2 gates passed")
    result, fails, told, page = verdicts["broken"]
    assert result.actions.whole_chunk.l1.value > 0.02
    assert result.inside.sqnr["projector"].value > 20
    assert result.inside.sqnr["language"].value < 15, "the eval says in which part"
    assert any("action_l1" in one for one in fails)
    assert told.mood == "bad"
    assert told.details[0].startswith(f"{planted}: its codes do not stand for the float weights")
    assert any("failed: action_l1" in one for one in told.details)
    assert planted in page


def _with_gates(directory: Path) -> Path:
    """The same, with gates in the recipe of its manifest that nobody has measured yet."""
    path = directory / "vlaquant.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["recipe"]["require"] = GATES | {"samples": 12}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return directory


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    data = valid(evaluated())
    changes: list[dict[str, Any]] = [{"version": 2}, {"kind": "nothing"}, {"actions": {}}, {"more": 1}]
    for change in changes:
        path = tmp_path / "r.json"
        path.write_text(json.dumps(data | change), encoding="utf-8")
        with pytest.raises(EvaluationError, match=r"r\.json: is no result of vlaquant eval of version 1"):
            read(path)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema()).validate(data | change)
    with pytest.raises(EvaluationError, match="cannot be read as JSON"):
        read(tmp_path / "nowhere.json")


def test_what_is_not_a_number_survives_the_file() -> None:
    broken = replace(evaluated(), inside=replace(evaluated().inside, sqnr={"a": Figure(math.nan, "dB", 1, "x")}))
    data = valid(broken)
    assert data["inside"]["sqnr"]["a"]["value"] == "NaN"
    back = from_dict(data, "here")
    assert isinstance(back, PolicyEvaluation)
    assert math.isnan(back.inside.sqnr["a"].value)
    assert missed({"action_l1": 0.1}, {"action_l1": math.nan})


def test_rates_by_hand() -> None:
    """A chunk of 8 in 40 ms is 200 actions a second, and 100 at the slowest."""
    time = evaluated().system.latency
    time = replace(time, p50=both(20, 40, "ms", 9), p99=both(20, 80, "ms", 9))
    rate = policy_rate(8, time, 150.0)
    assert (rate.median.reference.value, rate.median.candidate.value) == (400.0, 200.0)
    assert rate.slowest.candidate.value == 100.0
    assert rate.needed is not None
    assert (rate.needed.value, rate.needed.unit) == (150.0, "Hz")
    assert rate.median.ratio.value == 0.5


@pytest.mark.usefixtures("unmeasured")
def test_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("build").mkdir()
    Path("build/mine.json").write_text(json.dumps(to_dict(evaluated())), encoding="utf-8")
    (block,) = documents.blocks(documents.read(documents.ROOT / "docs" / "evaluation.md"), "python")
    left: dict[str, Any] = {}
    exec(block, left)
    assert left["result"] == evaluated()


@pytest.mark.slow
def test_the_demo_policy_drives_in_metaworld(tmp_path: Path) -> None:
    """The float policy against a copy of itself: the same outcomes in every episode."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    copied = shutil.copytree(POLICY, tmp_path / "copy")
    found = roll_out(copied, POLICY, ClosedLoop(1, workers=2, videos=tmp_path / "videos"), lambda _: None)
    assert found.success.difference.value == 0.0
    assert all(pair.reference == pair.candidate for pair in found.episodes)
    assert found.success.reference.value > 0.5
    assert list((tmp_path / "videos").iterdir()) == []
