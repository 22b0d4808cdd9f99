"""Weights on demand: a model without weights whose units get theirs when they are about to run."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate.units import Stage
from vlaquant.checkpoint import TensorFiles, require_finite
from vlaquant.engine.stage import put_tensor_
from vlaquant.linear import QuantLinear, W4A16Linear, empty_linear, replace_module_
from vlaquant.scheme import Scheme


def names_differ(model: nn.Module, files: TensorFiles) -> str | None:
    """Why the tensors of ``files`` cannot be given to ``model`` one by one under their names; None if they can."""
    wanted = model.state_dict(keep_vars=True)
    held = {id(tensor) for name, tensor in wanted.items() if name in files}
    missing = [name for name, tensor in wanted.items() if tensor.is_meta and id(tensor) not in held]
    if missing:
        return f"{len(missing)} tensors of the model are not in the files under the same name, such as {missing[0]}"
    left = [name for name in files.names() if name not in wanted]
    if left:
        return f"{len(left)} tensors of the files have no place in the model, such as {left[0]}"
    wrong = [name for name in files.names() if files[name].shape != tuple(wanted[name].shape)]
    if wrong:
        return f"{wrong[0]} has the shape {files[wrong[0]].shape} in the files, {tuple(wanted[wrong[0]].shape)} wanted"
    cast = [name for name in files.names() if files[name].dtype != wanted[name].dtype]
    if cast:
        return f"{cast[0]} is {files[cast[0]].dtype} in the files, {wanted[cast[0]].dtype} wanted"
    return None


@dataclass(slots=True, eq=False)
class _Unit:
    """Tensors that come and go together.

    Attributes:
        names: of its own tensors in the float model.
        files: where they are now: the source, or the file of the finished stage.
        packed: layers that are quantized by now.
        held: stays in memory.
        fresh: was never in memory before, so its values have not been looked at.
    """

    names: tuple[str, ...]
    files: TensorFiles
    packed: dict[str, Scheme] = field(default_factory=dict)
    held: bool = False
    fresh: bool = True


class WeightsOnDemand:
    """Gives the units of a model on the meta device their weights, and takes them away again.

    What belongs to no unit (embeddings, norms between blocks), or to several, is loaded for good at once. A finished
    unit comes back with the *values* of its packed weights in plain Linears, which is the same function without
    unpacking at each call; layers that round their input come back packed.

    Args:
        model: on the meta device, as ``Family.build`` makes it. It is changed.
        stages: all units.
        source: the float checkpoint.
        budget: see the attribute.
        device: where weights go.

    Attributes:
        budget: bytes of units to keep; the one that is needed comes in whatever its size.
        dormant: unit name -> whether its forward is replaced at the moment, so that it needs no weights.

    Raises:
        CheckpointError: here and later: a tensor with NaN or Inf, or a file that changed.
    """

    def __init__(
        self, model: nn.Module, stages: Sequence[Stage], source: TensorFiles, *, budget: int, device: torch.device
    ) -> None:
        self.dormant: Callable[[str], bool] = lambda unit: False
        self._model = model
        self._source = source
        self.budget = budget
        self._device = device
        self._empty = model.state_dict(keep_vars=True)
        own = _own_tensors(self._empty, [stage.unit for stage in stages])
        self._units = {unit: _Unit(names, source) for unit, names in own.items()}
        self._resident: OrderedDict[str, int] = OrderedDict()
        outside = _Unit(tuple(name for name in self._empty if not any(name in names for names in own.values())), source)
        self._load_(outside)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))
        self._hooks = [
            module.register_forward_pre_hook(self._bring(unit))
            for unit in self._units
            for module in model.get_submodule(unit).modules()
        ]

    def close(self) -> None:
        """Remove the hooks; the model stays as it is."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def hold(self, unit: str) -> Iterator[None]:
        """The unit's weights are there and stay, whatever else is needed, until the block ends."""
        self._units[unit].held = True
        self.need(unit)
        yield
        # Not after an error, which may leave a unit with half of its layers exchanged
        self._units[unit].held = False
        self._trim(None)

    def need(self, unit: str) -> None:
        """Bring in a unit, and send away the least recently used ones beyond the budget."""
        if unit in self._resident:
            self._resident.move_to_end(unit)
            return
        self._resident[unit] = self._load_(self._units[unit])
        self._trim(unit)

    def _trim(self, needed: str | None) -> None:
        """Send away what was not needed for longest until the budget is met."""
        for old in list(self._resident):
            if sum(self._resident.values()) <= self.budget:
                return
            if old != needed and not self._units[old].held:
                self._release_(old)

    def take_(self, module: str) -> dict[str, Tensor]:
        """The float tensors of a module of its own that something else takes the place of; they do not come back."""
        names = [name for name in self._empty if name.rpartition(".")[0] == module]
        taken = {}
        for name in names:
            file_name = self._file_name(name, self._source)
            tensor = self._source.read(file_name)
            require_finite(name, tensor, self._source[file_name].file.parent)
            taken[name.rpartition(".")[2]] = tensor.to(self._empty[name].dtype)
        gone = {id(self._empty[name]) for name in names}
        for unit in self._units.values():
            unit.names = tuple(name for name in unit.names if id(self._empty[name]) not in gone)
        return taken

    def finish_(self, unit: str, files: TensorFiles, packed: Mapping[str, Scheme]) -> None:
        """From now on the unit's weights come from ``files``, in which the layers ``packed`` are quantized."""
        entry = self._units[unit]
        entry.files, entry.packed = files, dict(packed)
        self._release_(unit)
        for name, scheme in packed.items():
            if scheme.activation is None:
                continue
            old = self._model.get_submodule(name)
            if type(old) is nn.Linear:
                replace_module_(self._model, name, _empty_like(old, scheme))
            # The hook went with the Linear, and who calls a unit's layers one by one never calls the unit
            new = self._model.get_submodule(name)
            self._hooks.append(new.register_forward_pre_hook(self._bring(unit)))

    def _bring(self, unit: str) -> Callable[[nn.Module, Any], None]:
        def bring(_module: nn.Module, _args: Any) -> None:
            if not self.dormant(unit):
                self.need(unit)

        return bring

    @torch.inference_mode(False)  # noqa: FBT003  tensors made in it could not be changed later
    @torch.no_grad()
    def _load_(self, unit: _Unit) -> int:
        """Fill a unit's tensors; returns their bytes."""
        total = 0
        for name, scheme in unit.packed.items():
            total += self._load_packed_(name, scheme, unit.files)
        for name in unit.names:
            owner, _, leaf = name.rpartition(".")
            if owner in unit.packed and (leaf == "weight" or unit.packed[owner].activation is not None):
                continue
            file_name = self._file_name(name, unit.files)
            tensor = unit.files.read(file_name)
            if unit.fresh:
                require_finite(name, tensor, unit.files[file_name].file.parent)
            total += self._fill_(name, tensor)
        unit.fresh = False
        return total

    def _file_name(self, name: str, files: TensorFiles) -> str:
        """Under which name the file holds a tensor: its own, or that of one it is tied to."""
        if name in files:
            return name
        return next(other for other, tensor in self._empty.items() if tensor is self._empty[name] and other in files)

    def _fill_(self, name: str, tensor: Tensor) -> int:
        empty = self._empty[name]
        tensor = tensor.to(device=self._device, dtype=empty.dtype)
        full = nn.Parameter(tensor, requires_grad=False) if isinstance(empty, nn.Parameter) else tensor
        for place in (other for other, its in self._empty.items() if its is empty):
            put_tensor_(self._model, place, full)
        return tensor.nbytes

    def _load_packed_(self, name: str, scheme: Scheme, files: TensorFiles) -> int:
        prefix = f"{name}."
        tensors = {key.removeprefix(prefix): files.read(key) for key in files.names() if key.startswith(prefix)}
        tensors = {key: tensor.to(self._device) for key, tensor in tensors.items()}
        module = self._model.get_submodule(name)
        layer = module if scheme.activation is not None else _empty_like(module, scheme)
        layer.load_state_dict(tensors, assign=True)
        if isinstance(layer, W4A16Linear):
            weight = nn.Parameter(layer.dequantize(), requires_grad=False)
            put_tensor_(self._model, f"{name}.weight", weight)
            return weight.nbytes
        return sum(tensor.nbytes for tensor in tensors.values())

    def _release_(self, unit: str) -> None:
        if self._resident.pop(unit, None) is None:
            return
        for name, scheme in self._units[unit].packed.items():
            if scheme.activation is not None:
                self._model.get_submodule(name).to("meta")
        for name in self._units[unit].names:
            owner, _, _ = name.rpartition(".")
            if owner not in self._units[unit].packed or self._units[unit].packed[owner].activation is None:
                put_tensor_(self._model, name, self._empty[name])


def _own_tensors(tensors: Mapping[str, Tensor], units: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Names of the tensors that lie in one unit, and are not shared with anything outside of it."""
    owners: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        owners.setdefault(id(tensor), set()).add(name)
    own = {}
    for unit in units:
        inside = {name for name in tensors if name.startswith(f"{unit}.")}
        own[unit] = tuple(name for name in tensors if name in inside and owners[id(tensors[name])] <= inside)
    return own


def _empty_like(linear: nn.Module, scheme: Scheme) -> QuantLinear:
    """A packed layer without values for the place of a Linear."""
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        return empty_linear(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
        )
