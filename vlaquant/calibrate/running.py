"""One sample, run as far as a stage needs: finished units answer from the cache, and what comes later is cut off."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlaquant.calibrate.cache import ActivationCache
from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.outputs import objection, tensors_in
from vlaquant.calibrate.probing import replaced_forward
from vlaquant.errors import CalibrationError, VlaquantError

Mode = Literal["replay", "rerun"]

#: Rows of an output that are compared; a change of the weights shows in all of them.
_SEEN_ROWS = 256


class _Stop(BaseException):  # not an Exception: no `except Exception` of a model may swallow it
    """The stage is done; ``value`` is what the run gives."""

    reached = False
    value: Any = None

    def at_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the layer before which the run ends."""
        self.value, self.reached = args[0] if args else kwargs["input"], True
        raise self


class _Seen:
    """What Linears gave, by name: a part for each call."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def by(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """A hook for the Linear ``name``."""

        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self.parts.setdefault(name, []).append(_some_rows(output))

        return keep


def _some_rows(tensor: Tensor) -> Tensor:
    """A copy of [..., n] as [rows, n], of many rows some from everywhere."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    return rows[:: -(-len(rows) // _SEEN_ROWS) or 1].clone()


class StageRunner:
    """Runs samples stage by stage.

    Args:
        model: its layers may be changed and exchanged between runs; the names of ``flow`` must stay.
        flow: what a probe run found.
        run: ``run(model, sample)`` takes one whole sample through the model.
        mode: ``replay`` lets finished units answer from the cache where the flow allows it; ``rerun`` never does.
        cache: for the outputs of finished units.
        seed: torch's random numbers are the same in every run of a sample, whatever ran before.
        chain: of several runners that share a cache each has its own outputs there, under this name.

    Attributes:
        cache: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        flow: Flow,
        run: Callable[[Any, Any], object],
        *,
        mode: Mode,
        cache: ActivationCache,
        seed: int = 0,
        chain: str = "",
    ) -> None:
        self.cache = cache
        self._model = model
        self._flow = flow
        self._run = run
        self._mode = mode
        self._seed = seed
        self._chain = chain
        self._answering: set[str] = set()

    def summary(self) -> str:
        """How samples will go through the model, and why, in a sentence or two."""
        return str(self._flow) if self._mode == "replay" else "rerun: every stage runs the model from the start"

    def answers(self, unit: str) -> bool:
        """Whether a unit answers from the cache just now, so that it needs no weights."""
        return unit in self._answering

    def run(
        self, stage_index: int, sample_index: int, sample: Any, *, store: bool, before: str | None = None
    ) -> Tensor | None:
        """Run a sample up to and including a stage.

        Args:
            stage_index: into the flow's stages; samples must have been stored for all stages before it.
            sample_index: names the sample in the cache.
            sample: what ``run`` takes.
            store: put the output of the stage's unit into the cache, if a later stage needs it.
            before: a layer of the stage; the run ends, with what this layer would read, when it is about to run.

        Returns:
            A floating-point tensor that shows what the stage computes: the first one that its unit returned; where the
            unit does not return once, what goes into the next stage, or the result of the whole run. None if there is
            no such tensor, or none of the stage's layers runs.

        Raises:
            CalibrationError: the sample takes another way through the model than the sample of the probe run; an output
                that is not in the cache.
        """
        unit = self._flow.stages[stage_index].unit
        if unit in self._flow.dead:
            return None
        stop = _Stop()
        with ExitStack() as stack:
            if self._mode == "replay":
                self._answer_finished(stack, stage_index, sample_index)
            if self._replays(unit):
                self._stop_after(stack, stage_index, sample_index, stop, store=store)
            elif unit not in self._flow.interleaved:
                self._stop_before_later(stack, stage_index, stop)
            if before is not None:
                # After the hooks of an observation, which has to see what the layer reads
                hook = self._model.get_submodule(before).register_forward_pre_hook(stop.at_input, with_kwargs=True)
                stack.callback(hook.remove)
            result = self._run_until(stop, sample, sample_index)
        if stop.reached:
            return next((tensor for tensor in tensors_in(stop.value) if tensor.is_floating_point()), None)
        if self._replays(unit):
            raise _another_way(f"{unit} did not run", sample_index)
        return result if isinstance(result, Tensor) and result.is_floating_point() else None

    def outputs(self, stage_index: int, sample_index: int, sample: Any) -> dict[str, Tensor]:
        """What a stage computes, to be compared with what it computes once its weights are others.

        Args:
            stage_index: as for :meth:`run`.
            sample_index: as there.
            sample: as there.

        Returns:
            Floating-point tensors, the same in either mode. By its name, what each Linear of the stage gave, [rows, n],
            up to some hundred rows of each call. By other names, what the rest of the model can see: what the unit
            returned if it is one that can be answered from a cache, for then there is nothing else; or else (it leaves
            something in a cache, it runs several times) the result of the whole run.
        """
        stage = self._flow.stages[stage_index]
        if stage.unit in self._flow.dead:
            return {}
        stop, seen = _Stop(), _Seen()
        with ExitStack() as stack:
            if self._mode == "replay":
                self._answer_finished(stack, stage_index, sample_index)
            for name in stage.linears:
                layer = self._model.get_submodule(name)
                stack.callback(layer.register_forward_hook(seen.by(name)).remove)
            if stage.unit in self._flow.replayable:
                self._stop_after(stack, stage_index, sample_index, stop, store=False)
            result = self._run_until(stop, sample, sample_index)
        tensors = {name: torch.cat(parts) for name, parts in seen.parts.items()}
        ends = (end for end in tensors_in(stop.value if stop.reached else result) if end.is_floating_point())
        whose = stage.unit if stop.reached else "the whole run"
        return tensors | {f"{whose} ({number})": _some_rows(end) for number, end in enumerate(ends)}

    def call(self, stage_index: int, sample_index: int, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the unit of a stage is called with, which must be one that replays; it does not run."""
        unit = self._flow.stages[stage_index].unit
        assert self._replays(unit), unit
        stop = _Stop()

        def caught(*args: Any, **kwargs: Any) -> None:
            stop.value, stop.reached = (args, kwargs), True
            raise stop

        with ExitStack() as stack:
            self._answer_finished(stack, stage_index, sample_index)
            stack.enter_context(replaced_forward(self._model.get_submodule(unit), caught))
            self._run_until(stop, sample, sample_index)
        if not stop.reached:
            raise _another_way(f"{unit} did not run", sample_index)
        args, kwargs = stop.value
        return args, kwargs

    def finished(self, stage_index: int) -> None:
        """Drop the outputs that no stage after this one needs."""
        kept = self._flow.kept(stage_index)
        for stage in self._flow.stages[: stage_index + 1]:
            if stage.unit not in kept:
                self.cache.drop(self._key(stage.unit))

    def _key(self, unit: str) -> str:
        """The name of a unit's outputs in the cache."""
        return f"{self._chain}{unit}"

    def _replays(self, unit: str) -> bool:
        return self._mode == "replay" and unit in self._flow.replayable

    def _run_until(self, stop: _Stop, sample: Any, sample_index: int) -> object:
        """The result of the run; None if it was stopped."""
        with seeded(self._seed + sample_index):
            try:
                with blamed_on(sample_index):
                    return self._run(self._model, sample)
            except _Stop as caught:
                if caught is not stop:
                    raise
                # Its frames hold the activations of the whole run
                stop.__traceback__ = stop.__context__ = None
                return None

    def _answer_finished(self, stack: ExitStack, stage_index: int, sample_index: int) -> None:
        stack.callback(self._answering.clear)
        for stage in self._flow.stages[:stage_index]:
            if stage.unit in self._flow.replayable:
                answer = self._answer(stage.unit, stage_index, sample_index)
                stack.enter_context(replaced_forward(self._model.get_submodule(stage.unit), answer))
                self._answering.add(stage.unit)

    def _answer(self, unit: str, stage_index: int, sample_index: int) -> Callable[..., Any]:
        calls = 0

        def answer(*_args: object, **_kwargs: object) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise _another_way(f"{unit} ran {calls} times", sample_index)
            if self._flow.is_needed(unit, stage_index):
                return self.cache.get(self._key(unit), sample_index)
            return self.cache.placeholder(self._key(unit), sample_index, dense=unit in self._flow.touched)

        return answer

    def _stop_after(self, stack: ExitStack, stage_index: int, sample_index: int, stop: _Stop, *, store: bool) -> None:
        """Stop as soon as the stage's unit has returned."""
        unit = self._flow.stages[stage_index].unit
        module = self._model.get_submodule(unit)
        forward = module.forward

        def last(*args: Any, **kwargs: Any) -> Any:
            stop.value, stop.reached = forward(*args, **kwargs), True
            if store:
                found = objection(stop.value)
                if found is not None:
                    raise _another_way(f"{unit} returned {found}", sample_index)
                needed = self._flow.is_needed(unit, stage_index + 1)
                (self.cache.put if needed else self.cache.put_outline)(self._key(unit), sample_index, stop.value)
            raise stop

        stack.enter_context(replaced_forward(module, last))

    def _stop_before_later(self, stack: ExitStack, stage_index: int, stop: _Stop) -> None:
        """Stop when a layer of a later stage is about to run."""
        for stage in self._flow.stages[stage_index + 1 :]:
            for name in stage.linears:
                layer = self._model.get_submodule(name)
                # First of all hooks: the layer needs no weights any more
                stack.callback(layer.register_forward_pre_hook(stop.at_input, with_kwargs=True, prepend=True).remove)


def _another_way(what: str, sample_index: int) -> CalibrationError:
    return CalibrationError(
        f"{what} in sample {sample_index}, which the sample of the probe run did not show; samples that go different "
        "ways through the model need the mode rerun"
    )


@contextmanager
def blamed_on(sample_index: int) -> Iterator[None]:
    """What the model raises becomes a CalibrationError that names the sample."""
    try:
        yield
    except (VlaquantError, MemoryError):
        raise
    except Exception as error:
        raise CalibrationError(
            f"sample {sample_index} does not go through the model: {type(error).__name__}: {error}; take it out of the "
            "calibration data, or mend the function that runs it"
        ) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Whatever is drawn inside comes from ``seed``, and what is drawn after is as if nothing had been."""
    generators = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
