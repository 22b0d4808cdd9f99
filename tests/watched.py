"""What calibration and probing are tried on: a block whose layers share inputs, and a look at the hooks left behind."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
