"""What calibration and probing are tried on: a block whose layers share inputs, and a look at the hooks left behind."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlaquant.calibrate import ActStats, Observation

FIELDS = ("channel_low", "channel_high", "mean_abs", "hessian", "sample")


class Block(nn.Module):
    """q, k and v read one tensor, gate and up another; ``odd`` reads what q reads in every second call only."""

    def __init__(self, k: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(k, k) for _ in range(4))
        self.gate, self.up, self.odd, self.unused = (nn.Linear(k, k) for _ in range(4))
        self.down = nn.Linear(k, k)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + self.o(torch.tanh(self.q(x) * self.k(x)) + self.v(x))
        side = self.odd(x if self.calls % 2 else x * 2.0)
        return self.down(F.relu(self.gate(x)) * self.up(x)) + side


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def reset(self) -> None:
        for block in self.modules():
            if isinstance(block, Block):
                block.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def model_and_samples() -> tuple[TwoBlocks, list[Tensor]]:
    torch.manual_seed(0)
    return TwoBlocks(), [torch.randn(batch, tokens, 8) for batch, tokens in ((1, 5), (2, 3), (1, 1), (3, 7))]


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def run_all(model: TwoBlocks, samples: Sequence[Tensor], observation: Observation) -> None:
    """All samples from a fresh start, one call each."""
    model.reset()
    for sample in samples:
        observation.begin_sample()
        model(sample)


def assert_same(a: ActStats, b: ActStats) -> None:
    """Equal to the last bit."""
    assert a.tokens == b.tokens
    for name in FIELDS:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None and right is None) or torch.equal(left, right), name
