"""What "4-bit" means, as plain values: how a tensor is cut up, how many bits, and which pair makes a scheme.

Pure data. Nothing here holds a tensor or a device, and everything is checked when it is made.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

from vlaquant.errors import RecipeError


class Granularity(StrEnum):
    """Which values share one scale. For a weight [n, k] and an activation [t, k]:

    ========= ======================== ===========================
    member    weight scale             activation scale
    ========= ======================== ===========================
    TENSOR    [1, 1]                   [1] (calibrated, static)
    CHANNEL   [n, 1], one per row      not used
    GROUP     [n, k / group_size]      not used
    TOKEN     not used                 [t, 1] (computed on the fly)
    ========= ======================== ===========================
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    TOKEN = "token"


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one tensor becomes integers.

    Codes are signed integers in [qmin, qmax]. Symmetric means that zero maps to code 0.

    Raises:
        RecipeError: a combination that has no meaning, such as a group size without groups.
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True
    group_size: int | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"bits={self.bits} is not supported; use 2 to 8")
        if (self.granularity is Granularity.GROUP) != (self.group_size is not None):
            raise RecipeError(
                f"granularity={self.granularity.value} with group_size={self.group_size}: "
                "give a group_size with granularity 'group', and only there"
            )
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError(f"group_size={self.group_size} must be positive")
        if self.dynamic != (self.granularity is Granularity.TOKEN):
            raise RecipeError(
                f"granularity={self.granularity.value} with dynamic={self.dynamic}: "
                "scales per token are dynamic, all others are fixed beforehand"
            )

    @property
    def qmin(self) -> int:
        """Smallest code: -2^(b-1), and -127 for symmetric 8 bits, so that negation stays in range."""
        return -127 if self.symmetric and self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code: 2^(b-1) - 1."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one Linear is stored and run: its weight, and its activation if that is quantized too."""

    name: str
    weight: QuantSpec
    activation: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.granularity is Granularity.TOKEN:
            raise RecipeError(f"scheme {self.name}: a weight has no tokens; use tensor, channel or group")
        if self.activation is None:
            return
        if self.activation.bits != 8:
            raise RecipeError(
                f"scheme {self.name}: activations of {self.activation.bits} bits are not supported; use 8"
            )
        if self.activation.granularity not in {Granularity.TENSOR, Granularity.TOKEN}:
            raise RecipeError(
                f"scheme {self.name}: activations are quantized per tensor (static) or per token (dynamic)"
            )

    def with_weight(
        self, *, bits: int | None = None, symmetric: bool | None = None, group_size: int | str | None = None
    ) -> Self:
        """The same scheme with another weight width, symmetry or grouping (a number, ``channel`` or ``tensor``)."""
        weight = self.weight
        if bits is not None:
            weight = replace(weight, bits=bits)
        if symmetric is not None:
            weight = replace(weight, symmetric=symmetric)
        if isinstance(group_size, int):
            weight = replace(weight, granularity=Granularity.GROUP, group_size=group_size)
        elif group_size is not None:
            weight = replace(weight, granularity=_granularity(group_size), group_size=None)
        return replace(self, name=_name(weight, self.activation), weight=weight)


def _granularity(name: str) -> Granularity:
    if name not in {Granularity.CHANNEL, Granularity.TENSOR}:
        raise RecipeError(f"group_size={name!r}: use a number, 'channel' or 'tensor'")
    return Granularity(name)


def _name(weight: QuantSpec, activation: QuantSpec | None) -> str:
    """``w4a16_g64``, ``w8a8``, ``w3a16_channel_asym`` …: what distinguishes a scheme from its siblings."""
    parts = [f"w{weight.bits}a{activation.bits if activation else 16}"]
    if weight.granularity is Granularity.GROUP:
        parts.append(f"g{weight.group_size}")
    elif activation is None or weight.granularity is Granularity.TENSOR:
        parts.append(weight.granularity.value)
    if not weight.symmetric:
        parts.append("asym")
    if activation is not None and activation.granularity is Granularity.TENSOR:
        parts.append("static")
    return "_".join(parts)


def _weight_only(bits: int, granularity: Granularity, group_size: int | None) -> Scheme:
    weight = QuantSpec(bits=bits, granularity=granularity, group_size=group_size)
    return Scheme(name=_name(weight, None), weight=weight)


def _int8_activation(weight: QuantSpec, granularity: Granularity, *, symmetric: bool) -> Scheme:
    activation = QuantSpec(
        bits=8, granularity=granularity, symmetric=symmetric, dynamic=granularity is Granularity.TOKEN
    )
    return Scheme(name=_name(weight, activation), weight=weight, activation=activation)


_INT8_CHANNEL = QuantSpec(bits=8, granularity=Granularity.CHANNEL)
_INT4_GROUP = QuantSpec(bits=4, granularity=Granularity.GROUP, group_size=128)

PRESETS: dict[str, Scheme] = {
    "w4a16": _weight_only(4, Granularity.GROUP, 128),
    "w3a16": _weight_only(3, Granularity.GROUP, 128),
    "w2a16": _weight_only(2, Granularity.GROUP, 128),
    "w8a16": _weight_only(8, Granularity.CHANNEL, None),
    "w8a8": _int8_activation(_INT8_CHANNEL, Granularity.TOKEN, symmetric=True),
    "w8a8_static": _int8_activation(_INT8_CHANNEL, Granularity.TENSOR, symmetric=False),
    "w4a8": _int8_activation(_INT4_GROUP, Granularity.TOKEN, symmetric=True),
}


def get_scheme(name: str) -> Scheme:
    """The preset of that name.

    Raises:
        RecipeError: no such preset; the message names the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"unknown scheme {name!r}; known schemes: {', '.join(PRESETS)}{hint}")


def scheme_from_dict(data: Mapping[str, Any]) -> Scheme:
    """Inverse of :func:`scheme_to_dict`."""
    activation = data["activation"]
    return Scheme(
        name=data["name"],
        weight=_spec_from_dict(data["weight"]),
        activation=None if activation is None else _spec_from_dict(activation),
    )


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """Plain values for the manifest."""
    return {
        "name": scheme.name,
        "weight": _spec_to_dict(scheme.weight),
        "activation": None if scheme.activation is None else _spec_to_dict(scheme.activation),
    }


def _spec_from_dict(data: Mapping[str, Any]) -> QuantSpec:
    return QuantSpec(**{**data, "granularity": Granularity(data["granularity"])})


def _spec_to_dict(spec: QuantSpec) -> dict[str, Any]:
    return {
        "bits": spec.bits,
        "granularity": spec.granularity.value,
        "symmetric": spec.symmetric,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }
