"""Weights that no Linear holds and a recipe can cover all the same: lookup tables (embeddings) and banks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlaquant.linear.category import CategoryBank, bank_rows, bank_tensors, empty_bank, is_bank
from vlaquant.linear.embedding import (
    QuantEmbedding,
    embedding_objection,
    embedding_tensors,
    empty_embedding,
    is_embedding,
)
from vlaquant.linear.replace import replace_everywhere_
from vlaquant.numerics import quantize_weight
from vlaquant.scheme import Scheme

Table = QuantEmbedding | CategoryBank


def table_kind(module: nn.Module) -> str | None:
    """``embedding`` or ``bank``; None for everything else."""
    if is_embedding(module):
        return "embedding"
    return "bank" if is_bank(module) else None


def table_objection(module: nn.Module) -> str | None:
    """Why a table cannot be replaced, or None if it can."""
    return embedding_objection(module) if is_embedding(module) else None


def empty_table(module: nn.Module, scheme: Scheme | None, kept: int | None) -> Table:
    """What takes the place of a table, without values, on the meta device.

    Args:
        module: of a kind that :func:`table_kind` knows; may be on the meta device.
        scheme: 8 bits; None only for a bank of which one category is kept.
        kept: the category to keep, or None for all.
    """
    if is_bank(module):
        return empty_bank(module, scheme, kept)
    assert scheme is not None
    return empty_embedding(module, scheme)


@torch.no_grad()
def pack_table(module: nn.Module, tensors: Mapping[str, Tensor], scheme: Scheme | None, kept: int | None) -> Table:
    """:func:`empty_table` with the values of ``tensors``, which are the float module's own, by name.

    Codes are rounded to the nearest: a table has no inputs that could be calibrated with. The arithmetic is done on the
    device of the tensors.
    """
    packed = empty_table(module, scheme, kept)
    if isinstance(packed, QuantEmbedding):
        assert scheme is not None
        weight = tensors["weight"]
        values = embedding_tensors(quantize_weight(weight, scheme.weight, scale_dtype=weight.dtype))
    else:
        weight, bias = tensors["W"], tensors["b"]
        left = slice(None) if kept is None else slice(kept, kept + 1)
        values = {"b": bias[left].clone()}
        if scheme is None:
            values["W"] = weight[left].clone()
        else:
            rows = bank_rows(weight, kept)
            values |= bank_tensors(quantize_weight(rows, scheme.weight, scale_dtype=weight.dtype))
    packed.load_state_dict(values, assign=True)
    return packed.requires_grad_(requires_grad=False)


def replace_table_(root: nn.Module, name: str, table: Table) -> None:
    """Put ``table`` where the float table ``name`` stands in ``root``, and at its other places."""
    old = root.get_submodule(name)
    table.train(old.training)
    replace_everywhere_(root, old, table)
