"""Stages run one after the other: replay sees the same as rerun, to the last bit, and costs one block a stage."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import flowing
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from watched import hook_count

from vlaquant.calibrate import observe
from vlaquant.calibrate.cache import ActivationCache
from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.probing import probe
from vlaquant.calibrate.running import Mode, StageRunner
from vlaquant.errors import CalibrationError

KINDS = ["llama", "openvla", *flowing.MODELS]
Seen = dict[tuple[str, int, int], Tensor]


def flow_of(model: nn.Module, samples: list[Any], run: Callable[[Any, Any], Any]) -> Flow:
    with torch.inference_mode():
        return probe(model, lambda: run(model, samples[0])).flow


def runner_of(
    kind: str, mode: Mode = "replay", run: Callable[[Any, Any], Any] | None = None
) -> tuple[StageRunner, Any]:
    model, samples, runs = flowing.made(kind)
    flow = flow_of(model, samples, runs)
    return StageRunner(model, flow, run or runs, mode=mode, cache=ActivationCache()), (model, samples, flow)


@contextmanager
def recording(model: nn.Module, names: tuple[str, ...], sample: int, seen: Seen) -> Iterator[None]:
    """What the Linears ``names`` read, by name, sample and turn."""
    turns: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def record(_: nn.Module, args: tuple[Tensor]) -> None:
            seen[name, sample, turns[name]] = args[0].clone()
            turns[name] += 1

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    yield
    for handle in handles:
        handle.remove()


def coarsen_(model: nn.Module, names: tuple[str, ...]) -> None:
    """Stands for quantization: later stages must see it."""
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        with torch.no_grad():
            weight.copy_((weight * 8).round() / 8)


def staged(kind: str, mode: Mode, *, change: Callable[[Flow], Flow] = lambda flow: flow, **limits: Any) -> Seen:
    """All stages with all samples, each changed when it is done; what its layers read while it was the stage."""
    model, samples, run = flowing.made(kind)
    flow = change(flow_of(model, samples, run))
    runner = StageRunner(model, flow, run, mode=mode, cache=ActivationCache(**limits))
    seen: Seen = {}
    with torch.inference_mode():
        for index, stage in enumerate(flow.stages):
            for position, sample in enumerate(samples):
                with recording(model, stage.linears, position, seen):
                    runner.run(index, position, sample, store=False)
            coarsen_(model, stage.linears)
            for position, sample in enumerate(samples):
                runner.run(index, position, sample, store=True)
            runner.finished(index)
            assert set(flow.kept(index)) >= {unit for unit, _ in _kept(runner.cache)}
    assert hook_count(model) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())
    return seen


def _kept(cache: ActivationCache) -> list[tuple[str, int]]:
    return [key for key, entry in cache._entries.items() if entry.kept]


def assert_same(left: Seen, right: Seen) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_replay_sees_what_rerun_sees(kind: str) -> None:
    replayed = staged(kind, "replay")
    assert_same(replayed, staged(kind, "rerun"))
    model, samples, run = flowing.made(kind)
    flow = flow_of(model, samples, run)
    living = {name for stage in flow.stages if stage.unit not in flow.dead for name in stage.linears}
    assert {name for name, _, _ in replayed} == living
    assert all(torch.isfinite(tensor).all() for tensor in replayed.values())


def test_replay_sees_the_change_of_earlier_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = staged("plain", "replay")
    monkeypatch.setitem(globals(), "coarsen_", lambda model, names: None)
    unchanged = staged("plain", "replay")
    assert torch.equal(changed["embed", 0, 0], unchanged["embed", 0, 0])
    assert not torch.equal(changed["head", 0, 0], unchanged["head", 0, 0])


@pytest.mark.parametrize("kind", ["between", "passing", "piecewise", "selecting", "openvla"])
def test_spilled_outputs_are_the_same(kind: str, tmp_path: Path) -> None:
    spilled = staged(kind, "replay", limit_bytes=600, spill_directory=tmp_path / "spill")
    assert_same(spilled, staged(kind, "rerun"))
    assert (tmp_path / "spill").is_dir()


@pytest.mark.parametrize("kind", ["keeping", "caching", "looping", "changing", "aliasing", "noisy", "outside_layer"])
def test_a_unit_that_is_wrongly_called_replayable_is_caught(kind: str) -> None:
    """Replay is tried where the probe said that it must not be: the comparison, or the runner, sees it."""
    model, samples, run = flowing.made(kind)
    dead = flow_of(model, samples, run).dead

    def all_replayable(flow: Flow) -> Flow:
        last: dict[str, int | None] = {stage.unit: None for stage in flow.stages if stage.unit not in dead}
        return replace(flow, reasons={}, needed_until=last, nbytes=dict.fromkeys(last, 0))

    def compare() -> None:
        assert_same(staged(kind, "replay", change=all_replayable), staged(kind, "rerun"))

    with pytest.raises((AssertionError, CalibrationError, AttributeError, RuntimeError)):
        compare()


@pytest.mark.parametrize("kind", ["skipping", "between", "piecewise", "towers"])
def test_an_output_that_goes_too_early_is_poison(kind: str) -> None:
    """A flow that forgets one reader gives NaN to a layer, and the observer names it."""
    runner, (model, samples, flow) = runner_of(kind)
    late = {unit: last for unit, last in flow.needed_until.items() if last is not None}
    unit = max(late, key=lambda name: late[name] - [stage.unit for stage in flow.stages].index(name))
    last = late[unit]
    wrong = replace(flow, needed_until=flow.needed_until | {unit: last - 1})
    runner = StageRunner(model, wrong, flowing.call, mode="replay", cache=ActivationCache())
    with torch.inference_mode():
        for index in range(last):
            runner.run(index, 0, samples[0], store=True)
        observing = observe(model, flow.stages[last].linears)
        with observing, pytest.raises(CalibrationError, match="NaN"):
            runner.run(last, 0, samples[0], store=False)


class _Computed(TorchFunctionMode):
    """Which Linears really compute: hooks also fire where an answer stands in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self._owner = {id(module.weight): name for name, module in model.named_modules() if type(module) is nn.Linear}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.names.append(self._owner[id(args[1])])
        return func(*args, **(kwargs or {}))


def computed(model: nn.Module, runner: StageRunner, index: int, sample: Any) -> list[str]:
    """The Linears that compute while a stage runs."""
    with _Computed(model) as seen:
        runner.run(index, 0, sample, store=True)
    return seen.names


@pytest.mark.parametrize("kind", [*flowing.REPLAYABLE, "swallowing"])
def test_replay_costs_one_block_a_stage(kind: str) -> None:
    runner, (model, samples, flow) = runner_of(kind)
    living = [stage for stage in flow.stages if stage.unit not in flow.dead]
    with torch.inference_mode():
        for index, stage in enumerate(living):
            calls = computed(model, runner, index, samples[0])
            assert sorted(calls) == sorted(stage.linears)
    # The result of the last is never read, and may be large
    assert (living[-1].unit, 0) not in _kept(runner.cache)


def test_rerun_costs_everything_up_to_the_stage() -> None:
    runner, (model, samples, flow) = runner_of("plain", "rerun")
    before: list[str] = []
    for index, stage in enumerate(flow.stages):
        before += stage.linears
        assert computed(model, runner, index, samples[0]) == before
    assert runner.cache.bytes_in_memory == 0


def test_a_mixture_runs_only_the_others_again() -> None:
    runner, (model, samples, flow) = runner_of("piecewise")
    for index, stage in enumerate(flow.stages):
        calls = computed(model, runner, index, samples[0])
        again = [name for each in flow.stages[:index] if each.unit in flow.reasons for name in each.linears]
        assert sorted(calls) == sorted([*again, *stage.linears])


def test_run_returns_what_the_stage_computes() -> None:
    runner, (model, samples, flow) = runner_of("plain")
    x = model.embed(samples[0])
    assert torch.equal(_run(runner, 0, samples[0]), x)
    assert torch.equal(_run(runner, 1, samples[0]), model.blocks[0](x))
    rerun = StageRunner(model, flow, flowing.call, mode="rerun", cache=ActivationCache())
    assert torch.equal(_run(rerun, 0, samples[0]), model.blocks[0].norm(x))
    assert torch.equal(_run(rerun, len(flow.stages) - 1, samples[0]), model(samples[0]))
    dead = replace(flow, dead=frozenset({"embed"}))
    assert StageRunner(model, dead, _fail, mode="replay", cache=ActivationCache()).run(0, 0, None, store=True) is None


def _run(runner: StageRunner, index: int, sample: Any) -> Tensor:
    output = runner.run(index, 0, sample, store=True)
    assert output is not None
    return output


def _fail(model: nn.Module, sample: Any) -> None:
    raise AssertionError("this must not run")


def test_runner_says_which_units_need_no_weights() -> None:
    answering: list[set[str]] = []

    def run(model: nn.Module, sample: Any) -> object:
        answering.append({stage.unit for stage in flow.stages if runner.answers(stage.unit)})
        return model(sample)

    runner, (_, samples, flow) = runner_of("piecewise", run=run)
    for index in range(len(flow.stages)):
        runner.run(index, 0, samples[0], store=True)
    assert answering[0] == set()
    assert answering[3] == {"embed", "tower.embed", "tower.blocks.0"}
    assert answering[10] == {"embed", "tower.embed", "tower.head", *(f"tower.blocks.{index}" for index in range(3))}
    assert not any(runner.answers(stage.unit) for stage in flow.stages)
    assert runner.summary().startswith("replay: 7 of 11 blocks")
    assert runner_of("plain", "rerun")[0].summary().startswith("rerun: every stage")


@pytest.mark.parametrize("mode", ["replay", "rerun"])
def test_an_error_of_the_model_leaves_it_clean(mode: Mode) -> None:
    runner, (model, samples, _) = runner_of("plain", mode)
    runner.run(0, 0, samples[0], store=True)

    def broken(x: Tensor) -> Tensor:
        raise ValueError("broken")

    model.blocks[0].forward = broken
    with pytest.raises(CalibrationError, match="sample 0 does not go through the model: ValueError: broken"):
        runner.run(1, 0, samples[0], store=True)
    assert model.blocks[0].__dict__["forward"] is broken
    assert "forward" not in model.embed.__dict__
    assert hook_count(model) == 0
    assert not runner.answers("embed")


def test_a_stop_that_the_model_swallows_has_happened_all_the_same() -> None:
    def run(model: nn.Module, sample: Tensor) -> object:
        try:
            return model(sample)
        except BaseException:
            return None

    runner, (model, samples, _) = runner_of("plain", run=run)
    assert torch.equal(_run(runner, 0, samples[0]), model.embed(samples[0]))
    assert torch.equal(_run(runner, 1, samples[0]), model.blocks[0](model.embed(samples[0])))


def test_a_stop_of_another_runner_goes_through() -> None:
    inner, (_, samples, _) = runner_of("plain", "rerun")
    outer, (model, _, _) = runner_of("plain")
    inner._model = model
    ended: list[object] = []
    outer._run = lambda model, sample: ended.append(inner.run(4, 0, sample, store=False))
    assert torch.equal(_run(outer, 0, samples[0]), model.embed(samples[0]))
    assert ended == []


def test_an_output_of_another_kind_is_refused() -> None:
    runner, (model, samples, _) = runner_of("plain")
    model.embed.forward = lambda x: {1.5: x}
    with pytest.raises(CalibrationError, match="embed returned a dict with keys that are neither str nor int"):
        runner.run(0, 1, samples[1], store=True)


def test_samples_that_go_another_way_are_refused() -> None:
    def twice(model: Any, sample: Tensor) -> Any:
        return model(model.embed(sample))

    def never(model: Any, sample: Tensor) -> Any:
        return model.head(sample)

    runner, (_, samples, _) = runner_of("plain", run=twice)
    runner.run(0, 0, samples[0], store=True)
    with pytest.raises(CalibrationError, match=r"embed ran 2 times in sample 0.*mode rerun"):
        runner.run(1, 0, samples[0], store=True)
    runner, _ = runner_of("plain", run=never)
    with pytest.raises(CalibrationError, match="embed did not run in sample 2"):
        runner.run(0, 2, samples[0], store=True)


def test_a_stage_that_was_left_out_is_named() -> None:
    runner, (_, samples, _) = runner_of("plain")
    runner.run(0, 0, samples[0], store=False)
    with pytest.raises(CalibrationError, match="output of embed for sample 0 is not stored"):
        runner.run(1, 0, samples[0], store=True)


def test_stopping_frees_the_activations_of_the_run() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def run(model: Any, sample: Tensor) -> Any:
        local = sample * 2.0
        alive.append(weakref.ref(local))
        return model(local)

    runner, (_, samples, _) = runner_of("plain", "rerun", run)
    gc.disable()
    try:
        with torch.inference_mode():
            output = runner.run(2, 0, samples[0], store=False)
        assert output is not None
        assert [ref() for ref in alive] == [None]
    finally:
        gc.enable()


def test_random_numbers_are_the_same_in_every_run_of_a_sample() -> None:
    drawn: dict[int, list[Tensor]] = {}

    def run(model: Any, sample: tuple[int, Tensor]) -> Any:
        noise = torch.randn(3)
        drawn.setdefault(sample[0], []).append(noise)
        return model(sample[1])

    runner, (_, samples, _) = runner_of("plain", run=run)
    state = torch.get_rng_state()
    for index in range(3):
        for position, sample in enumerate(samples):
            runner.run(index, position, (position, sample), store=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(noise, noises[0]) for noises in drawn.values() for noise in noises)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_replay_goes_on_from_a_saved_cache(tmp_path: Path) -> None:
    runner, (model, samples, flow) = runner_of("skipping")
    with torch.inference_mode():
        for index in range(3):
            for position, sample in enumerate(samples):
                runner.run(index, position, sample, store=True)
            runner.finished(index)
        runner.cache.save(tmp_path / "chain")
        again = StageRunner(model, flow, flowing.call, mode="replay", cache=ActivationCache())
        again.cache.restore_(tmp_path / "chain")
        for index in range(3, len(flow.stages)):
            for position, sample in enumerate(samples):
                wanted = runner.run(index, position, sample, store=True)
                got = again.run(index, position, sample, store=True)
                assert wanted is not None
                assert got is not None
                assert torch.equal(got, wanted)


def test_forward_of_other_hooks_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate hangs its hooks on ``forward`` of the instance; they run, and stay."""
    runner, (model, samples, _) = runner_of("plain")
    calls: list[str] = []
    for name in ("embed", "blocks.0"):
        module = model.get_submodule(name)
        real = module.forward

        def hooked(x: Tensor, name: str = name, real: Callable[..., Tensor] = real) -> Tensor:
            calls.append(name)
            return real(x)

        monkeypatch.setattr(module, "forward", hooked)
    runner.run(0, 0, samples[0], store=True)
    runner.run(1, 0, samples[0], store=True)
    assert calls == ["embed", "blocks.0"]
    assert model.embed.__dict__["forward"].__name__ == "hooked"
