"""Small models through which data flows in every way that staged calibration must know, and their samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class Layer(nn.Module):
    """Three Linears, two of which share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def inner(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(F.gelu(self.gate(y)) * self.up(y))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Stack(nn.Module):
    """Layers one after the other, a Linear before and one behind; the others below change ``through``."""

    layer: type[Layer] = Layer
    blocks: Any

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self.layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.through(self.embed(x)))

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Skipping(Stack):
    """The first block's output is needed at the last block, the second's at the head."""

    def through(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        third = self.blocks[2](second)
        return self.blocks[3](third + first) + second


class Between(Stack):
    """Scales, positions, a concatenation, a slice and a change in place between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.register = nn.Parameter(torch.randn(1, 2, WIDTH))

    def through(self, x: Tensor) -> Tensor:
        x = torch.cat([self.register.expand(x.shape[0], -1, -1), x], dim=1)
        for index, block in enumerate(self.blocks):
            x = block(x)
            x += self.position
            x[:, 0] = x[:, 1].tanh()
            x = x * (1.0 + index)
            x = x.transpose(0, 1).contiguous().view(-1, x.shape[0], WIDTH).transpose(0, 1)
        return x[:, 2:]


class EncoderDecoder(nn.Module):
    """Every decoder block reads what the encoder returned."""

    mix: Any

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(2), Stack(3)
        self.query = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.mix = nn.ModuleList(nn.ModuleList([nn.Linear(3, WIDTH), Layer()]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.encoder(x)
        state = self.query.expand(x.shape[0], -1, -1)
        for block, mix in zip(self.decoder.blocks, self.mix, strict=True):
            state = block(state + mix[1](mix[0](seen)).mean(dim=1, keepdim=True))
        return self.decoder.head(state)


class Towers(nn.Module):
    """Two towers beside each other, joined at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Stack(2), Stack(2)
        self.join = nn.Sequential(nn.Linear(6, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.left(x), self.right(x.flip(1))], dim=-1))


class PassingLayer(Layer):
    """Returns a nest, with one tensor that only passes through, as T5's position bias does."""

    def forward(self, x: Tensor, bias: Tensor | None = None, history: Any = ()) -> Any:
        bias = x.mean(dim=1, keepdim=True) if bias is None else bias
        y = x + self.inner(x + bias)
        return y, {"bias": bias, "none": None, "views": [y[..., :2], y.transpose(0, 1)]}, "text"


class Passing(Stack):
    layer = PassingLayer

    def through(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, more, _ = block(x, bias=bias)
            bias = more["bias"]
            x = x + more["views"][1].transpose(0, 1)[..., :1]
        return x


class Selecting(Stack):
    """Code between the blocks looks at their values."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.mean() > 0:
                x = -x
            x = x.gather(1, x.argsort(dim=1))
        return x


class Ending(Stack):
    """The last block is called by hand, and the first block's output goes into the result beside it."""

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        return self.blocks[0](x) + self.blocks[1].inner(x)


class Idling(Stack):
    """The last block reads the first's output but none of its layers runs."""

    def through(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        self.blocks[3](x)
        return self.blocks[2](self.blocks[1](x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks[3].inner = torch.tanh


class ChangingLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += self.inner(x)
        return x * 1.0


class Changing(Stack):
    """Blocks change their input, which is read again."""

    layer = ChangingLayer

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + x
        return x


class KeepingLayer(Layer):
    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Keeping(Stack):
    """Each block's output is taken from an attribute, though it is also returned."""

    layer = KeepingLayer

    def through(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            y = block(x)
            x = self.blocks[index - 1].last + y if index == 2 else y
        return x


class CachingLayer(Layer):
    def forward(self, x: Tensor, cache: dict[str, list[Tensor]] | None = None) -> Tensor:
        assert cache is not None
        cache.setdefault("keys", []).append(self.gate(x))
        return x + self.inner(x) + sum(cache["keys"])


class Caching(Stack):
    """A mutable cache goes through the blocks, and each reads what the others left in it."""

    layer = CachingLayer

    def through(self, x: Tensor) -> Tensor:
        cache: dict[str, list[Tensor]] = {}
        for block in self.blocks:
            x = block(x, cache=cache)
        return x


class Looping(Stack):
    """One block runs three times."""

    def through(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for _ in range(3):
            x = self.blocks[1](x)
        return self.blocks[3](self.blocks[2](x))


class Piecewise(Stack):
    """Some layers are called by hand and their block never, one after a whole tower, as in lerobot's policies."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Stack(3)

    def through(self, x: Tensor) -> Tensor:
        x = x + F.pad(self.tower(x), (0, WIDTH - 3))
        for block in self.blocks:
            y = block.norm(x)
            x = x + block.down(F.gelu(block.gate(y)) * block.up(y))
        return x


@dataclass
class Output:
    hidden: Tensor


class WrappingLayer(Layer):
    def forward(self, x: Tensor) -> Any:
        return Output(super().forward(x))


class Wrapping(Stack):
    """Blocks return an object."""

    layer = WrappingLayer

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).hidden
        return x


class NoisyLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


class Noisy(Stack):
    """Blocks draw random numbers."""

    layer = NoisyLayer


class AliasLayer(Layer):
    def forward(self, x: Tensor) -> Any:
        return x.view(-1, WIDTH), super().forward(x)


class Aliasing(Stack):
    """Blocks return a view of their input, which is changed in place and read by its other name."""

    layer = AliasLayer

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            view, y = block(x)
            view.mul_(2.0)
            x = x + y
        return x


class OutsideLayer(Stack):
    """One layer of a block is also called without the block."""

    def through(self, x: Tensor) -> Tensor:
        x = super().through(x)
        return x + self.blocks[1].gate(x)


class Swallowing(Stack):
    """Catches every Exception of its blocks."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            try:
                x = block(x)
            except Exception:
                x = x * 0.0
        return x


def tensors(count: int = 3) -> list[Tensor]:
    return [torch.randn(2, 3 + index, WIDTH) for index in range(count)]


def call(model: nn.Module, sample: Any) -> Any:
    return model(sample)


def llama_run(model: nn.Module, sample: Tensor) -> Any:
    return model(input_ids=sample, use_cache=False).logits


def openvla_run(model: Any, sample: dict[str, Tensor]) -> Any:
    return model(**sample, use_cache=False).logits


Made = tuple[Any, list[Any], Callable[[Any, Any], Any]]


def made(kind: str) -> Made:
    """A model by name, the same each time; its samples; and how it runs one."""
    torch.manual_seed(0)
    if kind == "llama":
        return tiny.llama(), [torch.randint(0, 128, (1, 5 + index)) for index in range(3)], llama_run
    if kind == "openvla":
        pixels = torch.randn(3, 1, 6, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        samples = [{"input_ids": torch.randint(5, 20, (1, 6)), "pixel_values": image} for image in pixels]
        return tiny.openvla(), samples, openvla_run
    return MODELS[kind]().eval(), tensors(), call


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Stack,
    "skipping": Skipping,
    "between": Between,
    "encoder_decoder": EncoderDecoder,
    "towers": Towers,
    "passing": Passing,
    "selecting": Selecting,
    "swallowing": Swallowing,
    "ending": Ending,
    "idling": Idling,
    "changing": Changing,
    "keeping": Keeping,
    "caching": Caching,
    "looping": Looping,
    "piecewise": Piecewise,
    "wrapping": Wrapping,
    "noisy": Noisy,
    "aliasing": Aliasing,
    "outside_layer": OutsideLayer,
}
#: Those whose every unit that runs can be answered from a cache.
REPLAYABLE = ["llama", "openvla", "plain", "skipping", "between", "encoder_decoder", "towers", "passing", "selecting"]
