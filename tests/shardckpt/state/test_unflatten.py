"""A state and a checkpoint side by side: what is filled in place, and what does not agree."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.errors import (
    MissingKeysError,
    ShapeMismatchError,
    StateError,
)
from shardckpt.storage import Storage
from tests.kit.states import Net, assert_equal


def test_containers_are_filled(place: Storage) -> None:
    """Whoever refers to a dict, list or array of the state sees what was loaded: that, and nothing else."""
    saved = {
        "progress": {"epoch": 3, "best": {"loss": 0.5, "at": [1, 2]}, "more": {"x": 1}},
        "history": [{"a": 1}, {"a": 2}, 3],
        "kinds": {"c": Counter("aa"), "d": defaultdict(list, {"k": [1]})},
        "array": np.arange(3.0),
        "others": {
            "set": {1, 2},
            "deque": deque([1, 2], 3),
            "bytes": bytearray(b"ab"),
            "short": deque([1], 1),
        },
        "mixed": ({"n": 1}, [torch.ones(2)], (1, [2])),
    }
    best = {"loss": 9.0, "gone": 1}
    progress = {"gone": None, "epoch": 0, "best": best}
    entry, array, counter, inner, last = {"b": 5}, np.zeros(3), Counter("xyz"), {"n": 0}, [0, 0]
    history = [entry]
    state = {
        "progress": progress,
        "history": history,
        "kinds": {"c": counter, "d": defaultdict(list)},
        "array": array,
        "others": {"set": {5}, "deque": deque([5], 3), "bytes": bytearray(b"x"), "short": deque([5], 2)},
        "mixed": (inner, [torch.zeros(2)], (1, last)),
    }
    others = dict(state["others"])  # type: ignore[call-overload]
    shardckpt.save(place, saved)
    shardckpt.load(place, state)
    assert state["progress"] is progress
    assert progress["best"] is best
    assert progress == saved["progress"]
    assert list(progress) == ["epoch", "best", "more"]
    assert state["history"] is history
    assert history[0] is entry
    assert history == saved["history"]
    assert state["kinds"]["c"] is counter  # type: ignore[index]
    assert counter == Counter("aa")
    assert state["kinds"]["d"]["new"] == []  # type: ignore[index]
    assert state["array"] is array
    assert np.array_equal(array, np.arange(3.0))
    assert state["others"] == saved["others"]
    assert [name for name in others if others[name] is state["others"][name]] == ["set", "deque", "bytes"]  # type: ignore[index]
    assert inner == {"n": 1}
    assert last == [2]


def test_one_container_in_two_places(place: Storage) -> None:
    """It is filled if the same was saved for both; else one of the two gets a new one, and nothing is lost."""
    shardckpt.save(
        place,
        {"a": {"x": [1]}, "b": {"x": [1]}, "c": [{"n": 1}, {"n": 2}], "d": np.ones(2), "e": np.zeros(2)},
    )
    both, one, array = {"x": [0]}, {"n": 0}, np.full(2, 5.0)
    state: dict[str, Any] = {"a": both, "b": both, "c": [one, one], "d": array, "e": array}
    shardckpt.load(place, state)
    assert state["a"] is state["b"] is both
    assert both == {"x": [1]}
    assert state["c"] == [{"n": 1}, {"n": 2}]
    assert np.array_equal(state["d"], np.ones(2))
    assert np.array_equal(state["e"], np.zeros(2))


def test_containers_are_left_as_they_are_by_a_load_that_fails(place: Storage) -> None:
    """Nothing is cleared before all is verified."""
    shardckpt.save(place, {"a": {"x": 1}, "t": torch.ones(2)})
    held = {"x": 0}
    with pytest.raises(ShapeMismatchError):
        shardckpt.load(place, {"a": held, "t": torch.ones(3)})
    assert held == {"x": 0}


def test_values_for_an_object_are_its_own(place: Storage) -> None:
    """What state_dict() has returned is not written to: it may be the object's very state."""

    class Keeps:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {"list": [1], "tensor": torch.zeros(2), "array": np.zeros(2)}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            assert self.before == [1]
            self.state = state

    saved, target = Keeps(), Keeps()
    saved.state = {"list": [2, 3], "tensor": torch.ones(2), "array": np.ones(2)}
    held = target.state
    target.before = held["list"]
    shardckpt.save(place, {"o": saved})
    shardckpt.load(place, {"o": target})
    assert target.state is not held
    assert held["list"] == [1]
    assert not held["tensor"].any()
    assert not held["array"].any()
    assert target.state["list"] == [2, 3]


def test_strict_names(place: Storage) -> None:
    """Missing and extra names are an error that lists them, with nothing changed; or are reported."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shardckpt.save(place, {"model": model, "step": 5, "d": {"a": 1, "m": nn.Linear(1, 1)}})
    other = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2))
    state: dict[str, Any] = {"model": other, "d": {"m": nn.Linear(1, 1), "new": torch.ones(1)}, "more": 1}
    before = copy.deepcopy(state)
    with pytest.raises(MissingKeysError) as caught:
        shardckpt.load(place, state)
    for name in (
        "model/2.weight",
        "model/2.bias",
        "d/new",
        "more",
        "model/1.weight",
        "d/a",
        "strict=False",
    ):
        assert name in str(caught.value)
    assert_equal(state["model"].state_dict(), before["model"].state_dict())
    loaded = shardckpt.load(place, state, strict=False)
    assert set(loaded.missing) == {"model/2.weight", "model/2.bias", "d/new", "more"}
    assert set(loaded.unexpected) == {"model/1.weight", "model/1.bias", "d/a"}
    assert loaded.unused == ("step",)
    assert_equal(other[0].state_dict(), model[0].state_dict())
    assert_equal(other[2].state_dict(), before["model"][2].state_dict())
    assert_equal(state["d"]["new"], torch.ones(1))
    assert state["more"] == 1


def test_a_part_of_the_state(place: Storage) -> None:
    """Only the top-level entries that are asked for are loaded; the others are reported."""
    model, again = Net(1), Net(2)
    shardckpt.save(place, {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "step": 3})
    loaded = shardckpt.load(place, {"model": again})
    assert_equal(again.state_dict(), model.state_dict())
    assert set(loaded.unused) == {"optimizer", "step"}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.zeros(3), r"'t'.*shape \[3\].*checkpoint it is \[2, 2\]"),
        (torch.zeros(4), r"'t'.*shape \[4\]"),
        (torch.zeros(2, 2, dtype=torch.float64), "'t'.*float64.*float32"),
        (torch.zeros(2, 2, dtype=torch.int32), "'t'.*int32.*float32"),
        (nn.Linear(1, 1), "'t'.*module here, but a tensor"),
        (shardckpt.PerRank(1), "'t'.*PerRank here, but a tensor"),
        (torch.optim.SGD([torch.zeros(1)]), "'t'.*optimizer here, but a tensor"),
    ],
)
def test_mismatches(held: Any, message: str, place: Storage) -> None:
    """Another shape, type or kind: an error that names what differs, and nothing is changed."""
    shardckpt.save(place, {"a": torch.ones(2), "t": torch.ones(2, 2), "n": 1})
    state = {"a": torch.zeros(2), "t": held, "n": 0}
    with pytest.raises(StateError, match=message) as caught:
        shardckpt.load(place, state)
    if isinstance(held, torch.Tensor):
        assert isinstance(caught.value, ShapeMismatchError)
    assert not state["a"].any()
    assert state["n"] == 0


def test_values_in_tuples(place: Storage) -> None:
    """A tuple cannot be changed: what it has must be what was saved, or nothing is loaded."""
    shardckpt.save(place, {"a": (torch.ones(2), 5, "x"), "t": torch.ones(2)})
    state = {"a": (torch.zeros(2), 5, "x"), "t": torch.zeros(2)}
    shardckpt.load(place, state)
    assert state["a"][0].all()
    other = {"a": (torch.zeros(2), 6, "x"), "t": torch.zeros(2)}
    with pytest.raises(StateError, match=r"'a/1'.* is 6 in a tuple.* 5 in the checkpoint"):
        shardckpt.load(place, other)
    assert not other["a"][0].any()
    assert not other["t"].any()


def test_expanded_tensors(place: Storage) -> None:
    """They are stored as what they show; loading into one, whose elements share memory, is refused."""
    shardckpt.save(place, {"a": torch.ones(1).expand(4), "t": torch.ones(2)})
    assert shardckpt.open(place).read("a").tolist() == [1] * 4
    state = {"t": torch.zeros(2), "a": torch.zeros(1).expand(4)}
    with pytest.raises(StateError, match=r"'a'.*expanded.*clone"):
        shardckpt.load(place, state)
    assert not state["t"].any()


def test_a_tensor_where_a_value_was(place: Storage) -> None:
    """A number in the checkpoint does not fill a tensor."""
    shardckpt.save(place, {"t": 5})
    with pytest.raises(StateError, match=r"'t'.*tensor here, but an int"):
        shardckpt.load(place, {"t": torch.zeros(())})


def test_a_layout_of_the_same_names(place: Storage) -> None:
    """A parameter replaced by one of another shape is named with its module."""
    shardckpt.save(place, {"model": nn.Linear(2, 3)})
    with pytest.raises(ShapeMismatchError, match=r"model/weight.*\[3, 4\].*\[3, 2\]"):
        shardckpt.load(place, {"model": nn.Linear(4, 3)})
