"""Values of Python's and torch's own types: each comes back, or gets its class from the state, or is refused."""

from __future__ import annotations

import datetime
import enum
import json
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt.errors import FormatError, StateError, UnsupportedValueError
from shardckpt.format.tree import Record
from shardckpt.format.value_decoding import decode_value
from shardckpt.format.value_encoding import encode_value
from shardckpt.storage import Storage

UTC = datetime.UTC
VALUES: list[Any] = [
    bytearray(b"a\x00"),
    1 - 2j,
    complex("nan"),
    {3, 1, "b", (1, None)},
    set(),
    frozenset([frozenset([1]), 2]),
    deque([1, [2]], maxlen=5),
    deque(),
    OrderedDict(b=1, a=OrderedDict({3: 4})),
    Counter("abca"),
    defaultdict(list, {1: [2]}),
    defaultdict(None, a=1),
    torch.Size([2, 0]),
    torch.Size([]),
    torch.bfloat16,
    torch.bool,
    torch.device("cpu"),
    torch.device("cuda", 1),
    range(1, 10, 3),
    slice(None, 5, -1),
    Path("/a/../b"),
    Path("ä"),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime.datetime(2026, 1, 2, tzinfo=UTC),
    datetime.date(1, 1, 1),
    datetime.time(23, 59, tzinfo=datetime.timezone(datetime.timedelta(hours=-3, minutes=30))),
    datetime.timedelta(days=-1, microseconds=5),
    Decimal("1.50"),
    Decimal("-Infinity"),
    Fraction(-3, 4),
    {torch.float32: 1, Path("a"): 2, frozenset([1]): 3, 1j: 4, Fraction(1, 2): 5},
]


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        factories = getattr(one, "default_factory", None), getattr(other, "default_factory", None)
        return factories[0] is factories[1] and [*map(repr, one.items())] == [*map(repr, other.items())]
    return repr(one) == repr(other) or one == other


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_each_comes_back(value: Any, place: Storage) -> None:
    """With its type, where the state has nothing at its place, or a value of the same type, or of another one."""
    form = encode_value(value, "x")
    assert same(decode_value(json.loads(json.dumps(form))), value)
    shardckpt.save(place, {"v": value, "deep": {"list": [value, (value,)]}})
    for held in (None, type(value)() if type(value) in (set, deque, bytearray) else value, 5):
        state: dict[str, Any] = {"v": held, "deep": None}
        shardckpt.load(place, state)
        if not isinstance(value, dict):
            assert same(state["v"], value)
        assert same(state["deep"]["list"][1][0], value)


def test_the_order_of_a_set_says_nothing() -> None:
    """Ranks iterate over one set of texts in different orders, and have one form of it."""
    items = [f"text {n}" for n in range(50)]
    assert encode_value(set(items), "x") == encode_value({*items[25:], *items[:25]}, "x")
    assert encode_value({2, 10, 1}, "x") == {"$set": [1, 10, 2]}  # by text


Pair = namedtuple("Pair", "x y")


class Typed(NamedTuple):
    x: Any
    y: Any = 2


class Swapped(NamedTuple):
    y: Any
    x: Any


class Level(enum.IntEnum):
    LOW = 7
    HIGH = 8


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = ("slow", 1)


class Other(enum.Enum):
    NEVER = 0


class Bits(enum.Flag):
    A = 1
    B = 2


class Settings(dict[str, Any]):
    """A dict with attributes, as configurations often are."""

    def __init__(self, name: str, **values: Any) -> None:
        super().__init__(values)
        self.name = name


class Tokens(int):
    """A number with a unit."""

    def __repr__(self) -> str:
        return f"{int(self)} tokens"


@pytest.mark.parametrize(
    ("saved", "held"),
    [
        (Pair(1, [2]), Pair(0, 0)),
        (Typed(torch.arange(2), 1), Typed(torch.zeros(2, dtype=torch.int64), 1)),
        (Level.LOW, Level.HIGH),
        (Mode.SLOW, Mode.FAST),
        (Bits.A | Bits.B, Bits.A),
        ([Level.LOW, Mode.FAST], [Level.HIGH, Mode.SLOW]),
        (np.float32(0.1), np.float32(0)),
        (np.int64(2**40), np.int64(0)),
        (np.bool_(True), np.bool_(False)),
        (np.complex64(1j), np.complex64(0)),
        (np.str_("a"), np.str_()),
        (Tokens(3), Tokens(0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_classes_come_from_the_state(saved: Any, held: Any, place: Storage) -> None:
    """A checkpoint has no classes: the live value at the place says which one it is."""
    shardckpt.save(place, {"v": saved, "d": {"x": saved}})
    state = {"v": held, "d": {"x": held}}
    shardckpt.load(place, state)
    assert type(state["v"]) is type(saved)
    assert repr(state["v"]) == repr(saved)
    assert repr(state["d"]["x"]) == repr(saved)


def test_what_they_are_without_a_class(place: Storage) -> None:
    """A named tuple is still read by name, and can be saved again; numbers of NumPy and of enums are plain."""
    shardckpt.save(place, {"v": [Pair(1, 2), Level.LOW, np.float32(0.5)]})
    state: dict[str, Any] = {"v": None}
    shardckpt.load(place, state)
    record, level, number = state["v"]
    assert isinstance(record, Record)
    assert (record.x, record.y, record) == (1, 2, (1, 2))
    with pytest.raises(AttributeError):
        _ = record.z
    assert (type(level), level, type(number), number) == (int, 7, float, 0.5)
    shardckpt.save(place.at("again"), state)
    again = {"v": [Typed(0, 0), Level.HIGH, 0.0]}
    shardckpt.load(place.at("again"), again)
    assert again["v"] == [Typed(1, 2), Level.LOW, 0.5]


def test_a_number_does_not_become_a_flag(place: Storage) -> None:
    """True is an instance of int, and yet 1 is no flag."""
    shardckpt.save(place, {"v": [1, True]})
    state = {"v": [False, 0]}
    shardckpt.load(place, state)
    assert [type(value) for value in state["v"]] == [int, bool]


def test_a_dict_of_another_class(place: Storage) -> None:
    """It is filled, and keeps what it knows beside its items."""
    shardckpt.save(place, {"v": Settings("a", lr=1)})
    held = Settings("b", lr=0, more=3)
    state = {"v": held}
    shardckpt.load(place, state)
    assert state["v"] is held
    assert (held.name, dict(held)) == ("b", {"lr": 1})


@pytest.mark.parametrize(
    ("saved", "held", "message"),
    [
        (Pair(1, 2), Swapped(1, 2), "is a Swapped of y, x, but in the checkpoint it has x, y"),
        (Mode.FAST, None, r"was saved as the member 'fast' of the enum .*\.Mode, and is None here"),
        (Mode.FAST, Other.NEVER, "is a Other, which has no member of the value 'fast'"),
        (9, Level.LOW, "is a Level, which has no member of the value 9"),
    ],
)
def test_classes_that_do_not_fit(saved: Any, held: Any, message: str, place: Storage) -> None:
    """An error with the path, before anything is changed."""
    shardckpt.save(place, {"a": torch.ones(2), "v": saved})
    state = {"a": torch.zeros(2), "v": held}
    with pytest.raises(StateError, match=rf"state\['v'\] {message}"):
        shardckpt.load(place, state)
    assert not state["a"].any()


@dataclass
class Point:
    x: int = 1


@pytest.mark.parametrize(
    "value",
    [
        Point(),
        Point,
        SimpleNamespace(a=1),
        lambda: 1,
        iter([1]),
        memoryview(b"a"),
        PurePosixPath("a"),
        {Mode.FAST},
        {Mode.FAST: 1},
        {(1, Mode.FAST)},
        {(1, (Mode.FAST,)): 1},
        {torch.ones(1)},
        slice("a"),
        slice(1 << 70),
        range(1 << 70),
        Path("\udc80"),
        datetime.datetime(2026, 1, 1, tzinfo=__import__("zoneinfo").ZoneInfo("UTC")),
        torch.strided,
        torch.Generator(),
        {float("nan"), float("nan")},
        torch.return_types.max((torch.ones(1), torch.ones(1))),
        ...,
        NotImplemented,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_clear_no(value: Any, place: Storage) -> None:
    """What has no form is refused by path, before anything is written."""
    with pytest.raises(UnsupportedValueError, match=r"state\['a/0"):
        shardckpt.save(place, {"a": [value]})
    assert place.list() == []


@pytest.mark.parametrize(
    "form",
    [
        {"$set": [1, 1]},
        {"$set": [[1]]},
        {"$set": [{"$tensor": "a"}]},
        {"$frozenset": 1},
        {"$deque": [[1, 2], 1]},
        {"$deque": [1]},
        {"$mapping": ["dict", {}]},
        {"$mapping": ["OrderedDict", []]},
        {"$mapping": ["defaultdict", {}, "eval"]},
        {"$mapping": ["defaultdict", {}, []]},
        {"$namedtuple": [1]},
        {"$complex": [1, 2]},
        {"$complex": [1.0]},
        {"$enum": [1, 2]},
        {"$enum": "a"},
        {"$range": [1, 2, 0]},
        {"$range": [1, 2]},
        {"$slice": [1.0, 1, 1]},
        {"$path": "a//b"},
        {"$path": 1},
        {"$date": "2026-1-1"},
        {"$date": "20260101"},
        {"$datetime": "2026-01-01"},
        {"$time": "25:00:00"},
        {"$timedelta": [0, 86400, 0]},
        {"$timedelta": [10**10, 0, 0]},
        {"$decimal": "1_0"},
        {"$decimal": "x"},
        {"$fraction": "2/4"},
        {"$fraction": "1/0"},
        {"$size": [-1.0]},
        {"$dtype": "load"},
        {"$dtype": "Tensor"},
        {"$device": "cpu:x"},
        {"$device": "nothing"},
        {"$bytearray": "AP8"},
        {"$wrapper": {}},
        {
            "$wrapper": {
                "type": "a",
                "dtype": "b",
                "shape": [1],
                "sharding": [],
                "context": None,
                "tensors": {"a": 1},
            }
        },
        {
            "$wrapper": {
                "type": "a",
                "dtype": "b",
                "shape": [-1],
                "sharding": [],
                "context": None,
                "tensors": {},
            }
        },
        {
            "$wrapper": {
                "type": "a",
                "dtype": "b",
                "shape": [],
                "sharding": [],
                "context": {"$tensor": "t"},
                "tensors": {},
            }
        },
        {
            "$wrapper": {
                "type": "a",
                "dtype": "b",
                "shape": [4],
                "sharding": [[0, 2, 1]],
                "context": None,
                "tensors": {"scale": [{"$tensor": "t/0"}, {"$tensor": "t/1"}, {"$tensor": "t/2"}]},
            }
        },
        {
            "$wrapper": {
                "type": "a",
                "dtype": "b",
                "shape": [4],
                "sharding": [[0, 1 << 62, 1]] * 65,
                "context": None,
                "tensors": {},
            }
        },
        {"$dict": [[{"$tuple": [{"$int": hex(1 << 20_000)}]}, 1]]},
        {"$fraction": "1e999999999"},
        {"$fraction": "1.5"},
        {"$fraction": "1/0"},
        {"$size": [1 << 63]},
        {"$range": [0, 1 << 63, 1]},
        {"$dtype": "_dynamo"},
        {"$dtype": "a b"},
        {"$enum": ["a.B", {"$tensor": "t"}]},
        {"$enum": ["a.B", [{"$per_rank": "t"}]]},
    ],
    ids=json.dumps,
)
def test_invalid_forms(form: Any) -> None:
    """What no encode makes is an error, whatever it is, with its place."""
    with pytest.raises(FormatError, match="'a/0' has an invalid"):
        decode_value({"a": [form]})


def test_export_has_plain_data(place: Storage, tmp_path: Path) -> None:
    """A .pt file of all of them is read by weights_only."""
    shardckpt.save(place, {"values": VALUES, "mode": Mode.SLOW, "pair": Pair(1, torch.ones(2))})
    shardckpt.merge(place, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    assert loaded["mode"] == ("slow", 1)
    assert loaded["pair"]["y"].tolist() == [1, 1]
    assert loaded["values"][3] == {3, 1, "b", (1, None)}


@pytest.mark.parametrize(
    "wrap",
    [lambda value: value, lambda value: deque([value]), shardckpt.PerRank],
    ids=["itself", "in a deque", "in PerRank"],
)
def test_a_key_that_python_does_not_write(wrap: Callable[[Any], Any], place: Storage) -> None:
    """An integer of more than some thousand decimal digits."""
    with pytest.raises(UnsupportedValueError, match=r"state\['a.*'\] has a key that cannot be written"):
        shardckpt.save(place, {"a": wrap({1 << 20_000: 1})})
