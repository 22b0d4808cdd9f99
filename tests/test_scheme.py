"""Schemes: what has no meaning is refused, names tell schemes apart, and the manifest brings them back."""

import itertools

import pytest

from vlaquant.errors import RecipeError
from vlaquant.scheme import PRESETS, Granularity, QuantSpec, Scheme, get_scheme, scheme_from_dict, scheme_to_dict

INT8 = QuantSpec(bits=8, granularity=Granularity.CHANNEL)
TOKENS = QuantSpec(bits=8, granularity=Granularity.TOKEN, dynamic=True)


def all_schemes() -> list[Scheme]:
    """Every preset with every change that a rule can make."""
    group_sizes: list[int | str | None] = [None, 32, "channel", "tensor"]
    changes = itertools.product([None, 2, 8], [None, False], group_sizes)
    return [
        preset.with_weight(bits=bits, symmetric=symmetric, group_size=group_size)
        for bits, symmetric, group_size in changes
        for preset in PRESETS.values()
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits=1 is not supported"),
        ({"bits": 9}, "bits=9 is not supported"),
        ({"granularity": Granularity.GROUP}, "group_size=None: give a group_size"),
        ({"group_size": 32}, "granularity=channel with group_size=32"),
        ({"granularity": Granularity.GROUP, "group_size": 0}, "group_size=0"),
        ({"granularity": Granularity.TOKEN}, "scales per token are dynamic"),
        ({"dynamic": True}, "granularity=channel with dynamic=True"),
    ],
)
def test_specs_without_a_meaning_are_refused(fields: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {"bits": 4, "granularity": Granularity.CHANNEL}
    with pytest.raises(RecipeError, match=message):
        QuantSpec(**(usual | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        (TOKENS, None, "a weight has no tokens"),
        (INT8, QuantSpec(bits=4, granularity=Granularity.TENSOR), "activations of 4 bits"),
        (INT8, INT8, "activations are quantized per tensor"),
    ],
)
def test_schemes_without_a_meaning_are_refused(weight: QuantSpec, activation: QuantSpec | None, message: str) -> None:
    with pytest.raises(RecipeError, match=f"scheme odd: {message}"):
        Scheme("odd", weight, activation)


def test_code_ranges() -> None:
    ranges = {
        (bits, symmetric): (spec.qmin, spec.qmax)
        for bits, symmetric in itertools.product([2, 4, 8], [True, False])
        for spec in [QuantSpec(bits=bits, granularity=Granularity.CHANNEL, symmetric=symmetric)]
    }
    assert ranges[2, True] == ranges[2, False] == (-2, 1)
    assert ranges[4, True] == ranges[4, False] == (-8, 7)
    assert ranges[8, True] == (-127, 127)
    assert ranges[8, False] == (-128, 127)


def test_a_name_belongs_to_one_scheme() -> None:
    by_name: dict[str, Scheme] = {}
    for scheme in all_schemes():
        assert by_name.setdefault(scheme.name, scheme) == scheme
    assert {"w4a16_g128", "w8a16_channel", "w8a8", "w4a8_g32", "w2a16_tensor_asym", "w8a8_static"} <= by_name.keys()


def test_changes_leave_the_rest() -> None:
    changed = PRESETS["w8a8_static"].with_weight(bits=4)
    assert (changed.weight.bits, changed.weight.granularity) == (4, Granularity.CHANNEL)
    assert changed.activation == PRESETS["w8a8_static"].activation
    assert PRESETS["w4a16"].with_weight() == PRESETS["w4a16"]
    with pytest.raises(RecipeError, match="use a number, 'channel' or 'tensor'"):
        PRESETS["w4a16"].with_weight(group_size="token")


def test_manifest_round_trip() -> None:
    for scheme in all_schemes():
        assert scheme_from_dict(scheme_to_dict(scheme)) == scheme


def test_unknown_preset_names_the_nearest() -> None:
    assert get_scheme("w8a8") is PRESETS["w8a8"]
    with pytest.raises(RecipeError, match=r"unknown scheme 'w8a9'; known schemes: w4a16.*; did you mean 'w8a8'\?"):
        get_scheme("w8a9")
    with pytest.raises(RecipeError, match=r"w4a8$"):
        get_scheme("float")
