"""The units of a model: the blocks that are calibrated, cached and written one after the other.

Found from the modules alone, so that it works on the meta device and before any data is seen.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Stage:
    """One unit and its layers.

    Attributes:
        unit: name of the module, empty only where the whole model is one Linear.
        linears: names of the Linears in it, in module order.
    """

    unit: str
    linears: tuple[str, ...]


def find_units(model: nn.Module) -> tuple[Stage, ...]:
    """Every Linear of ``model`` in exactly one unit, in module order.

    Units are the items of the outermost lists of blocks (``model.layers.3``), and of what holds no such list the
    largest modules that can run as a whole (``projector``), down to a single Linear. A module that is known under two
    names counts under the first.
    """
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stages = []
    for unit, module in _units("", model):
        # What two units share belongs to the first.
        linears = tuple(names.pop(id(inner)) for inner in module.modules() if id(inner) in names)
        if linears:
            stages.append(Stage(unit, linears))
    return tuple(stages)


def order_stages(units: Sequence[Stage], order: Sequence[str]) -> tuple[Stage, ...]:
    """The units by the first run of any of their layers, given the layers in the order in which they first ran.

    Units none of whose layers ran come last, in the order given.
    """
    turn = {name: index for index, name in enumerate(order)}
    never = len(turn)
    return tuple(sorted(units, key=lambda stage: min((turn.get(name, never) for name in stage.linears), default=never)))


def _units(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Units at or below ``module``, which is the model, or is no unit as a whole."""
    if isinstance(module, nn.Linear):
        yield name, module
        return
    blocks = _is_list_of_blocks(module)
    for key, child in module.named_children():
        if not _has_linear(child):
            continue
        inner = f"{name}.{key}" if name else key
        # Containers without a forward cannot be a unit, wherever they stand.
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if container or (not blocks and any(_is_list_of_blocks(below) for below in child.modules())):
            yield from _units(inner, child)
        else:
            yield inner, child


def _is_list_of_blocks(module: nn.Module) -> bool:
    """A ModuleList with something bigger than a Linear in it, or a Sequential of at least two such things of one class.

    Lists of bare Linears (the layers of an MLP, the output of an attention) are part of the module that runs them.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    kinds = Counter(type(item) for item in module if not isinstance(item, nn.Linear) and _has_linear(item))
    return max(kinds.values(), default=0) >= (1 if isinstance(module, nn.ModuleList) else 2)


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules())
