"""How a model decides, and how far one decision is from another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate.running import blamed_on
from vlaquant.engine.opening import Run
from vlaquant.errors import CalibrationError
from vlaquant.families import Decision, Family
from vlaquant.numerics import QuantizedWeight

#: Action tokens stand for bins of [-1, 1].
_RANGE = 2.0


@dataclass(frozen=True, slots=True)
class Policy:
    """The ways to run one sample: ``prepare(sample)`` once, then both of the others with what it gave.

    Attributes:
        prepare: a sample -> what goes into the model.
        decide: the pass that gradients go through.
        measure: the real path of the policy, with fixed noise; the same as ``decide`` where tokens are chosen.
    """

    prepare: Callable[[Any], Any]
    decide: Callable[[nn.Module, Any], Decision]
    measure: Callable[[nn.Module, Any], Decision]


def policy_of(model: nn.Module, family: Family, run: Run | None) -> Policy:
    """How the family, or the caller's ``run``, decides."""
    if run is not None:
        return Policy(lambda sample: sample, *2 * (lambda one, sample: _numbers(run(one, sample)),))
    act, decide = family.act, family.decide

    def prepare(sample: Any) -> Any:
        return family.inputs(model, sample)

    def by_run(one: nn.Module, inputs: Any) -> Decision:
        return _numbers(family.run(one, inputs))

    def by_decision(one: nn.Module, inputs: Any) -> Decision:
        decision = (decide or by_run)(one, inputs)
        return decision if decision.tokens or act is None else _numbers(act(one, inputs))

    return Policy(prepare, decide or by_run, by_decision)


def _numbers(output: object) -> Decision:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise CalibrationError(
            f"run(model, sample) returned {type(output).__name__}; sensitivity needs the tensor that the model's "
            "answer is, so that it can see how far it moves"
        )
    return Decision(output.reshape(-1, output.shape[-1]).float(), tokens=False)


def effect(reference: Decision, other: Decision) -> dict[str, float]:
    """How far a decision moved; the first figure is the one that sensitivities add up.

    Tokens: ``divergence``, the Kullback-Leibler divergence from the reference, nats a token. Where they are bins also
    ``bin_distance``, between the expected bins, and ``action_l1``, between the likeliest ones in [-1, 1]. Numbers:
    ``squared`` and ``action_l1``, mean squared and mean absolute differences.
    """
    if not reference.tokens:
        difference = (other.output - reference.output).double()
        return {"squared": float(difference.square().mean()), "action_l1": float(difference.abs().mean())}
    # In float64: a divergence is the small difference of large sums
    p, q = reference.output.double().log_softmax(-1), other.output.double().log_softmax(-1)
    found = {"divergence": max(float(((p - q) * p.exp()).sum(-1).mean()), 0.0)}
    if reference.bins is not None:
        bins = reference.bins.to(p.dtype)
        width = _RANGE / float(bins.max() - bins.min())
        found["bin_distance"] = float(((q.exp() - p.exp()) @ bins).abs().mean())
        found["action_l1"] = width * float((bins[q.argmax(-1)] - bins[p.argmax(-1)]).abs().mean())
    return found


@contextmanager
def rounded_(model: nn.Module, names: Sequence[str], codes: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Inside, these layers compute with what their codes stand for."""
    layers = [model.get_submodule(name) for name in names]
    before = [layer.weight for layer in layers]
    try:
        for name, layer, weight in zip(names, layers, before, strict=True):
            assert isinstance(weight, Tensor)
            layer.weight = nn.Parameter(codes[name].dequantize(weight.dtype), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = weight


def each_sample(policy: Policy, samples: Sequence[Any], positions: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Position and prepared inputs of some samples; errors name the sample."""
    for position in positions:
        with blamed_on(position):
            prepared = policy.prepare(samples[position])
        yield position, prepared


def spread(count: int, of: int) -> list[int]:
    """``count`` positions evenly over ``of``, all of them if there are no more."""
    return sorted({round(position) for position in torch.linspace(0, of - 1, min(count, of)).tolist()})
