"""One sample, run to learn what the Linears of a model do, before anything is spent on data."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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
    """

    order: tuple[str, ...]
    calls: dict[str, int]
    shared: tuple[tuple[str, ...], ...]
    never_ran: tuple[str, ...]
    functional: tuple[str, ...]


def probe(model: nn.Module, run_one: Callable[[], object]) -> ProbeResult:
    """Watch the Linears of ``model`` while ``run_one`` takes one sample through it.

    Being watched turns off the fast path of ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``, which reads
    weights without calling their Linears. These look harmless here and have to be left out by type.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    inputs = _Inputs()
    weights = _WeightUse(linears)
    with ExitStack() as stack:
        for name, linear in linears.items():
            enter, leave = _call_hooks(name, inputs, weights)
            stack.callback(linear.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(linear.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(weights)
        run_one()
    read = inputs.read_by
    return ProbeResult(
        order=tuple(read),
        calls={name: len(read.get(name, ())) for name in linears},
        shared=inputs.shared(),
        never_ran=tuple(name for name in linears if name not in read),
        functional=tuple(name for name in linears if name in weights.used),
    )


def _call_hooks(name: str, inputs: "_Inputs", weights: "_WeightUse") -> tuple[Any, Any]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.record(name, args[0] if args else kwargs["input"])
        weights.running.append(name)

    def leave(_module: nn.Module, _args: object, _output: object) -> None:
        weights.running.remove(name)

    return enter, leave


class _Inputs:
    """Numbers every tensor that a Linear reads, so that equal numbers mean the very same tensor."""

    def __init__(self) -> None:
        self.read_by: dict[str, list[int]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._next = 0

    def record(self, name: str, x: Tensor) -> None:
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


class _WeightUse(TorchFunctionMode):
    """Sees every torch function, and notes which Linear's weight goes into one outside of that Linear's forward."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.running: list[str] = []
        self._owners: dict[int, list[str]] = {}
        for name, linear in linears.items():
            self._owners.setdefault(id(linear.weight), []).append(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Questions about dtype, device or shape do not answer with a tensor; they are harmless.
        if any(True for _ in _tensors(result)):
            for tensor in _tensors([args, kwargs]):
                owners = self._owners.get(id(tensor), ())
                self.used.update(name for name in owners if name not in self.running)
        return result


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
