"""Quantization-aware training: its gradients, what it trains and what not, and that it is what is written."""

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import mutant, random_weight
from staged import SCHEMES, WINDOWS, differing, make_source, written
from tiny import llama, observations, openvla, save_openvla
from tiny_families import TINY, family_of
from torch import Tensor, nn

import vlaquant
from vlaquant import training
from vlaquant.cli import main
from vlaquant.errors import CalibrationError
from vlaquant.families.observation import Observation
from vlaquant.numerics import fake_quantize, quantize_tokens, quantize_weight
from vlaquant.passes import straight_through
from vlaquant.scheme import PRESETS, Granularity, QuantSpec
from vlaquant.training import RoundedWeight, Training, finetune

SPEC = QuantSpec(bits=3, granularity=Granularity.GROUP, group_size=8)
#: Learn one action by heart: short, and a clear direction.
SHORT = Training(steps=12, learning_rate=1e-3, batch=4, follow="demonstration")
LEARNERS = {"openvla: OpenVLA", "openvla: OpenVLA-OFT", "pi0: π0", "hf: llama"}


def check_gradients(module: types.ModuleType, spec: QuantSpec) -> None:
    """∂x̂/∂x and ∂x̂/∂S, one value at a time."""
    generator = torch.Generator().manual_seed(0)
    x = (3.0 * torch.randn(5, 8, generator=generator)).requires_grad_()
    scale = (0.3 + torch.rand(5, 1, generator=generator)).requires_grad_()
    zero = torch.zeros(5, 1) if spec.symmetric else torch.ones(5, 1)
    weight = torch.randn(5, 8, generator=generator)
    rounded = module.fake_quantize_through(x, scale, zero, spec)
    assert torch.equal(rounded, fake_quantize(x.detach(), scale.detach(), zero, spec))
    (rounded * weight).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    clamped = 0
    scales = scale.detach().flatten().tolist()
    for row in range(5):
        s, z, slope = scales[row], float(zero[row]), 0.0
        for column in range(8):
            place = float(x.detach()[row, column]) / s + z
            code, outside = round(place), not spec.qmin <= round(place) <= spec.qmax
            wanted = 0.0 if outside else float(weight[row, column])
            assert float(x.grad[row, column]) == pytest.approx(wanted, abs=1e-5)
            code = min(max(code, spec.qmin), spec.qmax)
            slope += float(weight[row, column]) * (code - z - (0.0 if outside else place - z))
            clamped += outside
        assert float(scale.grad[row]) == pytest.approx(slope, abs=1e-4)
    assert 0 < clamped < 40


ASYMMETRIC = QuantSpec(bits=4, granularity=Granularity.GROUP, group_size=8, symmetric=False)


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_gradients_go_straight_through(spec: QuantSpec) -> None:
    check_gradients(straight_through, spec)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x + (x.round() - x).detach()", "x.round()"),
        (".clamp(spec.qmin, spec.qmax)", ".clamp(2 * spec.qmin, spec.qmax)"),
        ("(codes - zero) * scale", "(codes - zero) * scale.detach()"),
    ],
)
def test_the_check_notices(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_gradients(mutant(straight_through, old, new), SPEC)


def test_inputs_are_rounded_as_the_kernels_round_them() -> None:
    spec = PRESETS["w8a8"].activation
    assert spec is not None
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    codes, scale, zero = quantize_tokens(x.detach().reshape(15, 16), spec)
    rounded = straight_through.round_input(x, spec, None)
    assert torch.equal(rounded.reshape(15, 16), (codes - zero) * scale)
    rounded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC, PRESETS["w8a8"].weight], ids=["w3", "w4 asym", "w8"])
def test_what_is_packed_is_what_was_trained(spec: QuantSpec, clip: str) -> None:
    weight = random_weight(6, 16, 0)
    rounded = RoundedWeight(weight, spec, torch.bfloat16, clip)
    for moved in (weight, weight + 0.3 * random_weight(6, 16, 1)):
        assert torch.equal(rounded(moved), rounded.quantized(moved).dequantize())
    plain = quantize_weight(weight, spec, scale_dtype=torch.bfloat16)
    same = torch.equal(plain.codes, rounded.quantized(weight).codes)
    assert same == (clip == "minmax") or spec.bits == 8, "with 8 bits the full range can be the best"


def recipe(scheme: str = "w4a16", *, bits: int | None = None, **more: Any) -> dict[str, Any]:
    rule = SCHEMES[scheme] | ({} if bits is None else {"bits": bits})
    return {"rules": [{"part": part, **rule} for part in ("language", "vision", "projector")], **more}


def one_habit(count: int = 10) -> list[Observation]:
    """Different pictures, one action."""
    seen = observations(count)
    return [Observation(one.images, one.instruction, action=seen[0].action, episode=one.episode) for one in seen]


@torch.no_grad()
def mean_loss(model: Any, samples: Sequence[Any]) -> float:
    loss = vlaquant.families.family_of_model(model).loss
    assert loss is not None
    return float(sum(loss(model, sample) for sample in samples) / len(samples))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w8a8 static"])
def test_training_lowers_the_loss_of_the_packed_model(scheme: str) -> None:
    bits = 2 if scheme == "w4a16" else None
    samples, chosen = one_habit(), recipe(scheme, bits=bits)
    rounded = vlaquant.quantize(openvla(), chosen, samples=samples).model
    trained = finetune(openvla(), chosen, SHORT, samples)
    assert trained.mean_relative_loss is None
    assert mean_loss(trained.model, samples) < 0.9 * mean_loss(rounded, samples)


def test_only_the_weights_of_quantized_layers_change(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "source", openvla(dtype=torch.bfloat16))
    result = finetune(source, recipe(), SHORT, one_habit(), tmp_path / "out")
    before, after = written(source), written(tmp_path / "out")
    packed = {layer.name for layer in result.layers}
    kept = {name for name in before if name.rpartition(".")[0] not in packed}
    assert kept
    assert differing({n: before[n] for n in kept}, {n: after[n] for n in kept}) == []
    # … while the training did change what it should
    other = vlaquant.quantize(source, recipe(), samples=one_habit(), output=tmp_path / "ptq")
    assert other.manifest["recipe"] == result.manifest["recipe"]
    assert len(differing(written(tmp_path / "ptq"), after)) >= len(packed)


def test_the_directory_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_openvla(tmp_path / "source", openvla(dtype=torch.bfloat16))
    chosen = recipe(transforms=[{"kind": "smoothquant"}], quantizer={"kind": "gptq", "clip": "mse"})
    result = finetune(source, chosen, SHORT, one_habit(), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "vlaquant.json").read_text(encoding="utf-8"))
    assert manifest["verification"]["output"] == "equal bit for bit"
    facts = manifest["qat"]
    assert (facts["steps"], facts["batch"], facts["samples"], len(facts["losses"])) == (12, 4, 10, 10)
    assert facts["not_used"] == ["smoothquant", "gptq"]
    assert facts["losses"][-1] < facts["losses"][0]
    assert result.manifest["qat"] == facts
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "quantizer   qat" in capsys.readouterr().out
    held, loaded = result.model, vlaquant.load(tmp_path / "out")
    assert mean_loss(held, one_habit()) == mean_loss(loaded, one_habit())


def test_the_seed_decides(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "source", openvla())
    tensors = []
    for number, seed in enumerate((0, 0, 1)):
        output = tmp_path / str(number)
        finetune(source, recipe(seed=seed), Training(steps=3, batch=2), one_habit(), output)
        tensors.append(written(output))
    assert differing(tensors[0], tensors[1]) == []
    assert differing(tensors[0], tensors[2]) != []


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_trained_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = TINY[name].save(tmp_path / "float", monkeypatch)
    family, samples = family_of(directory), TINY[name].samples()
    rules = {"rules": [{"part": "language", "scheme": "w4a16", "group_size": 32}], "on_indivisible": "channel"}
    if name not in LEARNERS:
        with pytest.raises(CalibrationError, match=r"training loss|learns from texts"):
            finetune(directory, rules, SHORT, samples)
        return
    if name == "openvla: OpenVLA":
        samples = [Observation(one.images, one.instruction, action=one.action[:1]) for one in samples]
    before = family.load(directory)
    result = finetune(directory, rules, SHORT, samples, tmp_path / "out")
    losses = result.manifest["qat"]["losses"]
    assert min(losses) < losses[0]
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    assert type(result.model) is type(before)


def test_refusals(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "source", openvla())
    silent = [Observation(one.images, one.instruction) for one in observations()]
    with pytest.raises(CalibrationError, match="no action to learn from"):
        finetune(source, recipe(), SHORT, silent)
    with pytest.raises(CalibrationError, match="needs demonstrations"):
        finetune(source, recipe(), SHORT)
    with pytest.raises(CalibrationError, match="must be positive"):
        Training(steps=0)
    with pytest.raises(CalibrationError, match="not finite"):
        finetune(source, recipe(), Training(steps=9, learning_rate=1e30), one_habit())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "source", "llama")
    (tmp_path / "text.txt").write_text("push the robot take what action " * 200, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        "rules: [{part: language, scheme: w4a16, group_size: 32}]\n"
        "calibration: {kind: text, path: text.txt, samples: 4, sequence_length: 16}\n",
        encoding="utf-8",
    )
    arguments = ["qat", "--config", str(tmp_path / "recipe.yaml"), "--model", str(source)]
    assert main([*arguments, "--steps", "3", "--batch", "2", "--output", str(tmp_path / "out")]) == 0
    assert "output equal bit for bit" in capsys.readouterr().out
    assert main([*arguments, "--steps", "0", "--output", str(tmp_path / "none")]) == 1
    assert "must be positive" in capsys.readouterr().err


def test_texts_are_learnt_too() -> None:
    model = llama()
    rules = {"rules": [{"part": "language", **SCHEMES["w4a16"]}]}
    rounded: Tensor = torch.tensor(mean_loss(vlaquant.quantize(llama(), rules).model, WINDOWS))
    trained = finetune(model, rules, SHORT, WINDOWS)
    assert mean_loss(trained.model, WINDOWS) < float(rounded)


@torch.no_grad()
def divergence(model: Any, reference: Any, samples: Sequence[Any]) -> float:
    """Of the tokens' distributions, by the definition: Σ p·log(p / q)."""
    decide = vlaquant.families.family_of_model(reference).decide
    assert decide is not None
    inputs = vlaquant.families.family_of_model(reference).inputs
    total = 0.0
    for sample in samples:
        p, q = (decide(one, inputs(one, sample)).output.double().softmax(dim=-1) for one in (reference, model))
        total += float((p * (p / q).log()).sum(dim=-1).mean())
    return total / len(samples)


def test_following_the_float_model_brings_its_decisions_back() -> None:
    samples, chosen = observations(10), recipe(bits=2)
    rounded = vlaquant.quantize(openvla(), chosen, samples=samples).model
    trained = finetune(openvla(), chosen, Training(steps=12, learning_rate=1e-3, batch=4), samples)
    assert divergence(trained.model, openvla(), samples) < 0.9 * divergence(rounded, openvla(), samples)


def test_the_loss_is_the_divergence() -> None:
    model, samples = openvla(seed=1), observations(2)
    family = vlaquant.families.family_of_model(model)
    loss = training._loss_of(family, Training(steps=1), openvla())
    with torch.no_grad():
        found = float(sum(loss(model, sample) for sample in samples) / len(samples))
        unchanged = float(loss(openvla(), samples[0]))
    assert found == pytest.approx(divergence(model, openvla(), samples), rel=1e-4)
    assert unchanged == pytest.approx(0.0, abs=1e-6)


def test_a_model_whose_decisions_are_not_known_cannot_be_followed() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(CalibrationError, match="cannot be followed"):
        training._loss_of(vlaquant.families.FAMILIES["module"], Training(steps=1), model)
