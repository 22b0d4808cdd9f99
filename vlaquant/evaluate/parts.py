"""Where the time of one action goes: a clock that modules start and stop as the action runs through them.

Parts are those of the family. Only modules without children are watched, because some code takes another way around a
block that has hooks, and of these only the first and the last of each stretch of one part, which a first action shows.
What lies between two modules of one part, such as attention that is computed by hand, belongs to that part; the rest is
told apart as before, between and after the parts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from vlaquant.evaluate.timing import CLOCKS, synchronize
from vlaquant.families import family_of_model
from vlaquant.models.openvla import OpenVLAForActionPrediction

BEFORE, BETWEEN, AFTER = "before (pre-processing)", "between parts", "after (un-normalise)"
PREFILL, DECODE = "prefill", "decode"


@dataclass(slots=True)
class PartClock:
    """Seconds and calls by part, of one action.

    Attributes:
        device: where the model runs; one that computes in the background is waited for at every border of parts.
        clock: key of :data:`~vlaquant.evaluate.timing.CLOCKS`.
        seconds: part -> seconds.
        visits: (part, module), in the order in which they ran.
    """

    device: str = "cpu"
    clock: str = "wall"
    seconds: dict[str, float] = field(default_factory=dict)
    visits: list[tuple[str, str]] = field(default_factory=list)
    _since: float = 0.0

    def start(self) -> None:
        """The action begins."""
        self._since = self._now()

    def enter(self, part: str, module: str) -> None:
        """A module of a part begins."""
        last = self.visits[-1][0] if self.visits else None
        self._add(BEFORE if last is None else part if last == part else BETWEEN)
        self.visits.append((part, module))

    def leave(self) -> None:
        """The module that began last is done."""
        self._add(self.visits[-1][0])

    def stop(self) -> None:
        """The action is done."""
        self._add(AFTER if self.visits else BEFORE)

    def calls(self, part: str) -> int:
        """How often the action ran through a part: the most visits of one module."""
        modules = [module for visited, module in self.visits if visited == part]
        return max(map(modules.count, set(modules)), default=0)

    def _now(self) -> float:
        synchronize(self.device)
        return CLOCKS[self.clock]()

    def _add(self, part: str) -> None:
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


def part_names(model: nn.Module) -> dict[str, str]:
    """Name -> part, for all modules without children."""
    family = family_of_model(model)
    return {name: family.part_of(name) for name, module in model.named_modules() if not any(module.children())}


def borders(visits: Sequence[tuple[str, str]]) -> set[str]:
    """The modules with which some stretch of one part begins or ends."""
    found: set[str] = set()
    for _, stretch in groupby(visits, key=lambda visit: visit[0]):
        modules = [module for _, module in stretch]
        found |= {modules[0], modules[-1]}
    return found


def decodes(model: Any) -> bool:
    """Whether the policy chooses one token after the other, so that its language model's first pass is the prefill."""
    return isinstance(model, OpenVLAForActionPrediction) and model.config.action_decoding == "autoregressive"


@contextmanager
def clocked(model: nn.Module, modules: dict[str, str], clock: PartClock) -> Iterator[PartClock]:
    """The clock, started, which modules (name -> part) of the model move; it stops at the end.

    With token-by-token policies the language model and its head count as ``prefill`` in their first call and as
    ``decode`` afterwards.
    """
    by_token = decodes(model)
    called: dict[str, int] = {}

    def before(name: str, part: str) -> Any:
        def hook(*_: Any) -> None:
            called[name] = called.get(name, 0) + 1
            if by_token and part in {"language", "action"}:
                clock.enter(PREFILL if called[name] == 1 else DECODE, name)
            else:
                clock.enter(part, name)

        return hook

    def after(*_: Any) -> None:
        clock.leave()

    handles = []
    try:
        for name, part in modules.items():
            module = model.get_submodule(name)
            handles += [module.register_forward_pre_hook(before(name, part)), module.register_forward_hook(after)]
        clock.start()
        yield clock
        clock.stop()
    finally:
        for handle in handles:
            handle.remove()
