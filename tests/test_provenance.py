"""Every way in which a tensor can be read or changed is seen, and what does no harm is let pass."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flowing
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from vlaquant.calibrate.flow import Flow
from vlaquant.calibrate.probing import probe


class Pair(nn.Module):
    """Two blocks and code that uses them; ``use`` says how."""

    blocks: Any

    def __init__(self, use: Callable[..., object], first: Callable[..., object]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([flowing.Layer(), flowing.Layer()])
        self.blocks[0].forward = lambda x: first(self.blocks[0], x)
        self.use = use

    def forward(self, x: Tensor) -> object:
        return self.use(self, x)


def pair_flow(
    use: Callable[..., object], first: Callable[..., object] = flowing.Layer.forward, *, inference: bool = True
) -> Flow:
    model = Pair(use, first).eval()
    forward = model.blocks[0].forward
    with torch.inference_mode(inference):
        flow = probe(model, lambda: model(torch.randn(1, 3, flowing.WIDTH))).flow
    assert model.blocks[0].forward is forward
    return flow


def _stash(block: Any, x: Tensor) -> Tensor:
    block.kept = block.inner(x)
    return x + block.kept.data


@pytest.mark.parametrize(
    "look",
    [
        lambda kept: kept + 1,
        lambda kept: kept.data,
        lambda kept: kept.shape,
        lambda kept: kept.numpy(),
        lambda kept: kept.tolist(),
        lambda kept: kept[0, 0, 0].item(),
        lambda kept: bool(kept.sum() > 0),
        list,
        lambda kept: kept.zero_(),
        lambda kept: torch.cat([kept, kept]),
        lambda kept: torch.mul(torch.ones(3, flowing.WIDTH), torch.ones(1, 1, 1), out=kept),
        lambda kept: kept.__setitem__(0, 1.0),
        lambda kept: torch.zeros(3, flowing.WIDTH).copy_(kept[0]),
    ],
)
def test_every_look_at_a_tensor_that_was_not_returned_is_seen(look: Callable[[Tensor], object]) -> None:
    def use(model: Pair, x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        look(model.blocks[0].kept)
        return model.blocks[1](x)

    assert "made and did not return" in pair_flow(use, _stash).reasons["blocks.0"]


def test_a_tensor_that_nobody_looks_at_does_no_harm() -> None:
    flow = pair_flow(lambda model, x: model.blocks[1](model.blocks[0](x)), _stash)
    assert flow.replayable == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("mode", ["inference", "grad"])
def test_parts_of_an_output_are_returned_too(mode: str) -> None:
    def use(model: Pair, x: Tensor) -> Tensor:
        first, *rows = model.blocks[0](x.expand(4, -1, -1))
        return model.blocks[1](torch.stack([first.data, *rows]).detach())

    assert "blocks.0" in pair_flow(use, inference=mode == "inference").replayable


@contextmanager
def unseen() -> Iterator[None]:
    """As in an extension that makes tensors without telling anybody."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def test_views_that_nobody_saw_being_made_belong_to_their_memory() -> None:
    def use(model: Pair, x: Tensor) -> Tensor:
        y = model.blocks[0](x)
        with unseen():
            y = y.view(3, flowing.WIDTH)
        return model.blocks[1](y)

    def use_stashed(model: Pair, x: Tensor) -> Tensor:
        y = model.blocks[0](x)
        with unseen():
            kept = model.blocks[0].kept.view(-1)
        return model.blocks[1](y + kept.sum())

    assert "blocks.0" in pair_flow(use).replayable
    assert "made and did not return" in pair_flow(use_stashed, _stash).reasons["blocks.0"]


def test_tensors_that_take_the_place_of_dead_ones_are_not_taken_for_them() -> None:
    def first(block: flowing.Layer, x: Tensor) -> Tensor:
        return x + block.inner(x) + sum([x * float(index) for index in range(100)])

    def use(model: Pair, x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        with unseen():
            others = [torch.zeros(1) for _ in range(1000)]
        return model.blocks[1](x + torch.cat(others).sum())

    assert "blocks.0" in pair_flow(use, first).replayable


def test_weights_that_a_block_makes_may_be_asked_for_elsewhere() -> None:
    def first(block: flowing.Layer, x: Tensor) -> Tensor:
        block.gate.weight = nn.Parameter(block.gate.weight.clone())
        return x + block.inner(x)

    def use(model: Pair, x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        return model.blocks[1](x.to(model.blocks[0].gate.weight.dtype))

    assert "blocks.0" in pair_flow(use, first).replayable


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1.0),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.dropout(x, 0.0, training=True, inplace=True),
        lambda x: x.__setitem__((0, 0), 0.0),
        lambda x: x[0].zero_(),
        lambda x: torch.mul(x, 2.0, out=x),
        lambda x: torch._foreach_mul_([x], 2.0),
        lambda x: nn.ReLU(inplace=True)(x.view(-1)),
    ],
)
def test_every_change_of_an_input_is_seen(change: Callable[[Tensor], object]) -> None:
    def first(block: flowing.Layer, x: Tensor) -> Tensor:
        change(x)
        return x + block.inner(x)

    flow = pair_flow(lambda model, x: model.blocks[1](model.blocks[0](x)), first)
    assert "changes in place" in flow.reasons["blocks.0"]


def test_changes_of_own_tensors_do_no_harm() -> None:
    def first(block: flowing.Layer, x: Tensor) -> Tensor:
        y = block.inner(x)
        y += x
        for own in (torch.tensor([1.0]), torch.from_numpy(np.ones(1)), copy.deepcopy(y)):
            own[0] = 3.0
        return F.relu(y, inplace=True)

    assert "blocks.0" in pair_flow(lambda model, x: model.blocks[1](model.blocks[0](x)), first).replayable


@pytest.mark.parametrize(
    "steer",
    [
        lambda y: float(y.sum()) > 0,
        lambda y: y.argmax(),
        lambda y: y > 0,
        lambda y: y.tolist(),
        lambda y: y.numpy(),
        lambda y: torch.equal(y, y),
        lambda y: y.to(torch.int32),
    ],
)
def test_values_that_leave_torch_or_choose_are_needed_for_ever(steer: Callable[[Tensor], object]) -> None:
    def use(model: Pair, x: Tensor) -> Tensor:
        y = model.blocks[0](x) * 2.0
        steer(y)
        return model.blocks[1](y)

    flow = pair_flow(use)
    assert flow.needed_until["blocks.0"] is None
    assert flow.touched == {"blocks.0"}


def test_a_block_that_runs_again_and_looks_at_values_needs_them_for_ever() -> None:
    def use(model: Pair, x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        return model.blocks[1](x) + model.blocks[1](x)

    def use_looking(model: Pair, x: Tensor) -> Tensor:
        inner = model.blocks[1].inner
        model.blocks[1].inner = lambda x: inner(x if x.sum() > 0 else -x)
        return use(model, x)

    assert pair_flow(use).needed_until["blocks.0"] == 1
    assert pair_flow(use_looking).needed_until["blocks.0"] is None


def test_what_is_written_into_depends_on_what_is_written() -> None:
    def use(model: Pair, x: Tensor) -> Tensor:
        y = model.blocks[0](x)
        kept = torch.zeros_like(x)
        torch._foreach_add_([kept], [y])
        return model.blocks[1](kept)

    assert pair_flow(use).needed_until["blocks.0"] == 1


def test_outputs_that_share_memory_must_not_be_changed() -> None:
    def first(block: flowing.Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        y = block.inner(x)
        return y, y.view(-1)

    def use(model: Pair, x: Tensor) -> Tensor:
        y, flat = model.blocks[0](x)
        flat.mul_(2.0)
        return model.blocks[1](y)

    assert "memory is known elsewhere too" in pair_flow(use, first).reasons["blocks.0"]


def test_questions_about_the_shape_steer_nothing() -> None:
    def use(model: Pair, x: Tensor) -> Tensor:
        y = model.blocks[0](x)
        mask = torch.zeros_like(y, dtype=torch.bool) | y.new_ones(y.shape[1], 1, dtype=torch.bool)
        return model.blocks[1](y.masked_fill(mask, 0.0) if y.is_floating_point() and y.dim() == 3 else x)

    assert pair_flow(use).needed_until["blocks.0"] == 1


@pytest.mark.parametrize(
    "output",
    [
        lambda y: (y, {1.5: y}),
        lambda y: [y, torch.Size([1])],
        lambda y: torch.max(y, dim=1),
        lambda y: nn.Parameter(y.clone()),
        lambda y: y.to_sparse(),
        lambda y: torch.complex(y, y),
        lambda y: iter([y]),
    ],
)
def test_outputs_that_cannot_be_stored_are_refused(output: Callable[[Tensor], object]) -> None:
    flow = pair_flow(lambda model, x: [model.blocks[0](x), model.blocks[1](x)], lambda block, x: output(block.inner(x)))
    assert "which cannot be stored" in flow.reasons["blocks.0"]


def test_whole_numbers_among_the_outputs_are_kept_for_ever() -> None:
    def first(block: flowing.Layer, x: Tensor) -> list[Tensor]:
        return [block.inner(x), x.argmax(dim=-1)]

    flow = pair_flow(lambda model, x: model.blocks[1](model.blocks[0](x)[0]), first)
    assert flow.needed_until["blocks.0"] is None


def test_blocks_that_run_each_other_or_draw_from_a_generator_are_refused() -> None:
    generator = torch.Generator()

    def first(block: flowing.Layer, x: Tensor) -> Tensor:
        return block.inner(x) + torch.randn(x.shape, generator=generator)

    assert "random" in pair_flow(lambda model, x: model.blocks[1](model.blocks[0](x)), first).reasons["blocks.0"]
    other = flowing.Layer()
    flow = pair_flow(
        lambda model, x: model.blocks[0](x) + model.blocks[1](x), lambda block, x: block.inner(x) + other(x)
    )
    assert flow.replayable == {"blocks.0", "blocks.1"}
    model: Any = nn.ModuleList([flowing.Layer(), flowing.Layer()])
    model[0].forward = lambda x: model[1](model[0].inner(x))
    flow = probe(model, lambda: model[0](torch.randn(1, 3, flowing.WIDTH))).flow
    assert "runs layers of 1" in flow.reasons["0"]
    assert "0 runs it" in flow.reasons["1"]
