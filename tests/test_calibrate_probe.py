"""Probing: one sample tells what runs, in which order, on what, and which weights are used behind the layer's back."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from watched import Block, hook_count

from vlaquant.calibrate import probe


class Policy(nn.Module):
    """What real policies do to a module walker."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.block = Block()
        self.head = nn.Linear(8, 20, bias=False)
        self.tied = nn.Linear(8, 20, bias=False)
        self.tied.weight = self.embed.weight
        self.sliced = nn.Linear(8, 20)
        self.cast = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block(self.embed(tokens))
        x = self.cast(x.to(self.cast.weight.dtype)).to(self.cast.weight.device).view(-1, self.cast.weight.shape[0])
        for _ in range(3):
            x = self.block(x)
        logits = self.head(x) + self.tied(x)
        return logits[:, :4] + F.linear(x, self.sliced.weight[:4])


@pytest.fixture(params=[False, True], ids=["grad", "inference"])
def probed(request: pytest.FixtureRequest) -> Iterator[tuple[Policy, object]]:
    policy = Policy().eval()
    with torch.inference_mode(request.param):
        yield policy, probe(policy, lambda: policy(torch.tensor([[1, 2, 3]])))
    assert hook_count(policy) == 0


def test_probe_knows_order_and_calls(probed) -> None:
    _, result = probed
    block = [f"block.{name}" for name in ("q", "k", "v", "o", "odd", "gate", "up", "down")]
    assert list(result.order[:11]) == [*block, "cast", "head", "tied"]
    assert result.calls["block.q"] == 4
    assert result.calls["cast"] == 1
    assert result.calls["block.unused"] == 0


def test_probe_knows_who_shares_an_input(probed) -> None:
    _, result = probed
    assert result.shared == (("block.q", "block.k", "block.v"), ("block.gate", "block.up"), ("head", "tied"))


def test_probe_finds_the_dead_and_the_functional(probed) -> None:
    _, result = probed
    assert {"block.unused", "sliced"} <= set(result.never_ran)
    assert not {"block.q", "head"} & set(result.never_ran)
    assert result.functional == ("tied", "sliced")


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight.T,
        lambda weight: weight.data,
        lambda weight: weight[0],
        lambda weight: torch.cat([weight, weight]),
        lambda weight: torch.stack(tensors=[weight]),
        lambda weight: weight.to(torch.float64),
        lambda weight: weight.chunk(2),
    ],
)
def test_probe_sees_every_way_to_use_a_weight(use) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert probe(model, lambda: use(model[1].weight)).functional == ("1",)


@pytest.mark.parametrize(
    "ask",
    [
        lambda weight: (weight.dtype, weight.device, weight.shape, weight.ndim, weight.is_cuda, weight.requires_grad),
        lambda weight: (weight.size(0), weight.numel(), weight.dim(), weight.stride(), weight.element_size()),
        lambda weight: (weight.is_floating_point(), torch.is_floating_point(weight), weight.data_ptr(), len(weight)),
    ],
)
def test_probe_lets_questions_pass(ask) -> None:
    model = nn.ModuleList([nn.Linear(4, 4)])
    assert probe(model, lambda: ask(model[0].weight)).functional == ()


def test_probe_does_not_confuse_tensors_that_reuse_memory_or_change() -> None:
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    def run() -> None:
        for layer in model[:3]:
            layer(torch.ones(2, 4))
        x = torch.ones(2, 4)
        model[3](x)
        x.add_(1.0)
        model[4](x)

    assert probe(model, run).shared == ()


def test_probe_cleans_up_after_an_error() -> None:
    model = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(RuntimeError):
        probe(model, lambda: model[0](torch.ones(2, 3)))
    assert hook_count(model) == 0
    assert probe(model, lambda: model[0](torch.ones(2, 4))).functional == ()


def test_activations_do_not_outlive_their_block() -> None:
    """A sample that goes through a large model must not need the memory of all its blocks at once."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(not storage.expired() for storage in made))
            up = self.up(x)
            hidden = up.relu()
            made.extend(StorageWeakRef(one.untyped_storage()) for one in (up, hidden))
            down: Tensor = self.down(hidden)
            return down

    alive: list[int] = []
    made: list[StorageWeakRef] = []
    model = nn.Sequential(*(Block() for _ in range(24)))
    with torch.inference_mode():
        probe(model, lambda: model(torch.randn(8, 4)))
    assert len(made) == 48
    assert max(alive) <= 2
