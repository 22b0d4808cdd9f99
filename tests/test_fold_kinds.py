"""Every kind of fold keeps the function, whatever the shapes, and what it leaves can be quantized."""

import types
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import tiny_folds as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import mutant
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.families import FoldGroup, find_folds, refused_folds
from vlaquant.families.folds import Fold, llama_folds
from vlaquant.linear import from_quantized, replace_module_
from vlaquant.numerics import quantize_weight
from vlaquant.passes import fold as real
from vlaquant.scheme import PRESETS

Case = tuple[nn.Module, FoldGroup, Callable[[Tensor], Tensor]]


class Place(nn.ModuleDict):
    """Modules by name, and how a token [t, k] goes through them."""

    def __init__(self, modules: Mapping[str, nn.Module], run: Callable[["Place", Tensor], Tensor]) -> None:
        super().__init__(modules)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def linear(k: int, n: int, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(k, n, bias=bias)


def normed(norm: nn.Module, k: int) -> tuple[Place, FoldGroup]:
    place = Place({"norm": norm, "a": linear(k, 5), "b": linear(k, 3, bias=False)}, _two_readers)
    return place, FoldGroup("norm", ("a", "b"))


def _two_readers(place: Place, x: Tensor) -> Tensor:
    y = place["norm"](x)
    return torch.cat([place["a"](y), place["b"](y)], dim=-1)


def layer_norm(k: int) -> nn.Module:
    norm = nn.LayerNorm(k)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def gated(k: int, inner: int) -> tuple[Place, FoldGroup]:
    place = Place(
        {"gate": linear(k, inner), "up": linear(k, inner), "down": linear(inner, k)},
        lambda m, x: m["down"](F.silu(m["gate"](x)) * m["up"](x)),
    )
    return place, FoldGroup("up", ("down",))


def values(k: int, kv: int, repeats: int, head_dim: int) -> tuple[Place, FoldGroup]:
    attention = tiny.Attention(k, kv * repeats, kv, head_dim)
    place = Place({"attn": attention}, lambda m, x: m["attn"](x.unsqueeze(0)).squeeze(0))
    return place, FoldGroup("attn.v_proj", ("attn.o_proj",), head_dim)


def adaptive(k: int, chunks: tuple[str, ...]) -> tuple[Place, FoldGroup]:
    def run(m: Place, x: Tensor) -> Tensor:
        made = dict(zip(chunks, m["modulation"](F.silu(x)).chunk(len(chunks), dim=-1), strict=True))
        y = F.layer_norm(x, x.shape[-1:]) * (1.0 + made["scale"]) + made["shift"]
        rest = [made[name] for name in chunks if name not in {"scale", "shift"}]
        return torch.cat([m["a"](y), m["b"](y), *rest], dim=-1)

    place = Place({"modulation": linear(k, len(chunks) * k), "a": linear(k, 5), "b": linear(k, 3)}, run)
    return place, FoldGroup("modulation", ("a", "b"), chunks=chunks)


def layer_scale(k: int, n: int) -> tuple[Place, FoldGroup]:
    place = Place({"proj": linear(k, n)}, lambda m, x: m.gamma * m["proj"](x))
    place.gamma = nn.Parameter(torch.randn(n))
    return place, FoldGroup("proj", (), gamma="gamma")


KINDS: dict[str, Callable[[int, int, int], tuple[Place, FoldGroup]]] = {
    "llama norm": lambda k, _n, _r: normed(tiny.LlamaNorm(k), k),
    "gemma norm": lambda k, _n, _r: normed(tiny.GemmaNorm(k), k),
    "layer norm": lambda k, _n, _r: normed(layer_norm(k), k),
    "gated": lambda k, n, _r: gated(k, n),
    "values": lambda k, n, repeats: values(k, n, repeats, 4),
    "values without heads": lambda k, n, _r: values(k, n, 1, 4),
    "scale, shift, gate": lambda k, _n, _r: adaptive(k, ("scale", "shift", "gate")),
    "scale, shift": lambda k, _n, _r: adaptive(k, ("scale", "shift")),
    "of two norms": lambda k, _n, _r: adaptive(k, ("-", "gate", "shift", "scale")),
    "layer scale": lambda k, n, _r: layer_scale(k, n),
}


def made(kind: str, k: int, n: int, repeats: int, seed: int) -> tuple[Place, FoldGroup, Tensor]:
    torch.manual_seed(seed)
    place, group = KINDS[kind](k, n, repeats)
    return place.double(), group, torch.randn(6, k, dtype=torch.float64)


def apply_(module: types.ModuleType, place: nn.Module, group: FoldGroup, size: float = 1.0) -> None:
    if group.gamma is not None:
        module.fold_layer_scale_(place, group, {})
        return
    rows = real.channels_of(place, group)
    module.apply_fold_(place, group, torch.exp(size * torch.randn(rows, dtype=torch.float64)), {})


@torch.no_grad()
def check(module: types.ModuleType, kind: str, shape: tuple[int, int, int, int], chunks: tuple[str, ...] = ()) -> None:
    """Same function, other weights, and all of them still of the same dtype."""
    place, group, x = made(kind, *shape)
    if chunks:
        group = replace(group, chunks=chunks)
    before, weights = place(x), {name: tensor.clone() for name, tensor in place.state_dict().items()}
    apply_(module, place, group)
    assert float((place(x) - before).abs().max() / before.abs().max()) < 1e-12
    after = place.state_dict()
    assert all(after[name].dtype == torch.float64 for name in weights)
    changed = {name.rpartition(".")[0] for name in weights if not torch.equal(weights[name], after[name])}
    assert changed >= {group.source, *group.targets}


@pytest.mark.parametrize("kind", KINDS)
@given(shape=st.tuples(st.integers(2, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6)))
def test_the_function_stays(kind: str, shape: tuple[int, int, int, int]) -> None:
    check(real, kind, shape)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("llama norm", "weight * columns.to(weight), bias", "weight / columns.to(weight), bias"),
        ("gemma norm", "offset=norm_offset(source)", "offset=0.0"),
        ("layer norm", "bias.copy_(_wide(bias) / real)", "pass"),
        ("gated", "None if bias is None else bias / scale", "bias"),
        ("gated", "return weight / scale.unsqueeze(-1), None", "return weight * scale.unsqueeze(-1), None"),
        ("values", "scale.reshape(-1, 1, head_dim).expand(-1,", "scale.reshape(1, -1, head_dim).expand("),
        ("scale, shift, gate", "1.0 - scale if chunk", "scale - 1.0 if chunk"),
        ("scale, shift, gate", "(bias + missing) / by", "bias / by"),
        ("scale, shift", "chunk in {SCALE, SHIFT}", "chunk == SCALE"),
        ("of two norms", "1.0 - scale if chunk == SCALE", "1.0 - scale if True"),
        ("layer scale", "bias * wide", "bias"),
        ("layer scale", "gamma.fill_(1.0)", "pass"),
    ],
)
def test_a_wrong_fold_is_noticed(kind: str, old: str, new: str) -> None:
    if "reshape(1" in new:  # query head h reads value head h % KV
        old, new = old + " columns // len(scale), -1)", new + "columns // len(scale), -1, -1)"
    with pytest.raises((AssertionError, RuntimeError)):
        check(mutant(real, old, new), kind, (8, 3, 2, 0))


@pytest.mark.parametrize("chunks", [("shift", "scale", "gate"), ("scale", "gate", "shift"), ("gate", "shift", "scale")])
def test_another_order_of_chunks_changes_the_function(chunks: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        check(real, "scale, shift, gate", (8, 3, 2, 0), chunks)


def test_gathering_undoes_spreading() -> None:
    scale = torch.randn(6)
    spread = real.spread(scale, 18, 2)
    assert torch.equal(real.gathered(spread, 6, 2), scale.expand(3, 6))
    for head in range(9):
        assert torch.equal(spread[2 * head : 2 * head + 2], scale.reshape(3, 2)[head // 3])
    table = torch.randn(5, 18)
    by_head = table.reshape(5, 3, 3, 2)  # value head, query head of it, channel
    assert torch.equal(real.gathered(table, 6, 2), by_head.permute(0, 2, 1, 3).reshape(5, 3, 6))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_a_fold_leaves_can_be_quantized(kind: str) -> None:
    place, group, x = made(kind, 32, 4, 2, seed=0)
    place, x = place.float(), x.float()
    before = place(x)
    apply_(real, place, group, size=0.2)
    for name in group.targets or (group.source,):
        layer = place.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        scheme = PRESETS["w8a16"].with_weight(group_size="channel")
        codes = quantize_weight(layer.weight, scheme.weight, scale_dtype=torch.float32)
        replace_module_(place, name, from_quantized(codes, scheme, layer.bias, dtype=torch.float32))
    assert float((place(x) - before).norm() / before.norm()) < 0.02


def test_places_that_cannot_take_a_scale_say_why() -> None:
    modules = nn.ModuleDict(
        {
            "plain": nn.LayerNorm(8, elementwise_affine=False),
            "norm": nn.LayerNorm(8),
            "fc1": nn.Linear(8, 8),
            "narrow": nn.Linear(4, 8),
            "odd": nn.Linear(8, 20, bias=False),
            "attention": nn.MultiheadAttention(8, 2),
            "modulation": nn.Linear(8, 16, bias=False),
        }
    )
    root, block = nn.ModuleDict({"b": modules}), "b"
    folds = (
        Fold(block, "{block}.plain", ("{block}.fc1",)),
        Fold(block, "{block}.norm", ("{block}.fc1", "{block}.narrow")),
        Fold(block, "{block}.odd", ("{block}.fc1",)),
        Fold(block, "{block}.fc1", ("{block}.attention.out_proj",)),
        Fold(block, "{block}.modulation", ("{block}.fc1",), chunks=("scale", "shift")),
        Fold(block, "{block}.nowhere", ("{block}.fc1",)),
        Fold(block, "{block}.narrow", gamma="{block}.norm.weight"),
    )
    assert refused_folds(root, folds) == {
        "b.plain": "LayerNorm has no parameter that could be divided",
        "b.norm": "its readers have different widths: [4, 8]",
        "b.odd": "20 rows for 8 columns, and the width of a head is not known",
        "b.fc1": "b.attention.out_proj is a NonDynamicallyQuantizableLinear, and only exactly nn.Linear can be scaled",
        "b.modulation": "without a bias the 1 of 1 + scale cannot be divided",
    }
    assert [group.source for group in find_folds(root, folds)] == ["b.narrow"]
    wrong = (Fold(block, "{block}.odd", gamma="{block}.norm.weight"), replace(folds[4], chunks=("scale",)))
    assert refused_folds(root, wrong) == {
        "b.odd": "b.norm.weight of shape [8] is no factor for each row of b.odd",
        "b.modulation": "16 rows are not 1 chunks (scale) of 8",
    }


def test_a_packed_reader_is_not_scaled() -> None:
    model = tiny.model()
    assert len(find_folds(model, tiny.FOLDS)) == 2 * len(tiny.FOLDS)
    layer, scheme = model.blocks[0].attn.k_proj, PRESETS["w8a8"]
    codes = quantize_weight(layer.weight.detach(), scheme.weight, scale_dtype=torch.float32)
    packed = from_quantized(codes, scheme, layer.bias.detach(), dtype=torch.float32)
    replace_module_(model, "blocks.0.attn.k_proj", packed)
    assert len(find_folds(model, tiny.FOLDS)) == 2 * len(tiny.FOLDS) - 1
    assert refused_folds(model, tiny.FOLDS) == {
        "blocks.0.norm1": "blocks.0.attn.k_proj is a W8A8Linear, and only exactly nn.Linear can be scaled"
    }


def test_values_that_others_attend_to_are_left_out() -> None:
    every, own = (llama_folds("block", values=values) for values in (True, False))
    assert [fold for fold in every if fold not in own] == [fold for fold in every if fold.source.endswith("v_proj")]
