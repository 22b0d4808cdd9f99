"""Two chains: a stage sees the inputs of the float model beside those of the quantized one, token by token."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flowing
import pytest
import torch
from flowing import WIDTH, Layer
from staged import WINDOWS, make_source, recipe_for, skip_verification, streamed
from test_replay import flow_of
from torch import Tensor, nn

import vlaquant
from vlaquant.calibrate import ActStats, observe
from vlaquant.engine import loop
from vlaquant.engine.run import RunOptions
from vlaquant.errors import CalibrationError, PlanError
from vlaquant.linear import QuantLinear
from vlaquant.passes.layer import quantize_layers

COARSE = {"scheme": "w3a16", "group_size": "channel"}
RECIPE: dict[str, Any] = {"rules": [{"part": "model", **COARSE}], "quantizer": {"kind": "gptaq"}}
Run = Callable[[nn.Module, Any], object]


def quantized(
    model: nn.Module, samples: list[Any], run: Run, monkeypatch: pytest.MonkeyPatch, **recipe: Any
) -> dict[str, ActStats]:
    """Quantizes in memory; what each layer was solved with."""
    seen: dict[str, ActStats] = {}

    def watching(works: Any, quantizer: Any) -> Any:
        seen.update({name: work.stats for name, work in works.items() if work.stats is not None})
        return quantize_layers(works, quantizer)

    monkeypatch.setattr(loop, "quantize_layers", watching)
    vlaquant.quantize(model, RECIPE | recipe, samples=samples, run=run)
    return seen


@contextmanager
def inputs_of(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What Linears read, by name and call."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: found[name].append(args[0].detach().double().reshape(-1, args[0].shape[-1]))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    yield found
    for handle in handles:
        handle.remove()


def read_by(model: nn.Module, names: list[str], samples: list[Any], run: Run) -> dict[str, Tensor]:
    with torch.inference_mode(), inputs_of(model, names) as found:
        for sample in samples:
            run(model, sample)
    return {name: torch.cat(calls) for name, calls in found.items()}


def assert_stats_are_those_of(
    stats: dict[str, ActStats], packed: nn.Module, model: nn.Module, samples: list[Any], run: Run
) -> dict[str, float]:
    """An oracle without the engine: finished stages are put into a float model by hand, stage by stage.

    Returns the share of the drift in each layer's input.
    """
    stages = flow_of(model, samples, run).stages
    mixed, shares = copy.deepcopy(model), {}
    for stage in stages:
        names = [name for name in stage.linears if name in stats]
        floats, seen = (read_by(each, names, samples, run) for each in (model, mixed))
        for name in names:
            x, x_hat, found = floats[name], seen[name], stats[name]
            wanted = {"hessian": x_hat.T @ x_hat, "cross": (x - x_hat).T @ x_hat}
            wanted["drift"] = (x - x_hat).T @ (x - x_hat)
            assert found.tokens == len(x)
            for field, value in wanted.items():
                got = getattr(found, field).double()
                torch.testing.assert_close(got, value / len(x), rtol=1e-3, atol=1e-5, msg=f"{name}: {field}")
            shares[name] = float((x - x_hat).norm() / x.norm())
        for name in names:
            layer: Any = packed.get_submodule(name)
            mixed.get_submodule(name).weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    return shares


@pytest.mark.parametrize("kind", ["plain", "skipping", "between", "encoder_decoder", "towers", "passing"])
def test_each_stage_sees_both_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, samples = flowing.MODELS[kind]().eval(), flowing.tensors(8)
    packed = copy.deepcopy(model)
    stats = quantized(packed, samples, flowing.call, monkeypatch)
    shares = assert_stats_are_those_of(stats, packed, model, samples, flowing.call)
    first, *_, last = shares.values()
    assert first == 0.0
    assert last > 0.01


def test_the_oracle_notices_a_chain_that_was_not_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, samples = flowing.MODELS["plain"]().eval(), flowing.tensors(8)
    packed = copy.deepcopy(model)
    monkeypatch.setattr("vlaquant.engine.run.FLOAT_CHAIN", "")
    stats = quantized(packed, samples, flowing.call, monkeypatch)
    with pytest.raises(AssertionError, match=r"cross|drift"):
        assert_stats_are_those_of(stats, packed, model, samples, flowing.call)


def test_what_is_closer_to_the_float_model_is_found() -> None:
    """Over several models of random weights: the output error of the whole model falls."""
    quantizers: list[dict[str, Any]] = [{"kind": "gptq"}, {"kind": "gptaq", "alpha": 1.0}]
    found = {"gptq": 0.0, "gptaq": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        model, samples = flowing.Stack(6).eval(), [torch.randn(4, 16, WIDTH) for _ in range(8)]
        with torch.inference_mode():
            wanted = [model(sample) for sample in samples]
        for quantizer in quantizers:
            mine = copy.deepcopy(model)
            vlaquant.quantize(mine, RECIPE | {"quantizer": quantizer}, samples=samples, run=flowing.call)
            with torch.inference_mode():
                pairs = zip(samples, wanted, strict=True)
                found[quantizer["kind"]] += float(
                    sum((mine(sample) - y).square().mean() / y.square().mean() for sample, y in pairs)
                )
    assert found["gptaq"] < 0.97 * found["gptq"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("looping", r"blocks\.1: .* quantized by then \(its forward runs 3 times a sample\); keep it in float"),
        ("piecewise", r"blocks\.0: .* quantized by then \(its forward never runs"),
        ("caching", r"blocks\.0: .*; keep it in float with a rule, or use the quantizer gptq"),
    ],
)
def test_a_quantized_block_that_runs_again_is_refused(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = flowing.MODELS[kind]().eval()
    with pytest.raises(PlanError, match=message):
        quantized(model, flowing.tensors(8), flowing.call, monkeypatch)


def test_a_float_block_that_runs_again_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, samples = flowing.MODELS["looping"]().eval(), flowing.tensors(8)
    packed = copy.deepcopy(model)
    rules = [{"pattern": "blocks.1.*", "scheme": "float"}, *RECIPE["rules"]]
    stats = quantized(packed, samples, flowing.call, monkeypatch, rules=rules)
    assert not any(name.startswith("blocks.1.") for name in stats)
    shares = assert_stats_are_those_of(stats, packed, model, samples, flowing.call)
    assert shares["head"] > 0.01


def test_mode_rerun_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)
    source = make_source(tmp_path / "source", "llama")
    with pytest.raises(
        PlanError, match=r"model\.layers\.0: .* \(in mode rerun .*\); use the mode replay, or the quantizer"
    ):
        streamed(source, recipe_for("llama", "gptaq", "w4a16"), WINDOWS, tmp_path / "out", mode="rerun")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_single_stage_needs_no_float_chain_to_last() -> None:
    torch.manual_seed(0)
    model, samples = flowing.Stack(), flowing.tensors(8)
    rules = [{"pattern": "blocks.2.*", **COARSE}]
    options = RunOptions(mode="rerun")
    vlaquant.quantize(model, RECIPE | {"rules": rules}, samples=samples, run=flowing.call, options=options)
    assert isinstance(model.blocks[2].down, QuantLinear)


class Routed(nn.Module):
    """Which layer reads a token depends on its values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.expert = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        chosen = x[..., 0] > x[..., 1]
        out = x.clone()
        out[chosen] = self.expert(x[chosen])
        return out


def test_tokens_that_cannot_be_paired_are_an_error() -> None:
    torch.manual_seed(0)
    model, samples = Routed().eval(), [torch.randn(4, 40, WIDTH) for _ in range(8)]
    recipe = RECIPE | {"rules": [{"part": "model", "scheme": "w2a16", "group_size": "channel"}]}
    with pytest.raises(
        CalibrationError, match=r"expert: reads \d+ tokens of the quantized model, and \d+ of the float"
    ):
        vlaquant.quantize(model, recipe, samples=samples, run=flowing.call)


def test_calls_and_masks_are_paired() -> None:
    """A layer that is called twice a sample, and of whose tokens some do not count."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    x, x_hat = torch.randn(2, 3, 5, 4).unbind(0)
    mask = torch.tensor([[True, True, False, True, False]])
    with observe(model, ["0", "1"], hessian_for=["0", "1"], paired=True) as observation:
        for index in range(3):
            observation.begin_sample({"0": mask, "1": mask}, index=index)
            with observation.float_chain():
                for chain in (x, x.flip(1)):
                    model[0](chain[index : index + 1])
                    model[1](chain[index : index + 1])
            for chain in (x_hat, x_hat.flip(1)):
                model[0](chain[index : index + 1])
                model[1](chain[index : index + 1])
    stats = observation.stats()
    assert stats["0"] is stats["1"], "layers that read the same in both chains share"
    counted = mask[0]
    seen = torch.cat([x_hat[:, counted], x_hat.flip(1)[:, counted]]).reshape(-1, 4).double()
    drift = torch.cat([x[:, counted], x.flip(1)[:, counted]]).reshape(-1, 4).double() - seen
    cross = stats["0"].cross
    assert cross is not None
    assert stats["0"].tokens == 18
    torch.testing.assert_close(cross.double(), drift.T @ seen / 18, rtol=1e-4, atol=1e-5)


def test_weights_of_calls_go_with_the_tokens_of_both_chains() -> None:
    """Two calls with weights of their own, which the float chain must not use up."""
    model, calls = nn.ModuleList([nn.Linear(4, 4)]), torch.randn(2, 2, 1, 5, 4)
    weights = list(torch.rand(2, 1, 5))
    with observe(model, ["0"], hessian_for=["0"], paired=True) as observation:
        observation.begin_sample(weights={"0": weights})
        with observation.float_chain():
            model[0](calls[0, 0])
        for_later = observation._pairs
        assert for_later is not None
        for_later.keep("0", calls[0, 1, 0])
        for each in calls[1]:
            model[0](each)
    stats = observation.stats()["0"]
    x, seen = (chain.reshape(-1, 4).double() for chain in calls)
    omega = torch.cat(weights).reshape(-1, 1).double()
    wanted = {"hessian": (omega * seen).T @ seen, "cross": (omega * (x - seen)).T @ seen}
    wanted["drift"] = (omega * (x - seen)).T @ (x - seen)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(stats, name).double(), value / omega.sum(), rtol=1e-4, atol=1e-5)


def test_layers_that_read_the_same_in_one_chain_only_do_not_share() -> None:
    model, x = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), torch.randn(1, 5, 4)
    with observe(model, ["0", "1"], hessian_for=["0", "1"], paired=True) as observation:
        observation.begin_sample()
        with observation.float_chain():
            model[0](x)
            model[1](2.0 * x)
        model[0](x)
        model[1](x)
    stats = observation.stats()
    first, second = stats["0"].cross, stats["1"].cross
    assert first is not None
    assert second is not None
    assert not first.any()
    torch.testing.assert_close(second, x[0].T @ x[0] / 5)


def test_a_call_that_only_the_float_model_makes_is_an_error() -> None:
    model, x = nn.ModuleList([nn.Linear(4, 4)]), torch.randn(1, 5, 4)
    with observe(model, ["0"], hessian_for=["0"], paired=True) as observation:
        observation.begin_sample()
        with observation.float_chain():
            model[0](x)
            model[0](x)
        model[0](x)
        with pytest.raises(CalibrationError, match="0: was called more often in the float model"):
            observation.begin_sample()


def test_nan_in_the_float_model_is_found() -> None:
    model, x = nn.ModuleList([nn.Linear(4, 4)]), torch.randn(1, 5, 4)
    with observe(model, ["0"], hessian_for=["0"], paired=True) as observation:
        observation.begin_sample()
        with observation.float_chain():
            model[0](x / 0.0)
        with pytest.raises(CalibrationError, match="0: 5 of 5 input tokens hold NaN or Inf"):
            model[0](x)
