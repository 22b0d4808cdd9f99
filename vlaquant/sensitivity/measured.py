"""Measured sensitivity: round one group of layers, run, and see how far the decision moves."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from vlaquant.calibrate import Flow
from vlaquant.calibrate.running import blamed_on
from vlaquant.errors import CalibrationError
from vlaquant.sensitivity.effects import Policy, each_sample, effect, rounded_
from vlaquant.sensitivity.groups import Group
from vlaquant.sensitivity.replaying import Replay
from vlaquant.sensitivity.rounding import Codes

#: Effect by name -> [groups][candidates], means over samples.
Effects = dict[str, list[list[float]]]


@torch.inference_mode()
def measure(
    model: nn.Module,
    policy: Policy,
    samples: Sequence[Any],
    positions: Sequence[int],
    groups: Sequence[Group],
    codes: Codes,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    flow: Flow | None = None,
) -> Effects:
    """The effect of each group in each candidate, all other layers being float, averaged over samples.

    Each sample costs 1 + groups · candidates forward passes, from the rounded group on where ``flow`` allows that. Only
    one sample's float decision, and the outputs of its blocks, are kept.

    Raises:
        CalibrationError: the model gives NaN.
    """
    sums: dict[str, torch.Tensor] = {}
    replay = None if flow is None else Replay(model, flow)
    for position, prepared in progress(each_sample(policy, samples, positions)):
        with blamed_on(position):
            run = partial(policy.measure, model, prepared)
            reference = run() if replay is None else replay.record(run)
        for g, group in enumerate(groups):
            with nullcontext() if replay is None else replay.before(group.names):
                for c, weights in enumerate(codes.values()):
                    with rounded_(model, group.names, weights), blamed_on(position):
                        found = effect(reference, run())
                    for name, value in found.items():
                        zeros = torch.zeros(len(groups), len(codes), dtype=torch.float64)
                        sums.setdefault(name, zeros)[g, c] += value / len(positions)
    for name, values in sums.items():
        if not bool(values.isfinite().all()):
            raise CalibrationError(f"the {name} of the rounded model is NaN: check the weights and the dtype")
    return {name: values.tolist() for name, values in sums.items()}
