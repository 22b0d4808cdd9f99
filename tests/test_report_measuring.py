"""Looking into two models: against naive versions, and with a damage that must be seen."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama, observations, openvla, save_llama, save_observations, save_openvla
from torch import nn

import vlaquant
from vlaquant.cli import main
from vlaquant.errors import EvaluationError
from vlaquant.evaluate.actions import ask
from vlaquant.families import family_of_model
from vlaquant.linear import W4A16Linear
from vlaquant.numerics import fake_quantize, full_range, min_max, split_groups
from vlaquant.report.data import read_report
from vlaquant.report.measured import Measured
from vlaquant.report.measuring import channel_peaks, folded, histogram, measure
from vlaquant.report.sections import cards, verdict

RULES = [{"part": part, "scheme": "w4a16", "group_size": 64} for part in ("language", "vision")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` and what AWQ made of it, ``packed``; and ``episodes`` of three observations each."""
    folder = tmp_path_factory.mktemp("report")
    source = save_openvla(folder / "source", openvla())
    seen = observations(6)
    for i, one in enumerate(seen):
        object.__setattr__(one, "episode", i // 3)
    episodes = save_observations(folder / "episodes", "evaluation", seen)
    save_observations(folder / "episodes", "calibration", observations(4, seed=1))
    recipe = {
        "rules": RULES,
        "transforms": [{"kind": "awq"}],
        "calibration": {"kind": "episodes", "path": str(episodes), "samples": 4, "min_tokens": 16},
    }
    vlaquant.quantize(source, recipe, output=folder / "packed")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Measured:
    return measure(folder / "packed", folder / "source", folder / "episodes", histograms=3, channel_sets=16)


def test_weights_come_back_through_the_folds(folder: Path, found: Measured) -> None:
    manifest = json.loads((folder / "packed" / "vlaquant.json").read_text(encoding="utf-8"))
    kept = [record for record in manifest["transforms"] if record["kept"]]
    assert kept  # otherwise this shows nothing
    errors = dict(found.weight_errors)
    assert set(errors) == {record["name"] for record in manifest["layers"]}
    assert max(errors.values()) < 0.03  # 4 bits
    assert found.damaged == ()
    # Without the folds, weights that were scaled look wrong
    target = kept[0]["targets"][0]
    packed, source = vlaquant.load(folder / "packed"), vlaquant.load(folder / "source")
    layer: Any = packed.get_submodule(target)
    linear: Any = source.get_submodule(target)
    weight = linear.weight.detach()
    plain = float((layer.dequantize() - weight).square().sum() / weight.square().sum())
    assert errors[target] < plain


def test_folded_finds_the_scales() -> None:
    weight = torch.randn(40, 24)
    row, column = torch.rand(40, 1) + 0.5, torch.rand(1, 24) + 0.5
    assert torch.allclose(folded(weight, weight * column, rows=False, columns=True), weight * column, atol=1e-5)
    assert torch.allclose(folded(weight, row * weight, rows=True, columns=False), row * weight, atol=1e-5)
    both = folded(weight, row * weight * column, rows=True, columns=True)
    assert torch.allclose(both, row * weight * column, atol=1e-2)
    assert torch.equal(folded(weight, weight * column, rows=False, columns=False), weight)


def test_folded_does_not_explain_a_lost_weight() -> None:
    weight = torch.randn(40, 24)
    for lost in (torch.zeros(40, 24), -weight, weight.roll(1, 0)):
        found = folded(weight, lost, rows=True, columns=True)
        assert float((found - lost).square().sum() / found.square().sum()) > 0.25


def test_histogram_against_a_loop() -> None:
    linear = nn.Linear(128, 20, bias=False)
    scheme = vlaquant.plan(linear_model(linear), {"rules": RULES_OF_ONE}).layers[0].scheme
    assert scheme is not None
    spec = scheme.weight
    groups = split_groups(linear.weight.detach(), spec)
    scale, zero = full_range(*min_max(groups), spec, torch.float32)
    wanted = fake_quantize(groups, scale, zero, spec).reshape(linear.weight.shape)
    result = vlaquant.quantize(linear_model(linear), {"rules": RULES_OF_ONE})
    packed: Any = result.model.get_submodule("0")
    assert isinstance(packed, W4A16Linear)
    assert torch.allclose(packed.dequantize(), wanted, atol=1e-6)
    gram = histogram("x", packed, linear, ())
    steps = (groups / scale).flatten().tolist()
    codes = [round(value) for value in (split_groups(wanted, spec) / scale).flatten().tolist()]
    assert gram.codes == pytest.approx([codes.count(code) / len(codes) for code in range(-8, 8)])
    for index in (10, 90, 100, 110):
        low = -9 + index / gram.per_step
        inside = sum(low <= value < low + 1 / gram.per_step for value in steps)
        assert gram.weights[index] * len(steps) == pytest.approx(inside, abs=1)
    assert sum(gram.weights) == pytest.approx(1)
    error = (linear.weight.detach() - wanted).square().sum() / linear.weight.detach().square().sum()
    assert gram.error == pytest.approx(float(error), rel=1e-3)


RULES_OF_ONE = [{"pattern": "0", "scheme": "w4a16", "group_size": 64}]


def linear_model(linear: nn.Linear) -> nn.Module:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False)
    copy.weight = nn.Parameter(linear.weight.detach().clone())
    return nn.Sequential(copy)


def test_channel_peaks_against_a_loop() -> None:
    model, seen = openvla(), observations(3)
    family = family_of_model(model)
    name = "language_model.model.layers.1.mlp.down_proj"
    read: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    with torch.inference_mode():
        for one in seen:
            family.run(model, family.inputs(model, one))
        handle.remove()
        peaks = channel_peaks(model, family, [name], seen)[name]
    assert torch.equal(peaks, torch.cat([x.flatten(0, -2) for x in read]).abs().amax(dim=0))
    assert not model.get_submodule(name)._forward_pre_hooks


def test_outliers_before_and_after(folder: Path, found: Measured) -> None:
    assert found.outliers is not None
    assert found.outliers.observations == 6
    assert len(found.outliers.before) == len(found.outliers.layers) > 10
    assert all(len(row) == 16 for row in found.outliers.before)
    assert found.outliers.before != found.outliers.after
    same = measure(folder / "packed", folder / "source", folder / "episodes", histograms=0, channel_sets=16)
    assert same.outliers == found.outliers
    for row, channels in zip(found.outliers.before, found.outliers.channels, strict=True):
        assert 1.0 <= max(row) <= channels


def test_the_trace_is_what_the_policies_answer(folder: Path, found: Measured) -> None:
    trace = found.trace
    assert trace is not None
    assert (len(trace.original), trace.of_episodes, trace.task) == (3, 2, "push")
    source: Any = vlaquant.load(folder / "source")
    second = [one for i, one in enumerate(observations(6)) if i // 3 == trace.episode]
    wanted = [ask(source, one).actions[0, 0] for one in second]
    assert np.allclose(trace.original, wanted)
    assert trace.original != trace.quantized


def test_a_zeroed_layer_is_named_and_the_verdict_is_bad(folder: Path, tmp_path: Path) -> None:
    broken, name = tmp_path / "broken", "language_model.model.layers.1.self_attn.o_proj"
    broken.mkdir()
    for path in (folder / "packed").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{name}.weight_scale"] = torch.zeros_like(tensors[f"{name}.weight_scale"])
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    found = measure(broken, folder / "source", histograms=1)
    assert [one for one, _ in found.damaged] == [name]
    assert [gram.name for gram in found.weights] == [name]
    shown = read_report(broken, measured=found)
    assert (verdict(shown).mood, verdict(shown).words) == ("bad", "1 damaged layer")
    assert name in verdict(shown).details[0]
    worst = {card.label: card for card in cards(shown)}["Worst layer"]
    assert worst.after == name
    whole = read_report(folder / "packed", measured=measure(folder / "packed", folder / "source", histograms=1))
    assert verdict(whole).mood == "open"


def test_models_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    other = save_openvla(tmp_path / "other", openvla(parallel=False))
    assert measure(folder / "packed", other).damaged == ()  # the same weights
    packed = tmp_path / "packed"
    packed.mkdir()
    with pytest.raises(EvaluationError, match="different classes"):
        measure(folder / "packed", save_language(tmp_path / "language"))


def save_language(directory: Path) -> Path:
    return save_llama(directory, llama())


def test_the_command_looks_inside(folder: Path, tmp_path: Path) -> None:
    arguments = ["--reference", str(folder / "source"), "--episodes", str(folder / "episodes")]
    target, kept = tmp_path / "r.html", tmp_path / "m.json"
    assert main(["report", str(folder / "packed"), *arguments, "--output", str(target), "--json", str(kept)]) == 0
    page = target.read_text(encoding="utf-8")
    assert "Actions along an episode" in page
    again = tmp_path / "again.html"
    assert main(["report", str(folder / "packed"), "--measured", str(kept), "--output", str(again)]) == 0
    assert len(again.read_text(encoding="utf-8")) == pytest.approx(len(page), rel=0.01)
