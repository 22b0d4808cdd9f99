"""Units of a model, and stages in the order of their first run."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlaquant.calibrate import units as units_module
from vlaquant.calibrate.units import Stage, find_units, order_stages


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


def mlp(depth: int = 2) -> nn.Module:
    return nn.Sequential(*(linear() for _ in range(depth)))


class Tree(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def names(model: nn.Module) -> list[str]:
    return [stage.unit for stage in find_units(model)]


UNITS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "decoder": (
        lambda: Tree(model=Tree(embed=nn.Embedding(2, 2), layers=nn.ModuleList([mlp(), mlp()])), lm_head=linear()),
        ["model.layers.0", "model.layers.1", "lm_head"],
    ),
    "no list": (lambda: Tree(projector=mlp(3), norm=nn.LayerNorm(2), head=linear()), ["projector", "head"]),
    "sequential": (lambda: nn.Sequential(mlp(), nn.ReLU(), linear()), ["0", "2"]),
    "one linear": (linear, [""]),
    "nothing": (lambda: nn.LayerNorm(2), []),
    "list in the list": (
        lambda: Tree(experts=nn.ModuleList([Tree(gate=linear(), inner=nn.ModuleList([mlp(), mlp()]))])),
        ["experts.0"],
    ),
    "list of lists": (lambda: Tree(rows=nn.ModuleList([nn.ModuleList([mlp(), linear()])])), ["rows.0.0", "rows.0.1"]),
    "dict": (
        lambda: Tree(body=nn.ModuleDict({"wte": nn.Embedding(2, 2), "h": nn.ModuleList([mlp()]), "up": mlp()})),
        ["body.h.0", "body.up"],
    ),
    "dict without a list": (lambda: Tree(heads=nn.ModuleDict({"a": mlp(), "b": linear()})), ["heads.a", "heads.b"]),
    "blocks in a sequential": (
        lambda: Tree(blocks=nn.Sequential(Tree(a=linear()), Tree(a=linear())), head=linear()),
        ["blocks.0", "blocks.1", "head"],
    ),
    "one block in a sequential": (
        lambda: Tree(head=nn.Sequential(nn.LayerNorm(2), Tree(a=linear(), b=linear()))),
        ["head"],
    ),
    "list of linears in a module": (lambda: Tree(head=Tree(layers=nn.ModuleList([linear(), linear()]))), ["head"]),
    "list of linears in the model": (lambda: nn.ModuleList([linear(), linear()]), ["0", "1"]),
    "linears beside a list": (
        lambda: Tree(tower=Tree(q=linear(), blocks=nn.ModuleList([mlp()]), pool=Tree(a=linear(), b=linear()))),
        ["tower.q", "tower.blocks.0", "tower.pool"],
    ),
}


@pytest.mark.parametrize("case", UNITS)
def test_units(case: str) -> None:
    make, wanted = UNITS[case]
    with torch.device("meta"):
        assert names(make()) == wanted


def test_units_know_their_linears_also_of_a_subclass() -> None:
    model = Tree(attention=nn.MultiheadAttention(4, 2), blocks=nn.ModuleList([mlp()]))
    assert find_units(model) == (
        Stage("attention", ("attention.out_proj",)),
        Stage("blocks.0", ("blocks.0.0", "blocks.0.1")),
    )


def test_shared_modules_are_named_once() -> None:
    block, head = mlp(), linear()
    model = Tree(first=head, blocks=nn.ModuleList([block, Tree(own=linear(), alias=head), block]), again=block)
    assert find_units(model) == (
        Stage("first", ("first",)),
        Stage("blocks.0", ("blocks.0.0", "blocks.0.1")),
        Stage("blocks.1", ("blocks.1.own",)),
    )


def _trees() -> st.SearchStrategy[Callable[[], nn.Module]]:
    leaves = st.sampled_from([linear, lambda: nn.LayerNorm(2), mlp])

    def around(inner: st.SearchStrategy[Callable[[], nn.Module]]) -> st.SearchStrategy[Callable[[], nn.Module]]:
        def made(kind: str, parts: list[Callable[[], nn.Module]]) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                modules = [part() for part in parts]
                if kind == "list":
                    return nn.ModuleList(modules)
                if kind == "sequential":
                    return nn.Sequential(*modules)
                named = {f"m{index}": module for index, module in enumerate(modules)}
                return nn.ModuleDict(named) if kind == "dict" else Tree(**named)

            return make

        kinds = st.sampled_from(["list", "sequential", "dict", "tree"])
        return st.builds(made, kinds, st.lists(inner, min_size=1, max_size=3))

    return st.recursive(leaves, around, max_leaves=8)


def assert_every_linear_once(model: nn.Module) -> None:
    stages = find_units(model)
    wanted = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [name for stage in stages for name in stage.linears] == wanted
    for stage in stages:
        inside = {name for name, _ in model.get_submodule(stage.unit).named_modules(prefix=stage.unit)}
        assert set(stage.linears) <= inside
        assert not isinstance(model.get_submodule(stage.unit), nn.ModuleList | nn.ModuleDict)


@given(_trees())
def test_every_linear_is_in_one_unit_that_can_run(make: Callable[[], nn.Module]) -> None:
    assert_every_linear_once(make())


def test_a_search_that_stops_at_the_first_list_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = units_module._units

    def wrong(name, module):
        found = list(real(name, module))
        return [each for each in found if "." in each[0]] or found

    model = UNITS["decoder"][0]()
    monkeypatch.setattr(units_module, "_units", wrong)
    with pytest.raises(AssertionError):
        assert_every_linear_once(model)


def test_stages_follow_the_first_run() -> None:
    units = find_units(Tree(a=linear(), b=mlp(), c=linear(), d=mlp()))
    ordered = order_stages(units, ["d.1", "c", "d.0", "b.0"])
    assert [stage.unit for stage in ordered] == ["d", "c", "b", "a"]
