"""Modules and what wraps them: names, tied weights, extra state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import shardckpt
from shardckpt.state.flatten import flatten
from shardckpt.storage import Storage
from tests.kit.states import Net, assert_equal, train

_jit_is_old = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
"""What torch.compile imports of torch itself warns."""


def _names(module: nn.Module) -> set[str]:
    return {tensor.name for tensor in flatten({"model": module}, 0).tensors}


class Nested(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        super().__init__()
        self.inner = wrap(Net(1))
        self.layers = nn.ModuleList([wrap(nn.Linear(2, 3)), nn.Linear(3, 2)])


@_jit_is_old
@pytest.mark.parametrize(
    "wrap",
    [torch.compile, checkpoint_wrapper, lambda m: checkpoint_wrapper(torch.compile(m)),
     lambda m: torch.compile(checkpoint_wrapper(m))],
    ids=["compile", "checkpoint", "checkpoint of compile", "compile of checkpoint"],
)  # fmt: skip
def test_wrappers_leave_names_as_they_are(wrap: Callable[[nn.Module], nn.Module], place: Storage) -> None:
    """compile and activation checkpointing, inside and outside: the plain model's names, both ways."""
    plain, wrapped = Nested(), wrap(Nested(wrap))
    assert _names(wrapped) == _names(plain)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shardckpt.save(place, {"model": wrapped, "optimizer": optimizer})
    other = torch.optim.AdamW(plain.parameters())
    shardckpt.load(place, {"model": plain, "optimizer": other})
    assert_equal([*plain.parameters()], [*wrapped.parameters()])
    assert_equal([*other.state.values()], [*optimizer.state.values()])


@_jit_is_old
def test_wrappers_do_not_hide_names_of_the_model() -> None:
    """A layer of the user's own that is called `module` or `_orig_mod` keeps its name."""
    model = nn.ModuleDict({"module": nn.Linear(1, 1, bias=False), "_orig_mod": nn.Linear(1, 1, bias=False)})
    assert _names(model) == {"model/module.weight", "model/_orig_mod.weight"}
    assert _names(torch.compile(model)) == _names(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight


def test_tied_weights_are_stored_once(place: Storage) -> None:
    """Both names are in the checkpoint, the bytes once; they load into a tied or an untied model."""
    model = Tied()
    shardckpt.save(place, {"model": model})
    checkpoint = shardckpt.open(place)
    assert set(checkpoint.tensors) == {"model/embed.weight", "model/out.weight"}
    assert checkpoint.manifest.stored_bytes < 2 * 7 * 4 * 4
    again = Tied()
    shardckpt.load(place, {"model": again})
    assert again.out.weight is again.embed.weight
    assert_equal(again.state_dict(), model.state_dict())
    untied = Tied()
    untied.out.weight = nn.Parameter(torch.zeros(7, 4))
    shardckpt.load(place, {"model": untied})
    assert_equal(untied.state_dict(), model.state_dict())


class Extra(nn.Module):
    """A module with extra state of its own, as torch allows it to be anything."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    ("extra", "held"),
    [
        ({"scale": 2.0, "history": torch.arange(3.0)}, {"scale": 1.0, "history": torch.zeros(3)}),
        ({"scale": 2.0}, None),
        (torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)),
        (torch.arange(5, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)),
        (torch.arange(5, dtype=torch.uint8), None),
        (None, {"scale": 1.0}),
    ],
)
def test_extra_state(extra: Any, held: Any, place: Storage) -> None:
    """get_extra_state and set_extra_state, whatever type and size it has on either side."""
    model = nn.Sequential(Extra(extra), nn.Linear(1, 1))
    shardckpt.save(place, {"model": model})
    again = nn.Sequential(Extra(held), nn.Linear(1, 1))
    shardckpt.load(place, {"model": again})
    assert_equal(again[0].extra, extra)
    assert_equal(again[1].state_dict(), model[1].state_dict())


def test_modules_with_copies_in_their_state_dict(place: Storage) -> None:
    """Where a hook gives other tensors than the module's own, they reach it by its load_state_dict."""

    class Doubled(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {name: value * 2 for name, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            halves = {name: value / 2 for name, value in state_dict.items()}
            return super().load_state_dict(halves, *args, **kwargs)

    model, again = Doubled(2, 3), Doubled(2, 3)
    shardckpt.save(place, {"model": model})
    shardckpt.load(place, {"model": again})
    assert_equal([*again.parameters()], [*model.parameters()])


def test_modules_below_dicts_and_lists(place: Storage) -> None:
    """Modules, optimizers and tensors anywhere in nested dicts and lists are filled in place."""

    def make(seed: int) -> dict[str, Any]:
        nets = {"g": Net(seed), "d": [Net(seed + 1), {"deep": Net(seed + 2)}]}
        optimizer = torch.optim.AdamW(nets["g"].parameters(), lr=seed)
        return {"nets": nets, "optimizers": [optimizer], "t": (torch.full((2,), float(seed)), "text")}

    state, other = make(1), make(5)
    train(state["nets"]["g"], state["optimizers"][0], range(2))
    held = [other["nets"]["g"], other["nets"]["d"][1]["deep"].one.weight, other["t"][0]]
    shardckpt.save(place, state)
    shardckpt.load(place, other)
    assert [other["nets"]["g"], other["nets"]["d"][1]["deep"].one.weight, other["t"][0]] == held
    assert_equal(other["nets"]["g"].state_dict(), state["nets"]["g"].state_dict())
    assert_equal(other["nets"]["d"][1]["deep"].state_dict(), state["nets"]["d"][1]["deep"].state_dict())
    assert_equal(other["optimizers"][0].state_dict(), state["optimizers"][0].state_dict())
    assert_equal(other["t"], state["t"])
