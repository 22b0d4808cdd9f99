"""Measured and estimated sensitivity against doing it by hand, finite differences and each other."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, observations, openvla, save_llama
from tiny_pi0 import pi0, robot_observations
from torch import Tensor, nn

import vlaquant
from vlaquant.errors import CalibrationError, PlanError, RecipeError
from vlaquant.families import FAMILIES, MODULE, Decision, family_of_model
from vlaquant.numerics import QuantizedWeight, quantize_weight
from vlaquant.recipe import load_recipe
from vlaquant.scheme import get_scheme
from vlaquant.sensitivity import Scan, estimated
from vlaquant.sensitivity.effects import Policy, effect, policy_of, rounded_, spread
from vlaquant.sensitivity.estimated import estimate
from vlaquant.sensitivity.groups import Group
from vlaquant.sensitivity.measured import measure
from vlaquant.sensitivity.replaying import Replay
from vlaquant.sensitivity.scan import write_scan

BUDGET = {"candidates": ["w2a16", "w4a16", "w8a16"], "group_size": 32, "samples": 4}
WINDOWS = [torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def recipe(part: str = "language", **changes: Any) -> dict[str, Any]:
    return {"rules": [{"part": part, "scheme": "w4a16", "group_size": 32}], "budget": BUDGET | changes}


class Net(nn.Module):
    """Two layers and something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def group(model: nn.Module, *names: str) -> Group:
    shapes = tuple((m.out_features, m.in_features) for m in map(model.get_submodule, names) if isinstance(m, nn.Linear))
    return Group(names, "model", shapes, sum(n * k for n, k in shapes), {}, {}, {})


def codes_of(model: nn.Module, groups: list[Group], *bits: int) -> dict[str, dict[str, QuantizedWeight]]:
    made: dict[str, dict[str, QuantizedWeight]] = {}
    for width in bits:
        spec = get_scheme("w4a16").with_weight(bits=width, group_size=32).weight
        made[f"w{width}"] = {
            name: quantize_weight(model.get_submodule(name).weight, spec, scale_dtype=torch.float32)  # type: ignore[arg-type]
            for one in groups
            for name in one.names
        }
    return made


def still(items: Any) -> Any:
    return items


def by_finite_differences(
    model: nn.Module, policy: Policy, samples: list[Any], groups: list[Group], codes: Mapping[str, Any]
) -> list[list[float]]:
    """What :func:`estimate` computes with gradients, from differences of the loss along each δ, in float64."""
    step = 0.02  # the models compute some of it in float32
    model = copy.deepcopy(model).double()
    sums = torch.zeros(len(groups), len(codes), dtype=torch.float64)
    rows = 1
    for position, sample in enumerate(samples):
        inputs = policy.prepare(sample)
        reference = policy.decide(model, inputs)
        loss = loss_like(reference, position)
        rows = reference.output.shape[0] if reference.tokens else reference.output.numel()
        for g, one in enumerate(groups):
            for c, weights in enumerate(codes.values()):
                ends = []
                for sign in (1.0, -1.0):
                    moved = copy.deepcopy(model)
                    for name in one.names:
                        weight = moved.get_parameter(f"{name}.weight")
                        weight.data += sign * step * (weights[name].dequantize(torch.float64) - weight.data)
                    ends.append(loss(policy.decide(moved, inputs)))
                product = (ends[0] - ends[1]) / (2 * step)
                sums[g, c] += product**2 * (0.5 if reference.tokens else 1.0) / len(samples)
    return (sums / rows).tolist()


def loss_like(reference: Decision, position: int) -> Any:
    """The loss whose draw the reference decides, as a function of another decision."""
    generator = torch.Generator().manual_seed(position)
    if not reference.tokens:
        signs = torch.randint(0, 2, reference.output.shape, generator=generator) * 2.0 - 1.0
        return lambda other: float((other.output * signs).sum())
    drawn = torch.multinomial(reference.output.float().softmax(-1), 1, generator=generator)
    return lambda other: -float(other.output.log_softmax(-1).gather(1, drawn).sum())


@torch.no_grad()
def check_estimate(model: nn.Module, policy: Policy, samples: list[Any], groups: list[Group]) -> None:
    model.requires_grad_(False)  # noqa: FBT003
    codes = codes_of(model, groups, 2, 4)
    found = estimate(model, policy, samples, range(len(samples)), groups, codes, still, seed=0)
    wanted = by_finite_differences(model, policy, samples, groups, codes)
    assert torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=2e-3), (found, wanted)
    assert min(min(row) for row in wanted) > 0


def net_case() -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = Net().eval()
    policy = policy_of(model, MODULE, lambda one, x: one(x.to(one.get_parameter("up.weight").dtype)))
    return model, policy, [torch.randn(5, 32) for _ in range(3)], [group(model, "up"), group(model, "down")]


def llama_case() -> tuple[Any, ...]:
    model = llama()
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    groups = [group(model, *attention), group(model, "model.layers.1.mlp.down_proj")]
    family = FAMILIES["hf"]

    def decide(one: Any, ids: Tensor) -> Decision:
        # Not Family.decide, which gives float32: differences need more
        return Decision(one(input_ids=ids, use_cache=False).logits[0], tokens=True)

    return model, Policy(lambda ids: family.inputs(model, ids)["input_ids"], decide, decide), WINDOWS[:2], groups


@pytest.mark.parametrize("case", [net_case, llama_case], ids=["numbers", "tokens"])
def test_the_estimate_is_what_finite_differences_say(case: Any) -> None:
    check_estimate(*case())


def test_finite_differences_notice_a_wrong_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimated, "_change", lambda layer, weight: weight.dequantize)
    with pytest.raises(AssertionError):
        check_estimate(*net_case())


def test_finite_differences_notice_layers_that_are_squared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are rounded together: (a + b + c)², not a² + b² + c²."""
    model, policy, samples, groups = llama_case()
    codes = codes_of(model, groups, 2)
    together = estimate(model.requires_grad_(False), policy, samples, [0, 1], groups[:1], codes, still, seed=0)  # noqa: FBT003
    alone = [group(model, name) for name in groups[0].names]
    apart = estimate(model, policy, samples, [0, 1], alone, codes, still, seed=0)
    assert together[0][0] != pytest.approx(sum(row[0] for row in apart), rel=0.01)


def test_the_estimate_is_the_divergence_of_small_changes() -> None:
    """Both are in nats a token, so they must agree where the expansion holds: at 8 bits."""
    model = llama()
    scan = vlaquant.sensitivity(model, recipe(samples=64, candidates=["w4a16", "w8a16"]), samples=many_windows(64))
    assert scan.measured is not None
    assert scan.estimated is not None
    for measured_row, estimated_row in zip(scan.measured["divergence"], scan.estimated, strict=True):
        assert 0.6 < estimated_row[1] / measured_row[1] < 1.6


def many_windows(count: int) -> list[Tensor]:
    return [torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_measured_is_what_rounding_by_hand_gives() -> None:
    model, policy, samples, groups = net_case()
    codes = codes_of(model, groups, 3)
    found = measure(model, policy, samples, range(3), groups, codes, still)
    by_hand = copy.deepcopy(model)
    by_hand.down.weight.data = codes["w3"]["down"].dequantize()
    differences = [(by_hand(x) - model(x)).detach() for x in samples]
    wanted = sum(float(one.square().mean()) for one in differences) / 3
    assert found["squared"][1][0] == pytest.approx(wanted, rel=1e-5)
    wanted = sum(float(one.abs().mean()) for one in differences) / 3
    assert found["action_l1"][1][0] == pytest.approx(wanted, rel=1e-5)


def test_replay_changes_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(samples=2) | {"rules": [{"part": part, "scheme": "w8a16"} for part in ("vision", "language")]}
    calls = {"replayed": 0, "plain": 0}

    def scanned(kind: str) -> Any:
        policy = openvla()

        def count(*_: object) -> None:
            calls[kind] += 1

        monkeypatch.setattr(policy, "__deepcopy__", lambda _: policy, raising=False)
        policy.get_submodule("vision_backbone.featurizer.blocks.0.attn.qkv").register_forward_hook(count)
        return vlaquant.sensitivity(policy, asked, samples=observations(8), methods=["measured"]).measured

    replayed = scanned("replayed")
    monkeypatch.setattr(Replay, "record", lambda _, run: run())
    assert scanned("plain") == replayed
    assert calls["replayed"] < calls["plain"] / 2


def test_effects_of_action_tokens() -> None:
    bins = torch.tensor([2, 1, 0, 0])
    reference = Decision(torch.tensor([[10.0, 0.0, -50.0, -50.0], [0.0, 0.0, -50.0, -50.0]]), tokens=True, bins=bins)
    other = Decision(torch.tensor([[0.0, 10.0, -50.0, -50.0], [0.0, 0.0, -50.0, -50.0]]), tokens=True, bins=bins)
    found = effect(reference, other)
    p = torch.tensor([10.0, 0.0]).softmax(0)
    assert found["divergence"] == pytest.approx(float(10 * (p[0] - p[1])) / 2, rel=1e-4)
    assert found["bin_distance"] == pytest.approx(float(p[0] - p[1]) / 2, rel=1e-4), "one of two rows, one bin"
    assert found["action_l1"] == pytest.approx(0.5), "one row, one of two steps in [-1, 1]"
    assert set(effect(reference, reference).values()) == {0.0}


def test_rounding_is_undone_even_after_an_error() -> None:
    model, _, _, groups = net_case()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    codes, seen = codes_of(model, groups, 2)["w2"], []

    def fail() -> None:
        with rounded_(model, ["up"], codes):
            seen.append(torch.equal(model.up.weight, before["up.weight"]))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_scan_of_a_policy(tmp_path: Path) -> None:
    policy = openvla(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    scan = vlaquant.sensitivity(policy, recipe() | {"quantizer": {"kind": "gptq"}}, samples=observations(10))
    after = policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the caller's model stays as it was"
    assert scan.dtype == "float32"
    assert set(scan.measured or {}) == {"divergence", "bin_distance", "action_l1"}
    labels = [one.label for one in scan.groups]
    assert "language_model.model.layers.0.self_attn.(q_proj|k_proj|v_proj)" in labels
    assert "language_model.model.layers.1.mlp.(gate_proj|up_proj)" in labels
    for row in scan.costs("measured"):
        assert row[0] > row[1] > row[2] > 0, "fewer bits harm more"
    correlation = scan.rank_correlation()
    assert correlation is not None
    assert correlation["all"] > 0.8
    assert str(scan).count("\n") > len(scan.groups)
    write_scan(tmp_path / "scan.json", scan.to_dict())
    again = Scan.read(tmp_path / "scan.json")
    assert json.loads(json.dumps(again.to_dict())) == json.loads(json.dumps(scan.to_dict()))
    assert again.groups == scan.groups


def test_autoregressive_policies_are_asked_after_the_demonstrated_tokens() -> None:
    policy = openvla(parallel=False)
    seen = observations(10)
    for one in seen:
        object.__setattr__(one, "action", one.action[0])  # type: ignore[index]
    family = FAMILIES["openvla"]
    inputs = family.inputs(policy, seen[0])
    assert family.decide is not None
    decision = family.decide(policy, inputs)
    first = family.run(policy, family.inputs(policy, seen[0]))[0]
    assert decision.output.shape[0] == 4, "one row for each number of the action"
    assert torch.equal(decision.output[-1], first[-1].float())
    scan = vlaquant.sensitivity(policy, recipe(), samples=seen, methods=["measured"])
    assert scan.estimated is None


def test_flow_policies_are_measured_on_their_sampled_action() -> None:
    policy = pi0()
    scan = vlaquant.sensitivity(policy, recipe("expert", samples=2), samples=robot_observations(8))
    assert list(scan.measured or {}) == ["squared", "action_l1"]
    correlation = scan.rank_correlation()
    assert correlation is not None
    assert correlation["all"] > 0.5


def test_layers_outside_of_the_budget() -> None:
    scan = vlaquant.sensitivity(llama(), recipe(layers="*.mlp.*"), samples=WINDOWS, methods=["estimated"])
    assert all(".mlp." in name for one in scan.groups for name in one.names)
    with pytest.raises(PlanError, match="no layer is left"):
        vlaquant.sensitivity(llama(), recipe(layers="*.nothing"), samples=WINDOWS)


def test_dead_layers_are_in_no_group() -> None:
    scan = vlaquant.sensitivity(openvla(), recipe("vision"), samples=observations(10), methods=["estimated"])
    names = [name for one in scan.groups for name in one.names]
    assert names
    assert not any("blocks.2." in name or "attn_pool" in name for name in names)


def test_a_path_without_gradients_cannot_be_estimated() -> None:
    model = Net().eval()

    @torch.no_grad()
    def run(one: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = one(x)
        return out

    samples = [torch.randn(20, 32) for _ in range(3)]
    with pytest.raises(CalibrationError, match="--measured"):
        vlaquant.sensitivity(model, recipe("model"), samples=samples, run=run)
    assert vlaquant.sensitivity(model, recipe("model"), samples=samples, run=run, methods=["measured"]).measured

    def half(one: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            inner = torch.tanh(one.up(x))
        out: Tensor = one.down(inner)
        return out

    with pytest.raises(CalibrationError, match="reaches 1 of 2 layers, such as up"):
        vlaquant.sensitivity(model, recipe("model"), samples=samples, run=half)


def test_nothing_to_scan_with(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="calibration"):
        vlaquant.sensitivity(save_llama(tmp_path / "m", llama()), recipe())
    with pytest.raises(CalibrationError, match="returned NoneType"):
        vlaquant.sensitivity(Net().eval(), recipe("model"), samples=[torch.randn(40, 32)], run=silent)


def silent(model: nn.Module, x: Tensor) -> None:
    model(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["w8a8", "w4a16"]}, "rounds activations"),
        ({"candidates": ["w4a16"]}, "at least two"),
        ({"candidates": ["w5a17", "w4a16"]}, "unknown scheme"),
        ({"bits": 4.0, "size": "1GB"}, "more than one limit"),
        ({"bits": 4.0, "max_action_l1": 0.1}, "more than one limit"),
        ({"size": "much"}, "no size"),
        ({"latency_ms": 3.0}, "go together"),
        ({"bit": 4.0}, "did you mean 'bits'"),
    ],
)
def test_budgets_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(**changes))


def test_positions_are_spread_and_distinct() -> None:
    assert spread(3, 9) == [0, 4, 8]
    assert spread(20, 5) == [0, 1, 2, 3, 4]


def test_decisions_of_families_are_those_of_their_run() -> None:
    policy = openvla()
    family = family_of_model(policy)
    inputs = family.inputs(policy, observations(1)[0])
    assert family.decide is not None
    decision = family.decide(policy, inputs)
    assert torch.equal(decision.output, family.run(policy, inputs)[0, -8:].float())
    assert decision.bins is not None
    assert policy.predict_tokens(inputs["input_ids"], inputs["pixel_values"], count=8).equal(decision.output.argmax(-1))
