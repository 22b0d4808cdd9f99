"""Embeddings and banks of a run: in place before the first stage, so that all later ones see them as they will be.

They need no data and little time, so a run that goes on makes them anew: the same codes from the same source.
"""

import torch
from torch import nn

from vlaquant.engine.weights import WeightsOnDemand
from vlaquant.linear import Table, pack_table, replace_table_
from vlaquant.plan import Plan


def pack_tables_(
    model: nn.Module, plan: Plan, *, weights: WeightsOnDemand | None, device: torch.device
) -> dict[str, Table]:
    """Put packed embeddings and banks in the place of float ones; returns them by name.

    Args:
        model: changed.
        plan: says which.
        weights: where a model without weights has its own from; None if it holds them.
        device: where they go if they come from ``weights``; otherwise they stay where they are.
    """
    made = {}
    for name, table in plan.replaced_tables.items():
        module = model.get_submodule(name)
        own = dict(module.named_parameters(recurse=False))
        if weights is not None:
            tensors = weights.take_(name)
        else:
            tensors = {leaf: parameter.detach() for leaf, parameter in own.items()}
            device = next(iter(own.values())).device
        # On the CPU wherever the model runs, so that the codes never depend on that
        tensors = {leaf: tensor.cpu() for leaf, tensor in tensors.items()}
        made[name] = pack_table(module, tensors, table.scheme, table.kept).to(device)
        replace_table_(model, name, made[name])
    return made
