"""One sample, run to learn what the Linears of a model do, before anything is spent on data."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn

from vlaquant.calibrate.flow import Flow, find_flow
from vlaquant.calibrate.provenance import Functions, Operators, Provenance
from vlaquant.calibrate.units import Stage, find_units


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the plain ``nn.Linear`` modules of a model did during one sample, by name.

    Attributes:
        order: those that ran, in the order of their first call.
        calls: how often each ran; 0 for those that did not.
        shared: sets of two or more that read the very same tensors in every call (q/k/v, gate/up), each in call order.
        never_ran: those that were never called: dead, or used functionally.
        functional: those whose weight was computed with outside of their own forward, such as
            ``F.linear(x, lm_head.weight[:n])`` or a weight tied to an embedding. Packing them would break the model.
        flow: how data flows between the units.
    """

    order: tuple[str, ...]
    calls: dict[str, int]
    shared: tuple[tuple[str, ...], ...]
    never_ran: tuple[str, ...]
    functional: tuple[str, ...]
    flow: Flow


def probe(model: nn.Module, run_one: Callable[[], object], units: Sequence[Stage] | None = None) -> ProbeResult:
    """Watch the Linears and units of ``model`` while ``run_one`` takes one sample through it.

    Being watched turns off the fast path of ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``, which reads
    weights without calling their Linears. These look harmless here and have to be left out by type.

    Args:
        model: in evaluation mode.
        run_one: runs the sample.
        units: all of the model's; found if they are not given.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    units = find_units(model) if units is None else units
    provenance = Provenance({name: stage.unit for stage in units for name in stage.linears})
    inputs = _Inputs()
    functions = Functions(linears, provenance)
    with ExitStack() as stack:
        for name, linear in linears.items():
            enter, leave = _call_hooks(name, inputs, functions, provenance)
            stack.callback(linear.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(linear.register_forward_hook(leave, always_call=True).remove)
        for unit in (stage.unit for stage in units):
            module = model.get_submodule(unit)
            stack.enter_context(replaced_forward(module, provenance.wrap(unit, module.forward)))
        stack.enter_context(functions)
        stack.enter_context(Operators(provenance))
        provenance.end(run_one())
    read = inputs.read_by
    return ProbeResult(
        order=tuple(read),
        calls={name: len(read.get(name, ())) for name in linears},
        shared=inputs.shared(),
        never_ran=tuple(name for name in linears if name not in read),
        functional=tuple(name for name in linears if name in functions.used),
        flow=find_flow(units, inputs.sequence, provenance),
    )


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` in place of its own; hooks run as before."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = wraps(module.forward)(forward)
    try:
        yield
    finally:
        # Not setattr and delattr, which search for parameters and submodules first.
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _call_hooks(name: str, inputs: "_Inputs", functions: Functions, provenance: Provenance) -> tuple[Any, Any]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.record(name, args[0] if args else kwargs["input"])
        functions.running.append(name)
        provenance.enter_linear(name)

    def leave(_module: nn.Module, _args: object, _output: object) -> None:
        functions.running.remove(name)
        provenance.leave_linear()

    return enter, leave


class _Inputs:
    """Numbers every tensor that a Linear reads, so that equal numbers mean the very same tensor."""

    def __init__(self) -> None:
        self.sequence: list[str] = []
        self.read_by: dict[str, list[int]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._next = 0

    def record(self, name: str, x: Tensor) -> None:
        self.sequence.append(name)
        self.read_by.setdefault(name, []).append(self._number(x))

    def shared(self) -> tuple[tuple[str, ...], ...]:
        readers: dict[tuple[int, ...], list[str]] = {}
        for name, numbers in self.read_by.items():
            readers.setdefault(tuple(numbers), []).append(name)
        return tuple(tuple(names) for names in readers.values() if len(names) > 1)

    def _number(self, x: Tensor) -> int:
        # Weak references: no activation lives longer than the model lets it, and a reused id is recognized as such.
        version = 0 if x.is_inference() else x._version  # noqa: SLF001  the public way to see a change in place
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1] == version:
            return known[2]
        self._next += 1
        self._known[id(x)] = (weakref.ref(x), version, self._next)
        return self._next
