"""A written checkpoint → a model that holds packed layers. The weights are never expanded to float."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaquant.checkpoint import check_source, read_config, read_manifest, read_tensors, weight_files
from vlaquant.engine.stage import put_tensor_
from vlaquant.errors import CheckpointError
from vlaquant.families import family_called, family_of_config
from vlaquant.linear import empty_linear, empty_table, replace_module_, replace_table_, table_kind
from vlaquant.plan import TablePlan, plan_from_dict


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
        model = family_called(plan.family).build(directory)
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
    for table in plan.replaced_tables.values():
        _replace_table_(model, modules.get(table.name), table)
    return model


def _replace_table_(model: nn.Module, old: nn.Module | None, table: TablePlan) -> None:
    kind = None if old is None else table_kind(old)
    leaf = {"embedding": "weight", "bank": "W"}[table.kind]
    if old is None or kind != table.kind or old.get_parameter(leaf).shape != table.shape:
        raise CheckpointError(
            f"{table.name}: the checkpoint holds a packed {table.kind} {table.shape}, the model has {old}"
        )
    replace_table_(model, table.name, empty_table(old, table.scheme, table.kept))


def _fill_(model: nn.Module, directory: Path) -> None:
    """Give every tensor of the model its value from the file; nothing may be left over on either side."""
    tensors = dict(read_tensors(weight_files(directory)))
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    result = model.load_state_dict(tensors, strict=False, assign=True)
    if result.unexpected_keys:
        raise CheckpointError(
            f"{directory}: holds tensors that the model has not: {', '.join(result.unexpected_keys[:5])}"
        )
    filled = model.state_dict(keep_vars=True)
    for names in tied.values():
        for other in names[1:]:  # the file holds the first; and the others too if they are no longer tied
            if other not in tensors:
                put_tensor_(model, other, filled[names[0]])
    everything = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in everything if tensor.is_meta]
    if empty:
        raise CheckpointError(f"{directory}: lacks tensors that the model needs: {', '.join(empty[:5])}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
