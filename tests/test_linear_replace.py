"""Putting packed layers into models, and which layers must stay."""

import pytest
from tiny_layers import K, N, layer_of
from torch import nn

from vlaquant.errors import PlanError
from vlaquant.linear import W8A8Linear, is_replaceable, replace_module_


class Tied(nn.Module):
    """One Linear under two names, and all the kinds that must not be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, N)
        self.blocks = nn.ModuleList([nn.ModuleDict({"again": self.first}), nn.Linear(K, N)])
        self.attention = nn.MultiheadAttention(K, 2)
        self.encoder = nn.TransformerEncoderLayer(K, 2)
        self.bilinear = nn.Bilinear(K, K, N)
        self.normed = nn.Linear(K, N)
        self.lazy = nn.utils.parametrizations.weight_norm(nn.Linear(K, N))


def test_replace_module_everywhere_it_stands() -> None:
    root = Tied().eval()
    layer = layer_of("w4_group")
    replace_module_(root, "blocks.0.again", layer)
    assert root.first is root.get_submodule("blocks.0.again") is layer
    assert not layer.training
    replace_module_(root, "blocks.1", layer_of("w8a8"))
    assert isinstance(root.blocks[1], W8A8Linear)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("attention.out_proj", "is a NonDynamicallyQuantizableLinear, and only exactly nn.Linear"),
        ("encoder.linear1", "belongs to a TransformerEncoderLayer"),
        ("bilinear", "is a Bilinear"),
        ("lazy", "is a ParametrizedLinear"),
        ("", "is a Tied"),
    ],
)
def test_what_cannot_be_replaced(name: str, reason: str) -> None:
    root = Tied()
    assert reason in str(is_replaceable(root, name))
    with pytest.raises(PlanError, match=f"{name or 'the model'} cannot be replaced: it {reason}"):
        replace_module_(root, name, layer_of("w8a8"))


def test_what_else_cannot_be_replaced() -> None:
    root = Tied()
    assert is_replaceable(root, "first") is None
    with pytest.raises(PlanError, match=r"blocks\.7 cannot be replaced: Tied has no such module"):
        replace_module_(root, "blocks.7", layer_of("w8a8"))
    root.attention.inside = root.first
    assert "belongs to a MultiheadAttention" in str(is_replaceable(root, "first"))
    assert "whole model" in str(is_replaceable(nn.Linear(2, 2), ""))
    del root.normed.weight
    assert "computes its weight" in str(is_replaceable(root, "normed"))
