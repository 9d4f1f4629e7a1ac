"""Everything that a state may contain: what is saved, and what comes back."""

from __future__ import annotations

import enum
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.errors import (
    StateError,
    UnsupportedValueError,
)
from shardckpt.loading.load import load_place
from shardckpt.run.places import Place
from shardckpt.saving.session import SaveSession
from shardckpt.storage import Storage
from tests.kit.states import assert_equal
from tests.kit.worlds import ThreadRanks, run_threads, start_save


class Color(enum.StrEnum):
    RED = "red"


def test_values(place: Storage) -> None:
    """Everything that is data comes back as it was: types, order of keys, special numbers."""
    values: dict[str, Any] = {
        "none": None, "true": True, "int": -(2**70), "small": 5, "float": 0.1, "nan": math.nan,
        "inf": -math.inf, "text": "ä/\u2028 \x00", "bytes": b"\x00\xff", "empty": [{}, [], (), "", b""],
        "nested": {"b": [1, (2, [3.0, None])], "a": {"/": 1, "..": 2, "": 3, "$": 4}},
        "keys": {1: "int", "two": 2, (3, 4): "tuple", None: "none", 2.5: "float", False: "bool"},
        "$dollar": {"$tensor": "x"},
        "array": np.arange(6, dtype=np.int16).reshape(2, 3), "scalar array": np.array(1.5),
        "reversed": np.arange(5)[::-1], "transposed": np.arange(6.0).reshape(2, 3).T,
        "field": np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f8")])["b"],
        "tensors": {"t": torch.arange(3), "list": [torch.ones(()), torch.zeros(0, 3)]},
    }  # fmt: skip
    values["readonly"] = np.arange(3)
    values["readonly"].flags.writeable = False
    shardckpt.save(place, values)
    loaded: dict[str, Any] = dict.fromkeys(values)
    shardckpt.load(place, loaded)
    arrays = {"array", "scalar array", "reversed", "transposed", "field", "readonly"}
    for name in arrays:
        assert isinstance(loaded[name], np.ndarray)
        assert loaded[name].dtype == values[name].dtype
        assert np.array_equal(loaded[name], values[name]), name
    assert_equal(
        {k: v for k, v in loaded.items() if k not in arrays},
        {k: v for k, v in values.items() if k not in arrays},
    )


def test_numpy_scalars_and_enums_come_back_as_plain_values(place: Storage) -> None:
    """What is almost a Python number or text becomes one."""
    shardckpt.save(place, {"v": [np.float32(0.5), np.int64(7), np.bool_(True), np.str_("x"), Color.RED]})
    loaded: dict[str, Any] = {"v": None}
    shardckpt.load(place, loaded)
    assert_equal(loaded["v"], [0.5, 7, True, "x", "red"])


def test_kinds_of_dicts(place: Storage) -> None:
    """Counter, OrderedDict and defaultdict come back as the kind that the state has there."""
    shardckpt.save(
        place,
        {"c": Counter("abca"), "o": OrderedDict(b=1, a=2), "d": defaultdict(list, {1: [2]}), "k": {3: 4}},
    )
    loaded: dict[str, Any] = {"c": Counter(), "o": OrderedDict(), "d": defaultdict(list), "k": {}}
    shardckpt.load(place, loaded)
    assert_equal(loaded["c"], Counter("abca"))
    assert_equal(loaded["o"], OrderedDict(b=1, a=2))
    assert_equal(loaded["d"], defaultdict(list, {1: [2]}))
    assert loaded["d"][9] == []
    assert loaded["k"] == {3: 4}


class Sampler:
    """An object with state, as data loaders and samplers have it."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.order = torch.full((3,), position)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order, "done": {self.position: "x"}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["done"] == {state["position"]: "x"}
        self.position, self.order = state["position"], state["order"]


def test_objects_with_state_dict(place: Storage) -> None:
    """Any object with state_dict and load_state_dict takes part, with tensors and values."""
    shardckpt.save(place, {"samplers": [Sampler(5), Sampler(6)]})
    loaded = {"samplers": [Sampler(0), Sampler(1)]}
    shardckpt.load(place, loaded)
    assert [s.position for s in loaded["samplers"]] == [5, 6]
    assert loaded["samplers"][1].order.tolist() == [6, 6, 6]


def test_what_was_saved_does_not_change_with_the_state(place: Storage) -> None:
    """When save_async has returned, values and tensors may change: the checkpoint has what was."""
    state: dict[str, Any] = {"t": torch.zeros(1000), "list": [1], "sampler": Sampler(1)}
    handle = shardckpt.save_async(place, state)
    state["t"].fill_(1)
    state["list"].append(2)
    state["sampler"].order.fill_(9)
    handle.wait()
    checkpoint = shardckpt.open(place)
    assert not checkpoint.read("t").any()
    assert checkpoint.values["list"] == [1]
    assert checkpoint.read("sampler/order").tolist() == [1, 1, 1]


def _save_on(place: Storage, size: int, make: Callable[[int], dict[str, Any]]) -> None:
    def run(ranks: ThreadRanks) -> None:
        start_save(SaveSession(ranks, 60), place, make(ranks.rank)).wait()

    run_threads(size, run)


def _own(rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "rng": shardckpt.PerRank(generator.get_state()),
        "own": shardckpt.PerRank(
            {"rank": rank, "t": torch.full((rank + 1,), rank), "sampler": Sampler(rank), "list": [rank]}
        ),
        "shared": torch.arange(10),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_per_rank_values(size: int, place: Storage) -> None:
    """Each rank gets back what this rank number saved; ranks beyond the saved world keep what they have."""
    _save_on(place, 3, _own)

    def load(ranks: ThreadRanks) -> None:
        state = _own(ranks.rank)
        state["rng"].value.zero_()
        own = state["own"].value
        own["t"].fill_(-1)
        own.update(rank=-1, sampler=Sampler(-1), list=[])
        state["shared"].zero_()
        loaded = load_place(Place(place), state, ranks, strict=True, started=0.0)
        kept = ranks.rank >= 3
        assert loaded.kept == (("rng", "own") if kept else ())
        assert torch.equal(state["shared"], torch.arange(10))
        own, wanted = state["own"].value, _own(ranks.rank)["own"].value
        if kept:
            assert (own["rank"], own["list"], own["sampler"].position) == (-1, [], -1)
            assert not state["rng"].value.any()
        else:
            assert (own["rank"], own["list"]) == (ranks.rank, [ranks.rank])
            assert own["sampler"].position == ranks.rank
            assert_equal(own["t"], wanted["t"])
            assert_equal(state["rng"].value, _own(ranks.rank)["rng"].value)

    run_threads(size, load)


def test_one_generator_per_rank_goes_on(place: Storage) -> None:
    """The recipe for random generators: save the state, load it, put it back; the numbers go on."""
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    shardckpt.save(place, {"rng": shardckpt.PerRank(generator.get_state())})
    wanted = torch.rand(5, generator=generator)
    state = {"rng": shardckpt.PerRank(torch.Generator().get_state())}
    shardckpt.load(place, state)
    fresh = torch.Generator()
    fresh.set_state(state["rng"].value)
    assert torch.equal(torch.rand(5, generator=fresh), wanted)


def test_per_rank_in_per_rank(place: Storage) -> None:
    """One inside another is refused by its path, and nothing is written: a reader would not take it."""
    inner = {"list": [shardckpt.PerRank(1)]}
    with pytest.raises(
        UnsupportedValueError, match=r"rank-00000/list/0'.*inside the PerRank at state\['a'\]"
    ):
        shardckpt.save(place, {"a": shardckpt.PerRank(inner), "b": shardckpt.PerRank(2)})
    assert place.list() == []
    shardckpt.save(place, {"a": shardckpt.PerRank(1), "b": shardckpt.PerRank(2)})


def test_per_rank_and_shared_do_not_mix(place: Storage) -> None:
    """A value saved per rank and asked for as shared, or the other way round, is an error."""
    shardckpt.save(place, {"a": shardckpt.PerRank(1), "b": 2})
    with pytest.raises(StateError, match=r"'a'.*an int here, but a PerRank in the checkpoint"):
        shardckpt.load(place, {"a": 0})
    with pytest.raises(StateError, match=r"'b'.*PerRank here"):
        shardckpt.load(place, {"b": shardckpt.PerRank(0)})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": {"b": [0, lambda: 1]}}, "a/b/1"),
        ({"a": memoryview(b"x")}, "a"),
        ({"a": object()}, "a"),
        ({"a": Sampler}, "a"),
        ({"a": type}, "a"),
        ({"a": torch.strided}, "a"),
        ({"a": np.array(["text"])}, "a"),
        ({"a": np.array([None])}, "a"),
        ({"a": np.datetime64("2020-01-01")}, "a"),
        ({"a": {1: 2, "1": 3}}, "a"),
        ({"a": torch.zeros(2).to_sparse()}, "a"),
        ({"a": torch.zeros(2, device="meta")}, "a"),
        ({"a": nn.Linear(1, 1, device="meta")}, "a/weight"),
        ({"a": shardckpt.PerRank({"b": object()})}, "a/rank-00000/b"),
        ({"a": "\ud800"}, "a"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored(value: dict[str, Any], named: str, place: Storage) -> None:
    """An error that names the path, before anything is written."""
    with pytest.raises(UnsupportedValueError, match=f"state\\['{named}'\\]"):
        shardckpt.save(place, value)
    assert place.list() == []


def test_what_contains_itself(place: Storage) -> None:
    """A list in itself is an error and no endless recursion."""
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnsupportedValueError, match="contain itself"):
        shardckpt.save(place, {"a": loop})


@pytest.mark.parametrize("state", [None, [1], {1: 2}, nn.Linear(1, 1)])
def test_the_top_level_is_a_dict(state: Any, place: Storage) -> None:
    """Anything but a dict with string keys is refused, with an example of what to pass."""
    for function in (shardckpt.save, shardckpt.load):
        with pytest.raises(StateError, match=r"must be a dict with string keys"):
            if function is shardckpt.load:
                shardckpt.save(place, {})
            function(place, state)


def test_an_empty_state(place: Storage) -> None:
    """A state without anything is a checkpoint too."""
    shardckpt.save(place, {})
    assert shardckpt.load(place, {}).nbytes == 0
    assert shardckpt.open(place).tensors == {}
