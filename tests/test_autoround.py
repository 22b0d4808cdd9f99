"""AutoRound against a naive version, against the codes it starts from, and against broken copies of itself."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from oracles import correlated_inputs, mutant, naive_autoround, naive_hessian, random_weight
from torch import Tensor

from vlaquant.numerics import QuantizedWeight
from vlaquant.passes import autoround as real
from vlaquant.passes.autoround import autoround, start_from
from vlaquant.passes.gptq import gptq
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.scheme import Granularity, QuantSpec

#: No sum of steps ends where a code's interval does, so that float32 and float64 round alike.
_RATE = 0.1237
N, K, SAMPLES, TOKENS = 16, 32, 6, 24
SPECS = {
    "w2 group": QuantSpec(bits=2, granularity=Granularity.GROUP, group_size=16),
    "w3 channel": QuantSpec(bits=3, granularity=Granularity.CHANNEL),
    "w4 group asym": QuantSpec(bits=4, granularity=Granularity.GROUP, group_size=8, symmetric=False),
    "w4 tensor": QuantSpec(bits=4, granularity=Granularity.TENSOR),
}
GROUPED = [name for name in SPECS if "tensor" not in name]


class TwoLayers:
    """x → down(relu(up(x))) + x: a block whose layers have to be looked at together."""

    def __init__(self, seed: int = 0) -> None:
        self.inputs = correlated_inputs(SAMPLES * TOKENS, K, seed).reshape(SAMPLES, TOKENS, K)
        self.weights = {"up": random_weight(N, K, seed), "down": random_weight(K, N, seed + 1)}
        self.samples = SAMPLES
        self.drawn: list[list[int]] = []

    def error(self, weights: Mapping[str, Tensor], batch: Sequence[int]) -> Tensor:
        x = self.inputs[list(batch)].to(weights["up"].dtype)
        outputs = [torch.relu(x @ w["up"].T.to(x)) @ w["down"].T.to(x) + x for w in (weights, self.weights)]
        return (outputs[0] - outputs[1]).square().sum()

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        return float(self.error(weights, range(SAMPLES)))

    def gradients(self, weights: Mapping[str, Tensor], batch: Sequence[int]) -> dict[str, Tensor]:
        self.drawn.append(list(batch))
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            self.error(leaves, batch).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def by_gptq(block: TwoLayers, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> dict[str, QuantizedWeight]:
    x = block.inputs.reshape(-1, K)
    hidden = torch.relu(x @ block.weights["up"].T)
    hessians = {"up": naive_hessian(x).float(), "down": naive_hessian(hidden).float()}
    return {
        name: gptq(weight, hessians[name], spec, scale_dtype=dtype, clip="mse").weight
        for name, weight in block.weights.items()
    }


def begin(
    module: types.ModuleType, block: TwoLayers, starts: Mapping[str, QuantizedWeight]
) -> dict[str, real.Rounding]:
    return {name: module.start_from(block.weights[name], start) for name, start in starts.items()}


def full(values: Tensor | None, start: QuantizedWeight) -> Tensor:
    if values is None:
        return torch.zeros(start.codes.shape)
    return values.float().repeat_interleave(start.codes.shape[1] // values.shape[1], dim=1)


def check_oracle(module: types.ModuleType, spec: QuantSpec, *, ranges: bool) -> None:
    """Equal offsets and weights, but where a gradient is next to nothing: few steps, as differences grow."""
    block = TwoLayers()
    # The largest weight of a group lies on the edge of its code's interval: a tie for float32 and float64
    starts = {name: replace(start, scale=1.003 * start.scale) for name, start in by_gptq(block, spec).items()}
    layers = begin(module, block, starts)
    module.autoround(layers, block, iterations=4, rate=_RATE, batch=2, ranges=ranges)
    offsets, rounded = naive_autoround(
        list(block.weights.values()),
        [(s.codes, full(s.scale, s), full(s.zero, s)) for s in starts.values()],
        spec,
        lambda weights, batch: block.error(dict(zip(block.weights, weights, strict=True)), batch),
        block.drawn,
        rate=_RATE,
        edge=real._EDGE,
        ranges=ranges,
    )
    for layer, offset, weight in zip(layers.values(), offsets, rounded, strict=True):
        mine = layer.offset.reshape(weight.shape)
        assert ((mine - offset).abs() < 1e-4).double().mean() > 0.97
        assert mine.abs().max() > 0.1
        assert (layer.rounded() - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "fixed ranges"])
@pytest.mark.parametrize("spec", GROUPED)
def test_matches_naive_version(spec: str, ranges) -> None:
    check_oracle(real, SPECS[spec], ranges=ranges)


def check_all(module: types.ModuleType) -> None:
    for spec in GROUPED:
        check_oracle(module, SPECS[spec], ranges=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.offset.sub_(", "self.offset.add_("),
        ("self.factor.sub_(", "self.factor.add_("),
        ("rate * (1.0 - step / iterations)", "rate"),
        (".sub_(scaled.mul_(inside))", ""),
        (".clamp_(low, high)", ""),
        ("gradient.sign().mul_(inside)", "gradient.sign()"),
    ],
)
def test_the_oracle_notices(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_all(mutant(real, old, new))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_it_begins_with_the_very_codes_it_was_given(spec: str, dtype: torch.dtype) -> None:
    block = TwoLayers()
    for name, start in by_gptq(block, SPECS[spec], dtype).items():
        again = start_from(block.weights[name], start).quantized()
        assert torch.equal(again.codes, start.codes)
        assert torch.equal(again.scale, start.scale)
        assert (again.zero is None) == (start.zero is None)
        if start.zero is not None and again.zero is not None:
            assert torch.equal(again.zero, start.zero)


def test_weights_in_the_middle_of_their_interval_are_not_moved() -> None:
    weight = random_weight(N, K, 0)
    rounded = round_to_nearest(weight, SPECS["w3 channel"], scale_dtype=torch.float32)
    moved = start_from(weight, rounded).weight.reshape(weight.shape)
    far = (weight / rounded.scale - rounded.codes).abs()
    assert torch.allclose(moved[far < 0.5 - real._EDGE], weight[far < 0.5 - real._EDGE])
    assert ((moved / rounded.scale - rounded.codes).abs() <= torch.maximum(far, torch.tensor(0.5))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_the_block_gets_better(spec: str, dtype: torch.dtype) -> None:
    """From plain rounding, mean over seeds of the block's loss; and what is returned has the loss that is returned."""
    shares = []
    for seed in range(3):
        block = TwoLayers(seed)
        plain = {n: round_to_nearest(w, SPECS[spec], scale_dtype=dtype) for n, w in block.weights.items()}
        result = autoround(begin(real, block, plain), block, iterations=100, batch=4)
        again = block.loss({name: weight.dequantize() for name, weight in result.weights.items()})
        assert again == pytest.approx(result.loss, rel=1e-4)
        assert all(weight.scale.dtype == dtype for weight in result.weights.values())
        shares.append(result.loss / result.loss_start)
    assert sum(shares) / len(shares) < 0.7


def test_never_worse_than_the_start() -> None:
    block = TwoLayers()
    starts = by_gptq(block, SPECS["w4 group asym"])
    result = autoround(begin(real, block, starts), block, iterations=2, rate=1.0, batch=1)
    assert result.loss <= result.loss_start
    if result.iteration == 0:
        assert all(torch.equal(result.weights[name].codes, start.codes) for name, start in starts.items())


def test_a_loss_that_only_grows_gives_back_the_start() -> None:
    block = TwoLayers()
    starts = by_gptq(block, SPECS["w2 group"])
    right = block.gradients
    block.gradients = lambda weights, batch: {n: -g for n, g in right(weights, batch).items()}  # type: ignore[method-assign]
    result = autoround(begin(real, block, starts), block, iterations=30, batch=4)
    assert (result.iteration, result.loss) == (0, result.loss_start)
    assert all(torch.equal(result.weights[name].codes, start.codes) for name, start in starts.items())


def test_every_sample_has_its_turn_and_the_seed_decides() -> None:
    drawn = []
    for seed in (0, 0, 1):
        block = TwoLayers()
        autoround(begin(real, block, by_gptq(block, SPECS["w2 group"])), block, iterations=9, batch=4, seed=seed)
        drawn.append(block.drawn)
    flat = [sample for batch in drawn[0] for sample in batch]
    assert all(sorted(flat[start : start + SAMPLES]) == list(range(SAMPLES)) for start in range(0, 36, SAMPLES))
    assert drawn[0] == drawn[1] != drawn[2]
