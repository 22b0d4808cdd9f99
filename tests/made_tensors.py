"""Tensors for the tests of safetensors files."""

import torch
from torch import Tensor

from vlaquant.checkpoint import tensor_files

SHAPES = ((), (0,), (3,), (5, 0), (2, 3, 4))


def some_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Bytes 0 and 1 only, which mean something in every dtype, bool included."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def every_dtype() -> dict[str, Tensor]:
    """Names that sort in another way than they come, and one that is not ASCII."""
    return {
        f"{'zma'[index % 3]}.é.{dtype}.{index}": some_tensor(dtype, shape, index)
        for dtype in tensor_files.DTYPES.values()
        for index, shape in enumerate(SHAPES)
    }


def same(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def blocks(count: int = 6) -> dict[str, Tensor]:
    """bfloat16, the largest first; ``block.i.weight`` has 14 · (i + 1) bytes."""
    return {f"block.{index}.weight": torch.randn(index + 1, 7).bfloat16() for index in reversed(range(count))}
