"""Who made every tensor of one run, and who reads it: the evidence for answering blocks from a cache.

A *unit* is running while its ``forward`` runs; otherwise the code *outside* of all units is, which is ``None`` here.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlaquant.calibrate.outputs import objection, tensors_in, with_tensors

#: Functions that hand out values without any operator.
_LEAVING = {"__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage"}
_NO_UNITS: frozenset[str] = frozenset()


class Provenance:
    """What is known so far; the hooks of :func:`~vlaquant.calibrate.probing.probe` and two modes feed it.

    Attributes:
        reasons: unit -> why a cache cannot stand in for it, the first that was found.
        calls: unit -> how often its forward ran.
        readers: unit -> who computed with something that depends on its output; None for the code outside.
        steered: unit -> where such values left torch or chose something (``.item()``, ``argmax``, a comparison).
        exact: units whose output holds tensors that are not floating point.
        nbytes: unit -> size of its output.
        ends: units on whose output the result of the run depends.
    """

    def __init__(self, unit_of: dict[str, str]) -> None:
        self.reasons: dict[str, str] = {}
        self.calls: dict[str, int] = dict.fromkeys(unit_of.values(), 0)
        self.readers: defaultdict[str, set[str | None]] = defaultdict(set)
        self.steered: defaultdict[str, set[str | None]] = defaultdict(set)
        self.exact: set[str] = set()
        self.nbytes: dict[str, int] = {}
        self.ends: frozenset[str] = _NO_UNITS
        self.paused = False
        self._unit_of = unit_of
        self._running: list[str | None] = []
        self._objects: dict[int, tuple[weakref.ref[Tensor], str | None]] = {}
        # By address, which is not used again as long as the weak reference is held; and neither is the memory.
        self._storages: dict[int, tuple[StorageWeakRef | None, str | None]] = {}
        self._depends: defaultdict[int, frozenset[str]] = defaultdict(frozenset)
        self._returned: defaultdict[str, set[int]] = defaultdict(set)
        self._aliased: defaultdict[int, set[str]] = defaultdict(set)

    def wrap(self, unit: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of a unit, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._enter(unit)
            self.calls[unit] += 1
            before = self._random_state()
            try:
                output = forward(*args, **kwargs)
            finally:
                self._running.pop()
            if self._random_state() != before:
                self._object(unit, "it draws random numbers, and everything drawn after it would change")
            with self._pause():
                given_out = self._give_out(unit, output)
                self._forget_dead_storages()
                return given_out

        return watched

    def enter_linear(self, name: str) -> None:
        """A Linear is about to run; one that is called without its unit counts as the unit."""
        unit = self._unit_of[name]
        if unit in (name, self._context):
            self._running.append(self._context)
        else:
            self._object(unit, f"its layer {name} is called outside of its forward")
            self._enter(unit)

    def leave_linear(self) -> None:
        """The Linear has run."""
        self._running.pop()

    def end(self, result: object) -> None:
        """The run returned ``result``."""
        with self._pause():
            self.ends = self._dependence(tensors_in(result))

    def function(self, name: str, given: Iterable[Tensor], result: Iterable[Tensor]) -> None:
        """A torch function ran, or a question about a tensor was answered."""
        with self._pause():
            given = [] if _is_birth(name) else list(given)
            for tensor in given:
                self._see(tensor)
            for tensor in result:
                self._register(tensor, self._context)
            if name in _LEAVING:
                self._read(self._dependence(given), steers=True)

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operator of torch ran."""
        with self._pause():
            name = func.__name__
            made, given = list(tensors_in(result)), [] if _is_birth(name) else list(tensors_in([args, kwargs]))
            for tensor in given:
                self._see(tensor)
            for tensor in made:
                self._register(tensor, self._context)
            steers = (not made and result is not None) or not all(tensor.is_floating_point() for tensor in made)
            depends = self._dependence(given)
            if name.startswith("new_") or "_like." in name:
                steers, depends = False, _NO_UNITS  # takes the shape only
            self._read(depends, steers=steers)
            passed_on = depends if self._context is None else frozenset({self._context})
            # A view has no values of its own: looking at what all units share makes none of them depend on another
            known = {self._storage(tensor) for tensor in given}
            for tensor in made:
                if self._storage(tensor) not in known:
                    self._depends[self._storage(tensor)] |= passed_on
            for tensor in _written(func, args, kwargs):
                self._write(tensor, passed_on)
            if any(isinstance(value, Generator) for value in (*args, *kwargs.values())) and self._context is not None:
                self._object(self._context, "it draws random numbers, and everything drawn after it would change")

    @property
    def _context(self) -> str | None:
        return self._running[-1] if self._running else None

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Our own operations are not part of the run."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _random_state(self) -> list[bytes]:
        generators = [torch.default_generator]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            generators += torch.cuda.default_generators
        with self._pause():
            return [bytes(generator.get_state().numpy()) for generator in generators]

    def _object(self, unit: str, reason: str) -> None:
        self.reasons.setdefault(unit, reason)

    def _enter(self, unit: str) -> None:
        around = self._context
        if around is not None:
            self._object(around, f"it runs layers of {unit}")
            self._object(unit, f"{around} runs it")
        self._running.append(unit)

    def _give_out(self, unit: str, output: Any) -> Any:
        """The output in new tensors on the same memory: what is read by another way than these was not returned."""
        found = objection(output)
        if found is not None:
            self._object(unit, f"its forward returns {found}, which cannot be stored")
            return output
        seen: set[int] = set()
        self.nbytes[unit] = sum(tensor.nbytes for tensor in tensors_in(output))
        for tensor in tensors_in(output):
            address = self._storage(tensor)
            if address in seen or self._storages[address][1] != unit:
                self._aliased[address].add(unit)
            seen.add(address)
            self._depends[address] |= {unit}
            if not tensor.is_floating_point():
                self.exact.add(unit)
        self._returned[unit] |= seen
        given_out = with_tensors(output, torch.ops.aten.alias.default)
        for tensor in tensors_in(given_out):
            self._objects[id(tensor)] = (weakref.ref(tensor), None)
        return given_out

    def _forget_dead_storages(self) -> None:
        """Let go of memory that only the weak references keep: nobody can read it any more."""
        dead = {address for address, (memory, _) in self._storages.items() if memory is not None and memory.expired()}
        for address in dead:
            del self._storages[address]
            self._depends.pop(address, None)
            self._aliased.pop(address, None)
        for addresses in self._returned.values():
            addresses.difference_update(dead)

    def _see(self, tensor: Tensor) -> None:
        """Somebody holds ``tensor``: if its unit did not return it, the unit cannot be replaced by what it returned."""
        known = self._objects.get(id(tensor))
        if known is None or known[0]() is not tensor:
            maker = self._storages[self._storage(tensor)][1]
            if maker is not None and self._storage(tensor) in self._returned[maker]:
                maker = None
            self._register(tensor, maker)
        else:
            maker = known[1]
        if maker not in (None, self._context) and not isinstance(tensor, nn.Parameter):
            assert maker is not None
            reader = self._context or "code outside of the blocks"
            self._object(maker, f"{reader} reads a tensor that {maker} made and did not return")

    def _register(self, tensor: Tensor, maker: str | None) -> None:
        known = self._objects.get(id(tensor))
        if known is None or known[0]() is not tensor:
            self._objects[id(tensor)] = (weakref.ref(tensor), maker)
        self._storage(tensor, maker)

    def _storage(self, tensor: Tensor, maker: str | None = None) -> int:
        memory = _memory(tensor)
        # Tensors without memory of their own (sparse, functorch's) stand for themselves.
        address = -id(tensor) if memory is None else int(memory.cdata)
        if address not in self._storages:
            self._storages[address] = (memory, maker)
        return address

    def _dependence(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        return _NO_UNITS.union(*(self._depends[self._storage(tensor)] for tensor in tensors))

    def _read(self, depends: frozenset[str], *, steers: bool) -> None:
        for unit in depends:
            if unit != self._context:
                self.readers[unit].add(self._context)
            if steers:
                self.steered[unit].add(self._context)

    def _write(self, tensor: Tensor, depends: frozenset[str]) -> None:
        address = self._storage(tensor)
        if self._context is not None and self._storages[address][1] != self._context:
            self._object(self._context, "it changes in place a tensor that it did not make")
        for unit in self._aliased.get(address, ()):
            changer = self._context or "code outside of the blocks"
            self._object(unit, f"it returns a tensor whose memory is known elsewhere too, and {changer} changes it")
        self._depends[address] |= depends


class Functions(TorchFunctionMode):
    """Sees every torch function, and notes which Linear's weight goes into one outside of that Linear's forward."""

    def __init__(self, linears: dict[str, nn.Linear], provenance: Provenance) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.running: list[str] = []
        self._provenance = provenance
        self._linears = linears
        self._owners: dict[int, tuple[weakref.ref[Tensor], list[str]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._provenance.paused:
            return result
        given, made = list(tensors_in([args, kwargs])), list(tensors_in(result))
        # Questions about dtype, device or shape do not answer with a tensor; they are harmless.
        for tensor in given if made else ():
            self.used.update(name for name in self._owned_by(tensor) if name not in self.running)
        self._provenance.function(getattr(func, "__name__", ""), given, made)
        return result

    def _owned_by(self, tensor: Tensor) -> list[str]:
        """Linears whose weight this is now: weights may come and go while the sample runs."""
        if not isinstance(tensor, nn.Parameter):
            return []
        known = self._owners.get(id(tensor))
        if known is None or known[0]() is not tensor:
            names = [name for name, linear in self._linears.items() if linear._parameters.get("weight") is tensor]  # noqa: SLF001
            known = self._owners[id(tensor)] = (weakref.ref(tensor), names)
        return known[1]


class Operators(TorchDispatchMode):
    """Sees every operator below the functions, and so what is changed in place, also in inference mode."""

    supports_higher_order_operators = True

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._provenance = provenance

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._provenance.paused:
            self._provenance.operator(func, args, kwargs, result)
        return result


def _is_birth(name: str) -> bool:
    """Whether an operator announces a tensor that was made without one, from Python numbers or numpy."""
    return name.startswith("lift_fresh")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator changes in place, as its schema says."""
    schema = getattr(func, "_schema", None)
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[index] if index < len(args) else kwargs.get(argument.name))


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
