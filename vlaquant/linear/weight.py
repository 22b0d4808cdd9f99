"""What ``layer.weight`` of a packed layer is: the facts of a float weight without its values."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from vlaquant.errors import PackedWeightError

#: Methods of a tensor that reach for its memory without passing through the dispatcher.
_MEMORY_ACCESS = frozenset(
    {"__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__set__", "_typed_storage", "data_ptr", "numpy"}
    | {"share_memory_", "storage", "tolist", "untyped_storage"}
)


class PackedWeight(Tensor):
    """Stands for the float weight of a packed layer: has its dtype, device and shape, but no values.

    Raises:
        PackedWeightError: at every attempt to compute with it.
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Self:
        """Takes no memory, whatever the shape."""
        weight: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # noqa: SLF001
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in _MEMORY_ACCESS:
            raise _refusal(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _refusal(func.name())


def _refusal(operation: str) -> PackedWeightError:
    return PackedWeightError(
        f"{operation} was called with the weight of a packed linear layer, which holds integer codes. It answers for "
        "dtype, device and shape only; call the layer itself, or compute with layer.dequantize()"
    )


@dataclass(frozen=True)
class WeightFacts:
    """Stands for :class:`PackedWeight` in a trace, which cannot make tensors of such a kind."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    # Breaks the graph, which is why the usual questions are fields
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __getattr__(self, name: str) -> Any:
        return getattr(PackedWeight(self.shape, self.dtype, self.device), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _refusal(func.__name__)
