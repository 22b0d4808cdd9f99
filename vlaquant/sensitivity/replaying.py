"""Blocks before the one that is rounded answer from stored outputs, so that a group costs what comes after it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vlaquant.calibrate import ActivationCache, Flow
from vlaquant.calibrate.outputs import objection
from vlaquant.calibrate.probing import replaced_forward
from vlaquant.families import Decision


class Replay:
    """Stored outputs of one sample's float run.

    Args:
        model: whose blocks answer.
        flow: what a probe run found: blocks that run once a sample, with nothing but their output left behind.

    Attributes:
        trusted: whether stored outputs gave the same decision, bit for bit; nothing is replayed if not.
    """

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self._model = model
        self._units = [stage.unit for stage in flow.stages if stage.unit in flow.replayable - flow.interleaved]
        self._stage = {name: index for index, stage in enumerate(flow.stages) for name in stage.linears}
        self._turn = {stage.unit: index for index, stage in enumerate(flow.stages)}
        self._cache = ActivationCache()
        self._stored: set[str] = set()
        self.trusted: bool | None = None

    def record(self, run: Callable[[], Decision]) -> Decision:
        """Run the float model, and keep what its blocks return; the first time, see if that gives the same again."""
        self._stored.clear()
        with ExitStack() as stack:
            for unit in self._units if self.trusted is not False else ():
                module = self._model.get_submodule(unit)
                stack.enter_context(replaced_forward(module, self._recorder(unit, module.forward)))
            reference = run()
        if self.trusted is None:
            with self._answering(self._units):
                self.trusted = torch.equal(run().output, reference.output)
        return reference

    @contextmanager
    def before(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, the blocks that come before all of these layers are not computed again."""
        first = min(self._stage[name] for name in names)
        with self._answering([unit for unit in self._units if self._turn[unit] < first]):
            yield

    def _recorder(self, unit: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if objection(output) is None:
                self._cache.put(unit, 0, output)
                self._stored.add(unit)
            return output

        return record

    @contextmanager
    def _answering(self, units: Sequence[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for unit in units if self.trusted is not False else ():
                if unit in self._stored:
                    stack.enter_context(replaced_forward(self._model.get_submodule(unit), self._answer(unit)))
            yield

    def _answer(self, unit: str) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: self._cache.get(unit, 0)
