"""What a run depends on: equal content has equal fingerprints, and any other content another."""

import json
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import observations
from torch import Tensor

from vlaquant.engine.fingerprint import digest, fingerprint, first_difference, package_versions

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
Point = namedtuple("Point", "x y")


@dataclass
class Sample:
    x: Any
    name: str = "a"


def base() -> Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digest_depends_on_values_only(dtype: torch.dtype) -> None:
    tensor = base().to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    assert digest(tensor) == digest(tensor.transpose(0, 2).contiguous().transpose(0, 2)), "not on strides"
    assert digest(tensor) == digest(torch.cat([tensor, tensor])[2:]), "not on where it lies"
    assert digest(tensor.t() if tensor.ndim == 2 else tensor[0].t()) != digest(tensor[0])


def test_digest_sees_dtype_shape_and_every_bit() -> None:
    tensor = base()
    flipped = tensor.clone()
    flipped.view(torch.int32)[1, 2, 3] ^= 1
    others = [
        flipped,
        tensor.reshape(3, 2, 4),
        tensor.view(torch.int32),
        tensor.double(),
        -tensor,
        torch.zeros(2, 3, 4),
        -torch.zeros(2, 3, 4),
        torch.zeros(0),
        torch.zeros(0, 3),
        torch.tensor(0.0),
        torch.zeros(1),
    ]
    digests = {digest(one) for one in [tensor, *others]}
    assert len(digests) == len(others) + 1


def test_digest_of_parameters_and_inference_tensors() -> None:
    with torch.inference_mode():
        inside = base() + 0
    assert digest(inside) == digest(torch.nn.Parameter(base())) == digest(base())


def test_a_broken_digest_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaquant.engine.fingerprint.digest", lambda tensor: str(tuple(tensor.shape)))
    with pytest.raises(AssertionError):
        test_samples_differ_in_one_place(base(), base() + 1)


PALETTE = Image.new("P", (4, 4))
PALETTE.putpalette([1, 2, 3] * 256)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (base(), base() + 1),
        (base(), base().double()),
        (base().numpy(), base()),
        (base().numpy(), base().numpy()[::-1]),
        ([1, 2], (1, 2)),
        ([1, [2, 3]], [[1, 2], 3]),
        ([1, [2], 3], [1, [2, 3]]),
        (["a", "b"], ["a')str('b"]),
        (["ab", "c"], ["a", "bc"]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({"a": 1}, {"a": 1, "b": None}),
        ({1: "a"}, {"1": "a"}),
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (0.1 + 0.2, 0.3),
        ("1", 1),
        ("a", b"a"),
        (None, "None"),
        (np.float32(1.0), 1.0),
        (np.float32(1.0), np.float64(1.0)),
        (Sample(1), Sample(2)),
        (Sample(1, "a"), Sample(1, "b")),
        (Point(1, 2), (1, 2)),
        (Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (0, 0, 1))),
        (Image.new("RGB", (2, 8)), Image.new("RGB", (8, 2))),
        (Image.new("L", (4, 4)), Image.new("P", (4, 4))),
        (Image.new("P", (4, 4)), PALETTE),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else repr(value),
)
def test_samples_differ_in_one_place(one: Any, other: Any) -> None:
    mine, theirs = (fingerprint([0, {"x": value}]) for value in (one, other))
    assert mine is not None
    assert theirs is not None
    assert mine != theirs


def test_number_and_order_of_samples_count() -> None:
    found = [fingerprint(samples) for samples in ([], [1], [1, 2], [2, 1], [[1, 2]], [1, 1], [[], 1], [[1]])]
    assert None not in found
    assert len(set(found)) == len(found)


def test_equal_samples_made_twice() -> None:
    def made() -> list[Any]:
        nested = {"a": [base(), (1, 2.5, "x", b"y", None, True)], "i": Image.new("RGB", (3, 3), (1, 2, 3))}
        return [nested, OrderedDict(x=1), UserDict(x=np.arange(5)), Sample(Point(1, base())), np.int64(3)]

    assert fingerprint(made()) == fingerprint(made()) is not None
    assert fingerprint(observations(3)) == fingerprint(observations(3)) is not None
    assert fingerprint(observations(3)) != fingerprint(observations(3, seed=1))


class _Opaque:
    pass


@pytest.mark.parametrize(
    "unknown",
    [
        _Opaque(),
        {1, 2},
        lambda: 1,
        np.array([_Opaque()]),
        Sample(_Opaque()),
        Sample,
        iter([1]),
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_seen_has_no_fingerprint(unknown: Any) -> None:
    assert fingerprint([1, [unknown]]) is None


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_NESTS = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(_NESTS, _NESTS)
def test_fingerprints_are_equal_just_for_equal_nests(one: Any, other: Any) -> None:
    assert (fingerprint([one]) == fingerprint([other])) == (repr(one) == repr(other))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(_JSON, _JSON)
def test_first_difference_is_none_just_for_equal_values(one: Any, other: Any) -> None:
    assert (first_difference(one, other) is None) == (one == other)
    assert first_difference(one, json.loads(json.dumps(one))) is None


@given(st.dictionaries(st.text(min_size=1, max_size=3), _JSON, min_size=1, max_size=3), st.data())
def test_the_place_that_was_changed_is_named(nest: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(nest)))
    found = first_difference(nest, nest | {key: "another value"})
    assert found is not None
    assert found.startswith(key)
    assert '"another value"' in found or "another value then" in found


def test_differences_in_words() -> None:
    now = {"recipe": {"rules": [{"scheme": "w4a16"}, {"scheme": "w8a8"}], "seed": 0}, "versions": {"torch": "2.1"}}
    then: Any = json.loads(json.dumps(now))
    then["recipe"]["rules"][1]["scheme"] = "w4a16"
    then["versions"]["torch"] = "2.0"
    assert first_difference(now, then) == "recipe.rules[1].scheme: w8a8 now, w4a16 then"
    assert first_difference({"a": 1}, {"a": 1, "b": [2]}) == "b: absent now, [2] then"
    assert first_difference({"a": 1, "b": None}, {"a": 1}) == "b: null now, absent then"
    assert first_difference({"a": [1, 2]}, {"a": [1]}) == "a: [1, 2] now, [1] then"
    long = first_difference({"a": "x" * 200}, {"a": "y" * 200})
    assert long is not None
    assert len(long) < 140


def test_versions_name_what_makes_a_checkpoint() -> None:
    assert package_versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert set(package_versions()) == {"vlaquant", "torch", "transformers", "safetensors", "compressed-tensors"}
