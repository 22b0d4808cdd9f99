"""Who shares statistics: never wrongly, whatever comes first; and samples that are split over processes."""

import types
from collections.abc import Sequence

import pytest
import torch
from oracles import mutant
from torch import Tensor, nn
from watched import assert_same, linear_names, model_and_samples, run_all

from vlaquant.calibrate import ActStats, Observation, observe
from vlaquant.calibrate import observation as real_observation
from vlaquant.calibrate.statistics import RunningStats, final_stats, merge


def check_sharing(module: types.ModuleType) -> None:
    """Statistics of layers observed together equal, to the last bit, those of each observed alone."""
    model, samples = model_and_samples()
    names = linear_names(model)

    def seen(names: Sequence[str]) -> dict[str, ActStats]:
        with module.observe(model, names, hessian_for=names, sample_rows=9) as observation:
            for sample in samples:
                model.reset()
                observation.begin_sample()
                model(sample)
                if sample is not samples[0]:  # so that "odd" parts from the others late, in the middle of a sample
                    model(sample * 3.0)
        return observation.stats()

    together = seen(names)
    for name in names:
        if "unused" in name:
            assert name not in together
        else:
            assert_same(together[name], seen([name])[name])


def test_shared_statistics_equal_unshared_ones() -> None:
    check_sharing(real_observation)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if group.behind:\n            self._part(group)", "if False:\n            pass"),
        ("name in group.behind and _equal(rows, group.pending)", "name in group.behind"),
        ("None if group.running is None else group.running.copy()", "None"),
        ("else group.running.copy()", "else group.running"),
        ("running=running, pending=None", "running=running, calls=0, pending=None"),
        ("= list(group.settled), list(group.keys)", "= [], []"),
        ("= list(group.settled), list(group.keys)", "= group.settled, group.keys"),
        ("group.behind = group.members - {name}", "group.behind = set()"),
    ],
)
def test_comparison_notices_wrong_sharing(old: str, new: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check_sharing(mutant(real_observation, old, new))


def check_processes(module: types.ModuleType) -> None:
    """Two observations of every other sample each, merged, equal one of all; every sample has several calls."""
    model, samples = model_and_samples()
    names = [name for name in linear_names(model) if "unused" not in name]

    def seen(indices: Sequence[int]) -> Observation:
        with module.observe(model, names, hessian_for=names, sample_rows=9) as observation:
            for index in indices:
                model.reset()
                observation.begin_sample(index=index)
                model(samples[index])
                model(samples[index] * 2.0)
        return observation

    alone, (first, second) = seen(range(4)).stats(), (seen(indices).running() for indices in ([3, 1], [0, 2]))
    for name in names:
        assert_same(merge(first[name], second[name]).stats(), alone[name])


def test_samples_can_be_split_over_processes() -> None:
    check_processes(real_observation)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sample=self._sample or 0", "sample=0"),
        ("call=group.calls))", "call=0))"),
        ("group.calls = 0", "pass"),
        ("running = None if group", "self._count(group)\n        running = None if group"),
        ("self._count_all()\n        if index is None", "if index is None"),
    ],
)
def test_comparison_notices_draws_that_depend_on_other_samples(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_processes(mutant(real_observation, old, new))


def test_small_calls_are_counted_together_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    add = RunningStats.add_

    def noted(self: RunningStats, rows: Tensor, keys: Tensor, weights: Tensor | None) -> None:
        counted.append(len(rows))
        add(self, rows, keys, weights)

    monkeypatch.setattr(RunningStats, "add_", noted)
    model, x = nn.ModuleList([nn.Linear(4, 2)]), torch.randn(70, 4)
    with observe(model, ["0"], hessian_for=["0"]) as observation:
        for calls in (6, 2):
            observation.begin_sample()
            for _ in range(calls):
                model[0](x)
        model[0](torch.randn(300, 4))
    stats = observation.stats()["0"]
    assert counted == [280, 140, 440]
    assert stats.tokens == 860


def test_layers_that_part_late_keep_what_they_shared() -> None:
    model, x = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]), torch.ones(300, 4)
    with observe(model, ["0", "1"], hessian_for=["0", "1"]) as observation:
        for factor in (1.0, 2.0):
            observation.begin_sample()
            model[0](x)
            model[1](x * factor)
    running = observation.running()
    assert running["0"] is not running["1"]
    means = {name: float(stats.mean_abs[0]) for name, stats in final_stats(running).items()}
    assert means == {"0": 1.0, "1": 1.5}


def test_layers_that_always_read_the_same_share() -> None:
    model, samples = model_and_samples()
    names = linear_names(model)
    with observe(model, names, hessian_for=names) as observation:
        run_all(model, samples, observation)
    shared, stats = observation.shared(), observation.stats()
    for block in ("blocks.0", "blocks.1"):
        assert {name: shared[f"{block}.{name}"] for name in "qkv"} == dict.fromkeys("qkv", f"{block}.q")
        assert shared[f"{block}.up"] == f"{block}.gate"
        assert shared[f"{block}.odd"] == f"{block}.odd"
        assert stats[f"{block}.q"] is stats[f"{block}.v"]
        assert f"{block}.unused" not in shared


def test_one_call_is_not_enough_to_share() -> None:
    model, samples = model_and_samples()
    with observe(model, linear_names(model)) as observation:
        run_all(model, samples[:1], observation)
        assert observation.shared()["blocks.0.odd"] == "blocks.0.gate"
        observation.begin_sample()
        model(samples[1])
    assert observation.shared()["blocks.0.odd"] == "blocks.0.odd"
