"""How data flows between the units of a model: which may be answered from a cache, and how long their outputs last."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlaquant.calibrate.provenance import Provenance
from vlaquant.calibrate.units import Stage, order_stages


@dataclass(frozen=True, slots=True)
class Flow:
    """What one sample showed.

    Attributes:
        stages: all units, by the first run of their layers; the ``dead`` ones last.
        dead: units none of whose layers ran.
        interleaved: units one of whose layers runs after a layer of a later stage has begun.
        reasons: unit -> why it must run again once it is finished, for every unit that is not ``replayable``.
        needed_until: replayable unit -> index of the last stage that depends on its output, its own index if none does;
            None if the output is needed for ever.
        touched: replayable units whose output code outside of replayable units computes with.
        nbytes: replayable unit -> size of its output.
    """

    stages: tuple[Stage, ...]
    dead: frozenset[str]
    interleaved: frozenset[str]
    reasons: dict[str, str]
    needed_until: dict[str, int | None]
    touched: frozenset[str]
    nbytes: dict[str, int]

    @property
    def replayable(self) -> frozenset[str]:
        """Units whose output a cache can stand in for."""
        return frozenset(self.needed_until)

    @property
    def bytes_per_sample(self) -> int:
        """The most bytes of outputs that are kept at once between two stages."""
        return max(
            (sum(self.nbytes[unit] for unit in self.kept(index)) for index in range(len(self.stages))), default=0
        )

    def kept(self, index: int) -> tuple[str, ...]:
        """Units whose outputs stages after ``index`` need, once that stage is finished."""
        finished = [stage.unit for stage in self.stages[: index + 1]]
        return tuple(unit for unit in finished if unit in self.needed_until and self.is_needed(unit, index + 1))

    def is_needed(self, unit: str, index: int) -> bool:
        """Whether stage ``index``, or one after it, depends on the output of a replayable unit."""
        last = self.needed_until[unit]
        return last is None or last >= index

    def __str__(self) -> str:
        living = [stage.unit for stage in self.stages if stage.unit not in self.dead]
        again = [unit for unit in living if unit in self.reasons]
        if not again:
            return f"replay: all {len(living)} blocks answer from stored outputs once they are finished"
        why = f"{again[0]}: {self.reasons[again[0]]}" + (f" (and {len(again) - 1} more)" if len(again) > 1 else "")
        if len(again) == len(living):
            return f"rerun: every stage runs the model from the start. {why}"
        return (
            f"replay: {len(living) - len(again)} of {len(living)} blocks answer from stored outputs once they are "
            f"finished, the others run again. {why}"
        )


def find_flow(units: Sequence[Stage], order: Sequence[str], seen: Provenance) -> Flow:
    """What the evidence of a run means for its units.

    Args:
        units: all of the model.
        order: the Linears that ran, in order, one entry a call.
        seen: who made and who read what.
    """
    ran = set(order)
    stages = order_stages(units, tuple(dict.fromkeys(order)))
    dead = frozenset(stage.unit for stage in stages if ran.isdisjoint(stage.linears))
    interleaved = _interleaved(stages, order)
    reasons = _reasons(stages, dead, seen)
    replayable = [stage.unit for stage in stages if stage.unit not in reasons]
    last = {unit: _needed_until(unit, stages, dead, interleaved, reasons, seen) for unit in replayable}
    touched = frozenset(
        unit for unit in replayable if any(reader is None or reader in reasons for reader in seen.readers[unit])
    )
    nbytes = {unit: seen.nbytes[unit] for unit in replayable}
    return Flow(stages, dead, interleaved, reasons, last, touched, nbytes)


def _interleaved(stages: Sequence[Stage], order: Sequence[str]) -> frozenset[str]:
    turn = {name: index for index, stage in enumerate(stages) for name in stage.linears}
    furthest, found = 0, set()
    for name in order:
        if turn[name] < furthest:
            found.add(stages[turn[name]].unit)
        furthest = max(furthest, turn[name])
    return frozenset(found)


def _reasons(stages: Sequence[Stage], dead: frozenset[str], seen: Provenance) -> dict[str, str]:
    reasons = {}
    for unit in (stage.unit for stage in stages):
        calls = seen.calls[unit]
        if unit in dead:
            reasons[unit] = "none of its layers runs"
        elif calls == 0:
            reasons[unit] = "its forward never runs; its layers are called one by one"
        elif calls > 1:
            reasons[unit] = f"its forward runs {calls} times a sample"
        elif unit in seen.reasons:
            reasons[unit] = seen.reasons[unit]
    return reasons


def _needed_until(
    unit: str,
    stages: Sequence[Stage],
    dead: frozenset[str],
    interleaved: frozenset[str],
    reasons: dict[str, str],
    seen: Provenance,
) -> int | None:
    """The last stage that a unit's output reaches, directly or through units that run again."""
    turn = {stage.unit: index for index, stage in enumerate(stages)}
    if unit in seen.exact:
        return None
    last = turn[unit]
    reached, todo = {unit}, [unit]
    while todo:
        origin = todo.pop()
        if any(place is None or place in reasons for place in seen.steered[origin]):
            return None
        if origin in seen.ends:
            last = max(last, _last_to_end(stages, dead, interleaved, reasons))
        for reader in seen.readers[origin] - {None}:
            assert reader is not None
            if reader not in dead:
                last = max(last, turn[reader])
            if reader in reasons and reader not in reached:
                reached.add(reader)
                todo.append(reader)
    return last


def _last_to_end(
    stages: Sequence[Stage], dead: frozenset[str], interleaved: frozenset[str], reasons: dict[str, str]
) -> int:
    """Index of the last stage whose samples run to their end, −1 if none does."""
    living = [stage.unit for stage in stages if stage.unit not in dead]
    to_end = [index for index, unit in enumerate(living) if unit in reasons and unit in {*interleaved, living[-1]}]
    return max(to_end, default=-1)
