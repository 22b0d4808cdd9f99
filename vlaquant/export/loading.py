"""A written checkpoint → a model that holds packed layers. The weights are never expanded to float."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaquant.checkpoint import check_source, read_config, read_manifest, read_tensors, weight_files
from vlaquant.errors import CheckpointError
from vlaquant.families import FAMILIES, family_of_config
from vlaquant.linear import empty_linear, replace_module_
from vlaquant.plan import plan_from_dict


def load(directory: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """The model of a directory, ready to run: packed if vlaquant quantized it, float if it is a source checkpoint.

    Args:
        directory: what ``vlaquant quantize`` wrote, or a float checkpoint of a known family.
        model: the float model to fill in place, for classes that vlaquant cannot build; its Linears are replaced.

    Raises:
        CheckpointError: incomplete, damaged, of no known family, or with tensors that the model does not have.
    """
    directory = Path(directory)
    config = read_config(directory)
    if "quantization_config" not in config and model is None:
        check_source(directory)
        return family_of_config(config).load(directory)
    return load_packed(directory, read_manifest(directory), model=model)


def load_packed(directory: Path, manifest: dict[str, Any], *, model: nn.Module | None = None) -> nn.Module:
    """:func:`load` for a directory whose manifest has been read."""
    model = packed_skeleton(directory, manifest, model=model)
    _fill_(model, directory)
    return model.eval()


def packed_skeleton(directory: Path, manifest: dict[str, Any], *, model: nn.Module | None = None) -> nn.Module:
    """The model with empty packed layers; on the meta device, unless a ``model`` to be changed is given.

    Raises:
        CheckpointError: the manifest does not fit the model.
    """
    plan = plan_from_dict(manifest["plan"])
    if model is None:
        model = FAMILIES[plan.family].build(directory)
    modules = dict(model.named_modules())
    for name, layer in plan.quantized.items():
        old = modules.get(name)
        if type(old) is not nn.Linear or (old.out_features, old.in_features) != layer.shape:
            raise CheckpointError(f"{name}: the checkpoint holds a packed layer {layer.shape}, the model has {old}")
        assert layer.scheme is not None
        with torch.device("meta"):
            new = empty_linear(
                old.in_features, old.out_features, layer.scheme, bias=old.bias is not None, dtype=old.weight.dtype
            )
        replace_module_(model, name, new)
    return model


def _fill_(model: nn.Module, directory: Path) -> None:
    """Give every tensor of the model its value from the file; nothing may be left over on either side."""
    tensors = dict(read_tensors(weight_files(directory)))
    result = model.load_state_dict(tensors, strict=False, assign=True)
    if result.unexpected_keys:
        raise CheckpointError(
            f"{directory}: holds tensors that the model has not: {', '.join(result.unexpected_keys[:5])}"
        )
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    everything = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in everything if tensor.is_meta]
    if empty:
        raise CheckpointError(f"{directory}: lacks tensors that the model needs: {', '.join(empty[:5])}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
