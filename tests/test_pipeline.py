"""The whole run on tiny models: every quantizer × scheme × family, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, observations, openvla
from torch import Tensor, nn

import vlaquant
from vlaquant.errors import CalibrationError, CheckpointError, PlanError, RecipeError
from vlaquant.families import FAMILIES
from vlaquant.linear import W4A16Linear, W8A8Linear
from vlaquant.numerics import sqnr_db
from vlaquant.passes.layer import Work, quantize_layers
from vlaquant.passes.transform import TransformRecord
from vlaquant.pipeline import quantize
from vlaquant.result import QuantizationResult

SCHEMES: dict[str, dict[str, Any]] = {
    "w4 group": {"scheme": "w4a16", "group_size": 64},
    "w4 group asymmetric": {"scheme": "w4a16", "group_size": 32, "symmetric": False},
    "w3 channel": {"scheme": "w3a16", "group_size": "channel"},
    "w8": {"scheme": "w8a16"},
    "w8 tensor": {"scheme": "w8a16", "group_size": "tensor"},
    "w8a8": {"scheme": "w8a8"},
    "w8a8 static": {"scheme": "w8a8_static"},
    "w4a8": {"scheme": "w4a8", "group_size": 64},
}
#: Least signal-to-noise ratio of the model's output, about 2 dB below the worst pair of quantizer and family.
LEAST_DB = {
    "w4 group": 14,
    "w4 group asymmetric": 16,
    "w3 channel": 7,
    "w8": 38,
    "w8 tensor": 35,
    "w8a8": 35,
    "w8a8 static": 33,
    "w4a8": 14,
}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": {"kind": "rtn"}},
    "rtn mse": {"quantizer": {"kind": "rtn", "clip": "mse"}},
    "gptq": {"quantizer": {"kind": "gptq"}},
    "awq": {"transforms": [{"kind": "awq", "grid": 5}], "quantizer": {"kind": "rtn", "clip": "awq"}},
    "smoothquant": {"transforms": [{"kind": "smoothquant"}], "quantizer": {"kind": "rtn"}},
    "smoothquant + gptq": {"transforms": [{"kind": "smoothquant"}], "quantizer": {"kind": "gptq"}},
    "awq + gptq": {"transforms": [{"kind": "awq", "grid": 5}], "quantizer": {"kind": "gptq"}},
}

#: Enough random tokens that the smallest layers see more than the least number.
WINDOWS = [torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Net(nn.Module):
    """A model of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def run_net(model: nn.Module, sample: Tensor) -> object:
    return model(sample)


def make(family: str) -> tuple[nn.Module, str, dict[str, Any], Callable[[nn.Module], Tensor]]:
    """Model, part, arguments for ``quantize``, and the output to compare."""
    torch.manual_seed(0)
    if family == "module":
        samples = [torch.randn(8, 64) for _ in range(5)]
        return Net().eval(), "model", {"samples": samples, "run": run_net}, lambda model: model(samples[0])
    if family == "openvla":
        seen = observations(10)
        policy = openvla()
        inputs = FAMILIES[family].inputs(policy, seen[0])
        return policy, "language", {"samples": seen}, lambda model: FAMILIES[family].run(model, inputs)
    return llama(), "language", {"samples": WINDOWS}, lambda model: model(WINDOWS[0]).logits


def run(family: str, quantizer: str, scheme: str, seed: int = 0) -> tuple[QuantizationResult, Tensor, Tensor]:
    """The result, and the output before and after. ``seed`` is that of torch, which must not matter."""
    model, part, arguments, output = make(family)
    with torch.inference_mode():
        before = output(model)
    torch.manual_seed(seed)
    result = quantize(model, {"rules": [{"part": part, **SCHEMES[scheme]}], **QUANTIZERS[quantizer]}, **arguments)
    with torch.inference_mode():
        return result, before, output(model)


@pytest.mark.parametrize("family", ["openvla", "hf", "module"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_contract(family: str, quantizer: str, scheme: str) -> None:
    result, before, after = run(family, quantizer, scheme)
    packed = {name for name, module in result.model.named_modules() if isinstance(module, W4A16Linear | W8A8Linear)}
    assert packed == set(result.plan.quantized), "the plan says what the model is"
    assert {record.name for record in result.layers} == packed
    assert sqnr_db(before, after) > LEAST_DB[scheme]
    wanted = QUANTIZERS[quantizer]
    transforms = [] if family == "module" else [transform["kind"] for transform in wanted.get("transforms", [])]
    assert {record.kind for record in result.transforms} == set(transforms), "unknown models have no folds"
    asked = f"{wanted['quantizer']['kind']} {wanted['quantizer'].get('clip', 'minmax')}"
    for record in result.layers:
        assert record.quantizer == asked or "reverted" in record.notes[-1], record
        assert record.loss is not None, record
        assert record.loss_rtn is not None, record
        assert record.loss <= record.loss_rtn, record


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_same_twice(quantizer: str) -> None:
    first, second = (run("openvla", quantizer, "w8a8 static", seed)[0].model.state_dict() for seed in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_contract_notices_a_broken_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def negated(works: dict[str, Work], *args: Any) -> Any:
        return quantize_layers({name: replace(work, weight=-work.weight) for name, work in works.items()}, *args)

    monkeypatch.setattr("vlaquant.engine.loop.quantize_layers", negated)
    with pytest.raises(AssertionError, match="sqnr_db"):
        test_contract("hf", "rtn", "w8")


def test_a_fold_that_changes_the_function_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = {"rules": [{"part": "language", "scheme": "w8a8"}]}
    model, _, arguments, _ = make("causal_lm")
    plain = quantize(model, recipe, **arguments)
    monkeypatch.setattr("vlaquant.engine.stage.transform_group_", _scale_only_the_targets)
    model, _, arguments, _ = make("causal_lm")
    result = quantize(model, recipe | {"transforms": [{"kind": "awq"}]}, **arguments)
    assert result.transforms
    assert all("changed the output of" in str(record.reverted) for record in result.transforms)
    assert not any(record.kept for record in result.transforms)
    wanted, tensors = plain.model.state_dict(), result.model.state_dict()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def _scale_only_the_targets(model: nn.Module, group: Any, works: dict[str, Any], transform: object) -> Any:
    for name in group.targets:
        works[name].weight = works[name].weight * 2.0
    return TransformRecord("awq", group.source, group.targets, 1.0, 0.5, kept=True, strength=0.5)


def test_weights_are_kept_bit_by_bit_where_the_plan_says_float() -> None:
    model, _, arguments, _ = make("openvla")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize(model, {"rules": [{"part": "language", "scheme": "w8a8"}]}, **arguments)
    after = model.state_dict()
    kept = [name for name in before if not name.startswith("language_model.model.layers")]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_blind_policy_is_not_calibrated() -> None:
    policy = openvla()
    nn.init.zeros_(policy.projector.fc2.weight)
    with pytest.raises(CalibrationError, match="image does not reach the action"):
        quantize(policy, {"rules": [{"part": "language", "scheme": "w8a8"}]}, samples=observations(10))


def test_empty_samples() -> None:
    with pytest.raises(CalibrationError, match="empty"):
        quantize(
            llama(), {"rules": [{"part": "language", "scheme": "w8a8"}], "quantizer": {"kind": "gptq"}}, samples=[]
        )


def test_missing_calibration_section() -> None:
    with pytest.raises(RecipeError, match="gptq"):
        quantize(llama(), {"rules": [{"part": "language", "scheme": "w8a8"}], "quantizer": {"kind": "gptq"}})


def test_nan_weights_in_a_loaded_model() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        quantize(model, {"rules": [{"part": "language", "scheme": "w8a8"}]})


def test_nan_activations_name_the_first_layer() -> None:
    net = Net().eval()
    good, bad = torch.randn(40, 64), torch.full((4, 64), float("nan"))
    recipe = {"rules": [{"part": "model", "scheme": "w8a8"}], "quantizer": {"kind": "gptq"}}
    with pytest.raises(CalibrationError, match=r"up: 4 of 4 input tokens hold NaN or Inf in sample 1"):
        quantize(net, recipe, samples=[good, bad], run=run_net)


def test_what_is_out_of_the_ordinary_is_noted() -> None:
    net = Net().eval()
    nn.init.zeros_(net.up.weight)
    nn.init.constant_(net.up.bias, -1.0)
    samples = torch.randn(40, 64)
    samples[:, [3, 5]] = 0.0
    recipe = {"rules": [{"part": "model", "scheme": "w8a8"}], "quantizer": {"kind": "gptq"}}
    result = quantize(net, recipe, samples=[samples], run=run_net)
    up, down = result.layers
    assert up.notes == ("2 input channels are always 0",)
    assert down.notes == ("128 input channels are always 0", "every input is 0; rounded to nearest")
    assert f"note: down: {'; '.join(down.notes)}" in str(result)


def test_everything_unusable_is_an_error() -> None:
    net = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2)})
    with pytest.raises(PlanError, match="no layer is left"):
        quantize(net, {"rules": [{"part": "model", "scheme": "w8a8"}]})


def test_functional_use_of_a_weight_keeps_the_layer_float() -> None:
    class Sliced(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.nn.functional.linear(x, self.up.weight[:64])

    net = Sliced().eval()
    recipe = {"rules": [{"part": "model", "scheme": "w8a8"}]}
    result = quantize(net, recipe, samples=[torch.randn(40, 64)], run=run_net)
    assert set(result.plan.quantized) == {"down"}
    assert "also used outside" in next(layer.reason for layer in result.plan.layers if layer.name == "up")


def test_output_is_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(vlaquant.VlaquantError, match="--overwrite"):
        quantize(tmp_path / "nowhere", {"rules": [{"part": "language", "scheme": "w8a8"}]}, output=tmp_path)
