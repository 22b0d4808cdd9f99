"""The layers, and how a quantized weight becomes one.

Letters: n out, k in, g groups, t tokens.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vlaquant.errors import PlanError
from vlaquant.kernels import Kernel, Query, Stored, select_kernel, unpack
from vlaquant.linear.weight import PackedWeight, WeightFacts
from vlaquant.numerics import QuantizedWeight
from vlaquant.packing import pack_columns, pack_rows, packed_width
from vlaquant.scheme import Granularity, QuantSpec, Scheme


class _PackedLinear(nn.Module):
    """What both kinds share: all but the buffers.

    The codes are held once. After the first forward they may lie in a kernel's layout only: then the buffer is None,
    and ``state_dict``, ``dequantize``, copies and moves make it again.
    """

    weight_scale: Tensor
    bias: nn.Parameter | None
    #: Name of the buffer that holds the codes, unless a kernel's layout holds them.
    _codes: ClassVar[str]

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)
        self._prepared: dict[torch.dtype, tuple[Kernel, Query, Stored, tuple[Tensor, ...]]] = {}

    @property
    def weight(self) -> PackedWeight:
        """Answers for dtype, device and shape as the float weight would; cannot be computed with."""
        scale, shape = self.weight_scale, torch.Size((self.out_features, self.in_features))
        if torch.compiler.is_compiling():
            return cast("PackedWeight", WeightFacts(scale.dtype, scale.device, shape))
        return PackedWeight(shape, scale.dtype, scale.device)

    @property
    def resident_bytes(self) -> int:
        """Memory that the layer holds now: buffers, bias, and the layouts that kernels made."""
        tensors = [*self.buffers(), *self.parameters()]
        tensors += [tensor for _, _, _, prepared in self._prepared.values() for tensor in prepared]
        return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

    def stored(self) -> Stored:
        """The tensors as a kernel takes them."""
        raise NotImplementedError

    def query(self, dtype: torch.dtype | None = None) -> Query:
        """What decides about the kernel for activations of ``dtype``, the layer's own if not given."""
        scale = self.weight_scale
        return Query(self.scheme, self.in_features, self.out_features, dtype or scale.dtype, scale.device.type)

    def dequantize(self) -> Tensor:
        """The float weight [n, k] in the dtype of the scales."""
        return unpack(self.stored(), self.query()).dequantize(self.weight_scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias`` for x [..., k]; the result has the dtype of x (under autocast, of the latter).

        A gradient with respect to x is that of the dequantized layer: rounding of activations passes it through.

        Raises:
            ValueError: x has another last dimension than k.
            TypeError: x is not floating point.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"{self!r} got an input of shape {tuple(x.shape)}, wanted [..., {self.in_features}]")
        if not x.is_floating_point():
            raise TypeError(f"{self!r} got an input of {x.dtype}, wanted a floating point dtype")
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if torch.is_grad_enabled() and x.requires_grad:
            return cast("Tensor", _StraightThrough.apply(x, self))  # type: ignore[no-untyped-call]
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """:meth:`forward` without its checks and without gradients."""
        shape = x.shape
        rows = x if len(shape) == 2 else x.reshape(shape[:-1].numel(), self.in_features)
        if rows.shape[0] == 0:
            return x.new_empty(*shape[:-1], self.out_features)
        if x.dtype not in self._prepared or self._prepared[x.dtype][2].bias is not self._parameters["bias"]:
            self.prepare_(x.dtype)
        kernel, query, stored, prepared = self._prepared[x.dtype]
        y = kernel.run(rows, stored, prepared, query)
        return y if len(shape) == 2 else y.view(*shape[:-1], self.out_features)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def prepare_(self, dtype: torch.dtype) -> None:
        """Choose the kernel for activations of ``dtype`` and make its layout; the first forward does so by itself."""
        query = self.query(dtype)
        kernel = select_kernel(query)
        made = [layout for known, _, _, layout in self._prepared.values() if known is kernel and kernel.restore]
        stored = self.stored()
        prepared = made[0] if made else kernel.prepare(stored, query)
        if kernel.restore is None:
            self._buffers[self._codes] = stored.weight
        else:
            stored = stored._replace(weight=stored.weight.new_empty(0))
        self._prepared[dtype] = (kernel, query, stored, prepared)
        if all(known.restore is not None for known, *_ in self._prepared.values()):
            self._buffers[self._codes] = None

    def release_(self) -> None:
        """Drop what kernels made; codes that only a layout holds become a buffer again.

        To be called by whoever writes into the buffers by hand, before doing so.
        """
        with torch.inference_mode(mode=False):
            self._buffers[self._codes] = self.stored().weight
        self._prepared.clear()

    def _code_tensor(self) -> Tensor:
        """The codes as the format has them, from a kernel's layout where only that holds them."""
        codes = self._buffers[self._codes]
        if codes is not None:
            return codes
        kernel, query, _, prepared = next(iter(self._prepared.values()))
        assert kernel.restore is not None
        return self._as_stored(kernel.restore(prepared, query))

    def _as_stored(self, codes: Tensor) -> Tensor:
        """Codes int8 [n, k] as the format has them."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """As of ``nn.Linear``, with the scheme and the kernel for activations in the layer's dtype."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, kernel={select_kernel(self.query()).name}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Kernel layouts can be opaque to copying and pickling, and are cheap to make again
        self.release_()
        return {**self.__dict__, "_prepared": {}}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release_()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - the signature of nn.Module
        self.release_()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.release_()
        super()._load_from_state_dict(state_dict, prefix, *args)


class W4A16Linear(_PackedLinear):
    """A packed weight of 2 to 8 bits that meets float activations; the format is ``pack-quantized``.

    Buffers: ``weight_packed`` int32 [n, ceil(k * bits / 32)]; ``weight_scale`` [n, g], or [1] per tensor;
    ``weight_shape`` int64 [2]; if asymmetric ``weight_zero_point`` int32 [ceil(n * bits / 32), g], or int8 [1] per
    tensor. They are allocated but not filled, on the default device.

    Raises:
        PlanError: k is not a multiple of the group size.
    """

    _codes = "weight_packed"

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, scheme, bias=bias, dtype=dtype)
        spec = scheme.weight
        shape = _scale_shape(spec, out_features, in_features)
        packed = torch.empty(out_features, packed_width(in_features, spec.bits), dtype=torch.int32)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.empty(shape, dtype=dtype))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        if not spec.symmetric:
            zero = torch.empty(shape, dtype=torch.int8)
            if spec.granularity is not Granularity.TENSOR:
                zero = torch.empty(packed_width(out_features, spec.bits), shape[1], dtype=torch.int32)
            self.register_buffer("weight_zero_point", zero)

    def stored(self) -> Stored:
        """The tensors as a kernel takes them."""
        zero = self._buffers.get("weight_zero_point")
        return Stored(self._code_tensor(), self.weight_scale, zero, None, None, self.bias)

    def _as_stored(self, codes: Tensor) -> Tensor:
        return pack_rows(codes, self.scheme.weight.bits)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        shape = state_dict.get(f"{prefix}weight_shape")
        wanted = [self.out_features, self.in_features]
        # Rows of a few columns more or fewer can pack into as many words, so that no other shape would tell
        if shape is not None and not shape.is_meta and shape.tolist() != wanted:
            errors: list[str] = args[-1]
            errors.append(f"{prefix}weight_shape is {shape.tolist()} in the checkpoint, wanted {wanted}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class W8A8Linear(_PackedLinear):
    """A weight of 8 bits or fewer, one code a byte, that meets int8 activations; the format is ``int-quantized``.

    Buffers: ``weight`` int8 [n, k]; ``weight_scale`` [n, g], or [1] per tensor; if asymmetric ``weight_zero_point``
    int8, shaped alike; for static activations ``input_scale`` [1] and, if they are asymmetric, ``input_zero_point``
    int8 [1]. They are allocated but not filled, on the default device.

    Raises:
        PlanError: k is not a multiple of the group size.
    """

    _codes = "weight"

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, scheme, bias=bias, dtype=dtype)
        assert scheme.activation is not None
        shape = _scale_shape(scheme.weight, out_features, in_features)
        # register_buffer refuses the name, because the class has a property of that name
        self._buffers["weight"] = torch.empty(out_features, in_features, dtype=torch.int8)
        self.register_buffer("weight_scale", torch.empty(shape, dtype=dtype))
        if not scheme.weight.symmetric:
            self.register_buffer("weight_zero_point", torch.empty(shape, dtype=torch.int8))
        if not scheme.activation.dynamic:
            self.register_buffer("input_scale", torch.empty(1, dtype=dtype))
            if not scheme.activation.symmetric:
                self.register_buffer("input_zero_point", torch.empty(1, dtype=torch.int8))

    def stored(self) -> Stored:
        """The tensors as a kernel takes them."""
        buffers = self._buffers
        return Stored(
            weight=self._code_tensor(),
            scale=self.weight_scale,
            zero=buffers.get("weight_zero_point"),
            input_scale=buffers.get("input_scale"),
            input_zero=buffers.get("input_zero_point"),
            bias=self.bias,
        )

    def _as_stored(self, codes: Tensor) -> Tensor:
        return codes


QuantLinear = W4A16Linear | W8A8Linear


class _StraightThrough(torch.autograd.Function):
    """Forward through the kernel, backward through the dequantized weight."""

    @staticmethod
    def forward(x: Tensor, layer: _PackedLinear) -> Tensor:
        return layer.compute(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _PackedLinear], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize().to(grad.dtype), None


def _scale_shape(spec: QuantSpec, n: int, k: int) -> tuple[int, ...]:
    if spec.granularity is Granularity.TENSOR:
        return (1,)
    if spec.group_size is None:
        return (n, 1)
    if k % spec.group_size != 0:
        raise PlanError(f"in_features={k} is not a multiple of group_size={spec.group_size}; use one that divides it")
    return (n, k // spec.group_size)


def empty_linear(in_features: int, out_features: int, scheme: Scheme, *, bias: bool, dtype: torch.dtype) -> QuantLinear:
    """A layer of the kind that ``scheme`` asks for, with buffers to be filled, on the default device (meta works)."""
    kind = W4A16Linear if scheme.activation is None else W8A8Linear
    return kind(in_features, out_features, scheme, bias=bias, dtype=dtype)


def from_quantized(
    weight: QuantizedWeight,
    scheme: Scheme,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    input_scale: Tensor | None = None,
    input_zero: Tensor | None = None,
) -> QuantLinear:
    """The layer that holds ``weight``, on its device. Needs ``weight.scale`` in ``dtype``: codes belong to their scale.

    Args:
        weight: codes [n, k] and their scales.
        scheme: its ``weight`` is ``weight.spec``.
        bias: [n], copied; or None.
        dtype: of scales, bias, and the float weight that ``dequantize`` gives.
        input_scale: one value, for static activations only.
        input_zero: one value, for static asymmetric activations only.
    """
    assert weight.spec == scheme.weight, (weight.spec, scheme)
    assert weight.scale.dtype == dtype, (weight.scale.dtype, dtype)
    n, k = weight.codes.shape
    with torch.device("meta"):
        layer = empty_linear(k, n, scheme, bias=bias is not None, dtype=dtype)
    tensors = _weight_tensors(weight, packed=scheme.activation is None)
    if input_scale is not None:
        tensors["input_scale"] = input_scale.reshape(1).to(dtype)
    if input_zero is not None:
        tensors["input_zero_point"] = input_zero.reshape(1).to(torch.int8)
    if bias is not None:
        tensors["bias"] = bias.detach().to(dtype, copy=True)
    device = weight.codes.device
    layer.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return layer


def _weight_tensors(weight: QuantizedWeight, *, packed: bool) -> dict[str, Tensor]:
    """``weight`` under the names and in the layouts of the format."""
    spec = weight.spec
    shape = _scale_shape(spec, *weight.codes.shape)
    tensors = {"weight_scale": weight.scale.reshape(shape).contiguous()}
    if packed:
        tensors["weight_packed"] = pack_rows(weight.codes, spec.bits)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape)
    else:
        tensors["weight"] = weight.codes.contiguous()
    if weight.zero is not None:
        tensors["weight_zero_point"] = weight.zero.reshape(shape).contiguous()
        if packed and spec.granularity is not Granularity.TENSOR:
            tensors["weight_zero_point"] = pack_columns(weight.zero, spec.bits)
    return tensors
