"""What is remembered of a state from save to save is what a walk would find, whatever was done to it."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from shardckpt.errors import UnsupportedValueError
from shardckpt.state.cache import StateDictCache
from shardckpt.state.flatten import FlatState, flatten

ONE = torch.ones(1)


class Net(nn.Module):
    """Parameters, buffers that are saved and that are not, a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("shown", torch.zeros(2))


def make() -> dict[str, Any]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net.norm(net.first(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    return {"net": net, "optimizer": optimizer, "step": 1}


def assert_same(found: FlatState, wanted: FlatState) -> None:
    """The same names, types, boxes and memory, and the same values in the same order."""

    def seen(flat: FlatState) -> list[Any]:
        return [
            (
                t.name,
                t.dtype,
                t.shape,
                t.pieces,
                t.data.data_ptr(),
                t.data.shape,
                t.data.stride(),
                t.data.is_neg(),
                t.first_holder,
            )
            for t in flat.tensors
        ]

    assert seen(found) == seen(wanted)
    assert msgspec.json.encode(found.values) == msgspec.json.encode(wanted.values)
    assert found.layout(0) == wanted.layout(0)


def _replace_parameter(state: dict[str, Any]) -> None:
    state["net"].first.weight = nn.Parameter(torch.ones(3, 3))


def _swap_memory(state: dict[str, Any]) -> None:
    state["net"].first.weight.data = torch.ones(3, 3)


def _transpose(state: dict[str, Any]) -> None:
    state["net"].first.weight.data = state["net"].first.weight.data.t()


def _convert(state: dict[str, Any]) -> None:
    state["net"].double()


def _replace_buffer(state: dict[str, Any]) -> None:
    state["net"].shown = torch.ones(2)


def _show_a_buffer(state: dict[str, Any]) -> None:
    state["net"].register_buffer("hidden", state["net"].hidden, persistent=True)


def _add_module(state: dict[str, Any]) -> None:
    state["net"].second = nn.Linear(2, 2)


def _remove_module(state: dict[str, Any]) -> None:
    del state["net"].norm


def _reload_optimizer(state: dict[str, Any]) -> None:
    state["optimizer"].load_state_dict(state["optimizer"].state_dict())


def _another_step(state: dict[str, Any]) -> None:
    state["optimizer"].step()
    state["step"] += 1


def _learning_rate(state: dict[str, Any]) -> None:
    state["optimizer"].param_groups[0]["lr"] = 0.01


def _add_group(state: dict[str, Any]) -> None:
    state["optimizer"].add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def _reorder(state: dict[str, Any]) -> None:
    state["optimizer"].param_groups[0]["params"].reverse()


def _no_tensor(state: dict[str, Any]) -> None:
    optimizer = state["optimizer"]
    optimizer.state[optimizer.param_groups[0]["params"][0]]["note"] = 3


def _other_model(state: dict[str, Any]) -> None:
    state["net"] = Net()


def _second_model(state: dict[str, Any]) -> None:
    state["extra"] = nn.Linear(2, 2)


def _hook(state: dict[str, Any]) -> None:
    state["net"].register_state_dict_post_hook(lambda _m, tree, _p, _l: tree.update(one=ONE))


def _optimizer_hook(state: dict[str, Any]) -> None:
    state["optimizer"].register_state_dict_post_hook(lambda _o, tree: {**tree, "more": 1})


def _flip_the_sign(state: dict[str, Any]) -> None:
    state["net"].shown.data = torch._neg_view(state["net"].shown.data)


def _own_state_dict(state: dict[str, Any]) -> None:
    net = state["net"]
    net.state_dict = lambda: {"only": net.first.weight.detach()}


def _own_save(state: dict[str, Any]) -> None:
    layer = state["net"].first
    layer._save_to_state_dict = lambda tree, prefix, _: tree.update({f"{prefix}only": layer.bias.detach()})


def _own_state_dict_of_optimizer(state: dict[str, Any]) -> None:
    optimizer = state["optimizer"]
    optimizer.state_dict = lambda: {"count": len(optimizer.state)}


def _nothing(_state: dict[str, Any]) -> None:
    pass


CHANGES = [
    _nothing, _replace_parameter, _swap_memory, _transpose, _convert, _replace_buffer, _show_a_buffer,
    _add_module, _remove_module, _reload_optimizer, _another_step, _learning_rate, _add_group, _reorder,
    _no_tensor, _other_model, _second_model, _hook, _optimizer_hook, _flip_the_sign,
    _own_state_dict, _own_save, _own_state_dict_of_optimizer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_walk_would_find_the_same(change: Callable[[dict[str, Any]], None]) -> None:
    state, cache = make(), StateDictCache()
    for _ in range(2):
        assert_same(flatten(state, 0, cache), flatten(state, 0))
    change(state)
    for _ in range(2):
        assert_same(flatten(state, 0, cache), flatten(state, 0))


def test_a_method_of_the_instance_is_always_asked() -> None:
    """What it returns may change though no tensor does, as where only trainable weights are saved."""
    state, cache = make(), StateDictCache()
    chosen = ["first.weight"]
    net = state["net"]
    net.state_dict = lambda: {name: net.get_parameter(name).detach() for name in chosen}
    flatten(state, 0, cache)
    chosen.append("first.bias")
    assert_same(flatten(state, 0, cache), flatten(state, 0))


def test_what_has_not_changed_is_not_walked_again() -> None:
    """The very same tensors come back, and what is made of them is made once."""
    state, cache = make(), StateDictCache()
    first = flatten(state, 0, cache)
    made = cache.derived("layout", first.tensors, lambda: first.layout(0))
    _another_step(state)
    second = flatten(state, 0, cache)
    assert all(one is other for one, other in zip(first.tensors, second.tensors, strict=True))
    assert cache.derived("layout", second.tensors, lambda: second.layout(0)) is made
    assert second.values["step"] == 2


def test_an_object_with_a_state_dict_of_its_own_is_always_asked() -> None:
    class Own(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    state: dict[str, Any] = {"net": Own(2, 2)}
    cache = StateDictCache()
    for calls in range(3):
        state["net"].calls = calls
        assert_same(flatten(state, 0, cache), flatten(state, 0))


@pytest.mark.parametrize("part", ["net", "optimizer"])
def test_it_does_not_keep_memory_that_the_state_has_given_up(part: str) -> None:
    state, cache = make(), StateDictCache()
    flat = flatten(state, 0, cache)
    noted: list[str] = []
    tensor = next(t.data for t in flat.tensors if t.name.startswith(part) and t.data.numel() == 9)
    weakref.finalize(tensor, noted.append, "gone")
    cache.derived("something", flat.tensors, lambda made=tensor: made)
    del tensor, flat
    if part == "net":
        state.clear()
    else:
        state["optimizer"].state.clear()
    gc.collect()
    assert noted == ["gone"]


def make_many() -> dict[str, Any]:
    """Containers of many tensors, beside a plain value."""
    return {
        "flat": {f"t{i}": torch.full((2, 2), float(i)) for i in range(70)},
        "deep": {"list": [torch.ones(i) for i in range(70)], 7: (torch.ones(2), torch.ones(()))},
        "step": 1,
    }


def _replace_one(state: dict[str, Any]) -> None:
    state["flat"]["t3"] = torch.ones(2, 2)


def _give_one_other_memory(state: dict[str, Any]) -> None:
    state["flat"]["t3"].data = torch.ones(2, 2)


def _transpose_one(state: dict[str, Any]) -> None:
    state["flat"]["t3"].t_()


def _reshape_one(state: dict[str, Any]) -> None:
    state["flat"]["t3"].data = state["flat"]["t3"].data.view(4)


def _reinterpret_one(state: dict[str, Any]) -> None:
    state["flat"]["t3"].data = state["flat"]["t3"].data.view(torch.int32)


def _shrink_one(state: dict[str, Any]) -> None:
    state["deep"]["list"][9].resize_(3)


def _negate_one(state: dict[str, Any]) -> None:
    state["flat"]["t3"].data = torch._neg_view(state["flat"]["t3"].data)


def _tie_two(state: dict[str, Any]) -> None:
    state["flat"]["t3"] = state["flat"]["t4"]


def _rename_one(state: dict[str, Any]) -> None:
    state["flat"]["other"] = state["flat"].pop("t69")


def _reorder_two(state: dict[str, Any]) -> None:
    state["flat"]["t0"] = state["flat"].pop("t0")


def _add_one(state: dict[str, Any]) -> None:
    state["deep"]["list"].append(torch.ones(3))


def _make_a_tuple(state: dict[str, Any]) -> None:
    state["deep"]["list"] = tuple(state["deep"]["list"])


def _another_key(state: dict[str, Any]) -> None:
    state["deep"]["7"] = state["deep"].pop(7)


def _a_plain_value(state: dict[str, Any]) -> None:
    state["deep"]["list"][5] = 3


def _a_parameter(state: dict[str, Any]) -> None:
    state["flat"]["t3"] = nn.Parameter(state["flat"]["t3"])


def _a_container_of_another_class(state: dict[str, Any]) -> None:
    state["flat"] = OrderedDict(state["flat"])


def _step(state: dict[str, Any]) -> None:
    state["step"] += 1


@pytest.mark.parametrize(
    "change",
    [
        _nothing, _replace_one, _give_one_other_memory, _transpose_one, _reshape_one, _reinterpret_one,
        _shrink_one, _negate_one, _tie_two, _rename_one, _reorder_two, _add_one, _make_a_tuple, _another_key,
        _a_plain_value, _a_parameter, _a_container_of_another_class, _step,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_walk_over_many_tensors_would_find_the_same(change: Callable[[dict[str, Any]], None]) -> None:
    state, cache = make_many(), StateDictCache()
    for _ in range(2):
        assert_same(flatten(state, 0, cache), flatten(state, 0))
    change(state)
    for _ in range(2):
        assert_same(flatten(state, 0, cache), flatten(state, 0))


def test_a_container_of_many_tensors_is_walked_once() -> None:
    state, cache = make_many(), StateDictCache()
    first = flatten(state, 0, cache)
    _step(state)
    second = flatten(state, 0, cache)
    assert all(one is other for one, other in zip(first.tensors, second.tensors, strict=True))
    assert second.values["step"] == 2


def test_a_container_in_itself_is_told_by_its_path() -> None:
    state = make_many()
    state["deep"]["list"].append(state["deep"])
    with pytest.raises(UnsupportedValueError, match="contain itself"):
        flatten(state, 0, StateDictCache())


def test_memory_of_a_container_is_given_up() -> None:
    state, cache = make_many(), StateDictCache()
    flat = flatten(state, 0, cache)
    noted: list[str] = []
    weakref.finalize(flat.tensors[0].data, noted.append, "gone")
    del flat
    state.clear()
    gc.collect()
    assert noted == ["gone"]
