"""Plain values as JSON: what goes in comes out, and what is not data is refused by name."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import FormatError, UnsupportedValueError
from shardckpt.format.names import join, segment
from shardckpt.format.tree import PerRankRef, TensorRef
from shardckpt.format.value_decoding import decode_value
from shardckpt.format.value_encoding import encode_value

_quick = settings(deadline=None, max_examples=200)

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 200), 1 << 200)
    | st.sampled_from([(1 << 63) - 1, 1 << 63, -(1 << 63), -(1 << 63) - 1])
    | st.floats()
    | st.text()
    | st.sampled_from(["", "$", "$tuple", "\0", "ä", "𝄞", "/"])
    | st.binary(max_size=20)
)
_keys = (
    st.text(max_size=6)
    | st.sampled_from(["", "$tuple", "$x", "a/b", ".", "..", "zarr.json", "__a"])
    | st.integers()
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
    | st.binary(max_size=4)
    | st.tuples(st.integers(), st.text(max_size=3))
)


def _distinct(value: dict[Any, Any]) -> bool:
    return len({segment(key) for key in value}) == len(value)


_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(_keys, inner, max_size=4).filter(_distinct)
    ),
    max_leaves=15,
)


def same(a: Any, b: Any) -> bool:
    """Equal, of equal types, and NaN is NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    return bool(a == b)


@_quick
@given(_values)
def test_round_trip(value: Any) -> None:
    """Any nested plain value survives, through either JSON library, with types and order of keys."""
    form = encode_value(value, "state")
    assert same(decode_value(msgspec.json.decode(msgspec.json.encode(form))), value)
    assert same(decode_value(json.loads(json.dumps(form, allow_nan=False))), value)


def test_forms() -> None:
    """The form of each kind of value, as the format has it."""
    for value, form in [
        ({"a": [1, None, True, "x"]}, {"a": [1, None, True, "x"]}),
        ((1, 2), {"$tuple": [1, 2]}),
        (b"\x00\xff", {"$bytes": "AP8="}),
        (math.nan, {"$float": "nan"}),
        (-math.inf, {"$float": "-inf"}),
        (1 << 63, {"$int": "0x8000000000000000"}),
        (-(1 << 64), {"$int": "-0x10000000000000000"}),
        ({1: "a"}, {"$dict": [[1, "a"]]}),
        ({"$a": 1, "b": 2}, {"$dict": [["$a", 1], ["b", 2]]}),
        ({}, {}),
        ((), {"$tuple": []}),
    ]:
        assert encode_value(value, "x") == form
        assert same(decode_value(form), value)


def test_leaves_become_references() -> None:
    """A leaf's own form stands in the tree; tensors and per-rank values come back as references."""

    class Leaf:
        pass

    def leaf(value: Any, path: str) -> Any:
        return {"$tensor": path} if isinstance(value, Leaf) else NotImplemented

    assert encode_value({"a": [Leaf()]}, "s", leaf) == {"a": [{"$tensor": "s/a/0"}]}
    assert decode_value({"$tensor": "s/a/0"}) == TensorRef("s/a/0")
    assert decode_value({"$ndarray": "n"}) == TensorRef("n", ndarray=True) != TensorRef("n")
    reference = decode_value({"$per_rank": "rng"})
    assert isinstance(reference, PerRankRef)
    assert reference.path == "rng"
    with pytest.raises(UnsupportedValueError, match="object"):
        encode_value({"a": object()}, "s", leaf)


def test_relatives_of_plain_types() -> None:
    """Subclasses of numbers, texts and mappings are stored as what they are made of, not as they print."""

    class Colour(str, enum.Enum):  # noqa: UP042, whose str() is not its value
        RED = "red"

    class Level(enum.IntEnum):
        LOW = 1

    value = OrderedDict(
        {Colour.RED: [Colour.RED, Level.LOW], "view": MappingProxyType({"b": bytearray(b"x")})}
    )
    back = decode_value(encode_value(value, "s"))
    assert same(back, OrderedDict({"red": ["red", 1], "view": {"b": bytearray(b"x")}}))
    assert decode_value(encode_value(10**5000, "s")) == 10**5000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"a": object()},
            r"state\['s/a'\] is a builtins.object, which cannot be stored as data. Storable: tensors",
        ),
        ({"f": [0, print]}, r"state\['s/f/1'\] is a builtins.builtin_function_or_method"),
        ({1, (2, print)}, r"state\['s \(an item\)/1'\] is a builtins.builtin_function"),
        ({"a": {1: 0, "1": 0}}, r"state\['s/a'\] has the keys 1 and '1', which would share the name '1'"),
        ({"a": {(1, print): 0}}, r"state\['s/a \(a key\)/1'\] is a builtins.builtin_function"),
        ({"a": "\ud800"}, r"state\['s/a'\] holds a text that is not Unicode: .* Store it as bytes"),
        ({"\ud800": 1}, r"state\['s'\] holds a text that is not Unicode"),
    ],
)
def test_refusals(value: Any, message: str) -> None:
    """What is not data is refused with its path, its type and the remedy."""
    with pytest.raises(UnsupportedValueError, match=message):
        encode_value(value, "s")


def test_endless_nesting() -> None:
    """A list that contains itself is refused; nesting up to the limit survives the JSON parser."""
    endless: list[Any] = []
    endless.append({"again": endless})
    with pytest.raises(UnsupportedValueError, match=r"100 levels deep\. Does it contain itself"):
        encode_value(endless, "")
    deep: Any = 1
    for _ in range(100):
        deep = {1: deep}
    form = msgspec.json.decode(msgspec.json.encode(encode_value(deep, "")))
    assert same(decode_value(form), deep)
    with pytest.raises(UnsupportedValueError, match="100 levels deep"):
        encode_value({1: {1: deep}}, "")
    for _ in range(500):
        form = [form]
    with pytest.raises(FormatError, match="more than 100 levels deep"):
        decode_value(form)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"$new": 1}, r"'' has the entry type '\$new', which this version does not know"),
        ({"a": [{"$new": 1}]}, r"'a/0' has the entry type '\$new'"),
        ({"$tuple": [], "more": 1}, r"entry type '\$tuple, more', which this version does not know"),
        ({"more": 1, "$tuple": []}, r"entry type 'more, \$tuple', which this version does not know"),
        ({"$tuple": "ab"}, r"invalid \$tuple: .*expected a list, found 'ab'"),
        ({"$bytes": "AP8"}, r"invalid \$bytes"),
        ({"$bytes": "*"}, r"invalid \$bytes"),
        ({"$bytes": 5}, r"invalid \$bytes"),
        ({"$float": "1.5"}, r"invalid \$float"),
        ({"$float": [1]}, r"invalid \$float"),
        ({"$int": "ten"}, r"invalid \$int"),
        ({"$int": 10}, r"invalid \$int"),
        ({"$dict": {"a": 1}}, r"invalid \$dict: .*expected a list"),
        ({"$dict": ["ab"]}, r"invalid \$dict: .*expected a list, found 'ab'"),
        ({"$dict": [[1, 2, 3]]}, r"invalid \$dict"),
        ({"$dict": [[[1], 2]]}, r"invalid \$dict: .*unhashable"),
        ({"$dict": [[1, 2], [1, 3]]}, r"invalid \$dict: .*a key occurs twice"),
        ({"$tensor": 5}, r"entry type '\$tensor'"),
        ({"$per_rank": None}, r"entry type '\$per_rank'"),
    ],
)
def test_invalid_forms(form: Any, message: str) -> None:
    """A form that no encode makes is an error that names its place."""
    with pytest.raises(FormatError, match=message):
        decode_value(form)


@_quick
@given(st.dictionaries(_keys, st.none(), max_size=6))
def test_keys_never_share_a_segment(value: dict[Any, None]) -> None:
    """A dict either is refused or has as many segments as keys."""
    try:
        encode_value(value, "s")
    except UnsupportedValueError as error:
        assert "share the name" in str(error)
    else:
        assert _distinct(value)


_ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=8)


@_quick
@given(_ANY_TEXT, _ANY_TEXT)
def test_texts_never_share_a_segment(a: str, b: str) -> None:
    """Two different texts, lone surrogates among them, have two segments; but "" has that of NUL."""
    if (a or "\0") != (b or "\0"):
        assert segment(a) != segment(b)


@_quick
@given(_keys | _ANY_TEXT | st.sampled_from(["", ".", "..", "...", "__", "__a", "zarr.json", "a\\b", "\n"]))
def test_segments_are_legal_names(key: object) -> None:
    """Whatever the key, its segment may be a node of a Zarr hierarchy and a folder's name."""
    name = segment(key)
    assert name
    assert name.strip(".")
    assert not name.startswith("__")
    assert name != "zarr.json"
    assert not set("/\\\0\n") & set(name)
    assert name.isascii()
    assert name.isprintable()
    assert join("", key) == name
    assert join("a", key) == f"a/{name}"
