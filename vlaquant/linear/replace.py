"""Putting a packed layer in the place of a float one."""

from torch import nn

from vlaquant.errors import PlanError

_READ_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def is_replaceable(root: nn.Module, name: str) -> str | None:
    """Why the module ``name`` of ``root`` cannot be replaced by a packed layer, or None if it can."""
    module = root.get_submodule(name)
    return _objection(root, module, _places(root, module))


def replace_module_(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` stands in ``root``, and at every other place where the same object stands.

    Raises:
        PlanError: there is no such module, or it cannot be replaced.
    """
    try:
        old = root.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"{name} cannot be replaced: {type(root).__name__} has no such module ({error})") from error
    places = _places(root, old)
    reason = _objection(root, old, places)
    if reason is not None:
        raise PlanError(f"{name or 'the model'} cannot be replaced: it {reason}; keep it in float")
    module.train(old.training)
    replace_everywhere_(root, old, module)


def replace_everywhere_(root: nn.Module, old: nn.Module, module: nn.Module) -> None:
    """Put ``module`` at every place in ``root`` where ``old`` stands, whatever they are."""
    for place in _places(root, old):
        parent, _, child = place.rpartition(".")
        setattr(root.get_submodule(parent), child, module)


def _places(root: nn.Module, module: nn.Module) -> list[str]:
    """All names under which ``root`` knows ``module``."""
    return [name for name, other in root.named_modules(remove_duplicate=False) if other is module]


def _objection(root: nn.Module, module: nn.Module, places: list[str]) -> str | None:
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, and only exactly nn.Linear is replaced"
    if module is root:
        return "is the whole model, so there is no place to put another"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "computes its weight (by weight normalization or alike) instead of holding it"
    for place in places:
        parent = root.get_submodule(place.rpartition(".")[0])
        if isinstance(parent, _READ_DIRECTLY):
            return f"belongs to a {type(parent).__name__}, which reads the weight itself"
    return None
