"""Optimizers: training goes on from a checkpoint with the same bits, whatever has changed around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.errors import (
    MissingKeysError,
    StateError,
)
from shardckpt.storage import Storage
from tests.kit.states import Net, assert_equal, sorted_state, train

Make = Callable[[nn.Module], torch.optim.Optimizer]


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": rest, "lr": 0.3, "weight_decay": 0.2}, {"params": [first]}]


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
    "Adam tensor lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True),
    "AdamW groups": lambda m: torch.optim.AdamW(_groups(m), lr=0.1),
    "AdamW named": lambda m: torch.optim.AdamW(m.named_parameters(), lr=0.1),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters()),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), centered=True, momentum=0.9),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3, history_size=2),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in OPTIMIZERS for dtype in (torch.float32, torch.bfloat16)
     if (name, dtype) != ("LBFGS", torch.bfloat16)],  # it diverges
)  # fmt: skip
def test_training_goes_on_bit_equal(name: str, dtype: torch.dtype, place: Storage) -> None:
    """For every optimizer: train, save, load into fresh objects or into ones that have stepped, train on."""
    model = Net(1, dtype)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(3))
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    for before in (0, 2):
        again = Net(2, dtype)
        other = OPTIMIZERS[name](again)
        train(again, other, range(7, 7 + before))
        shardckpt.load(place, {"model": again, "optimizer": other})
        assert_equal(sorted_state(other.state_dict()), sorted_state(saved))
        train(again, other, range(3, 6))
        assert_equal(again.state_dict(), model.state_dict())
        assert_equal(sorted_state(other.state_dict()), sorted_state(optimizer.state_dict()))


def test_an_optimizer_before_its_first_step(place: Storage) -> None:
    """Saved without state: loads into a fresh optimizer, and takes the state from one that has stepped."""
    model = Net(1)
    shardckpt.save(place, {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.5)})
    for before in (0, 2):
        again = Net(2)
        optimizer = torch.optim.AdamW(again.parameters())
        train(again, optimizer, range(before))
        shardckpt.load(place, {"model": again, "optimizer": optimizer})
        assert not optimizer.state_dict()["state"]
        assert optimizer.param_groups[0]["lr"] == 0.5


def test_state_of_another_type_than_the_parameter(place: Storage) -> None:
    """float32 moments of bfloat16 parameters come back in float32, bit for bit."""

    def moments(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, range(1))
        for state in optimizer.state.values():
            state["exp_avg"] = torch.full_like(state["exp_avg"], 1 / 3, dtype=torch.float32)
        return optimizer

    model, again = Net(1, torch.bfloat16), Net(2, torch.bfloat16)
    optimizer = moments(model)
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    fresh = torch.optim.AdamW(again.parameters())
    shardckpt.load(place, {"model": again, "optimizer": fresh})
    assert_equal(sorted_state(fresh.state_dict()), sorted_state(optimizer.state_dict()))


class Aliasing(torch.optim.SGD):
    """Keeps a view of each parameter in its state, and a list of tensors."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "view": parameter.detach(),
                "list": [parameter.detach() + 1],
            }
        return loss


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), torch.optim.AdamW),
        (lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9), torch.optim.RMSprop),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1)),
        (torch.optim.LBFGS, torch.optim.LBFGS),
        (lambda p: Aliasing(p, lr=0.1), lambda p: Aliasing(p, lr=0.2)),
        (lambda p: torch.optim.Adam(p, lr=0.1), lambda p: Aliasing(p, lr=0.2)),
    ],
)
def test_state_that_the_live_optimizer_lacks(
    saved: Callable[[Any], torch.optim.Optimizer],
    live: Callable[[Any], torch.optim.Optimizer],
    place: Storage,
) -> None:
    """It gets memory of its own, laid out as the parameter is: nothing of it is written into a parameter."""
    model, other = Net(0), Net(1)
    optimizer, target = saved(model.parameters()), live(other.parameters())
    train(model, optimizer, range(2))
    train(other, target, range(1))
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    shardckpt.load(place, {"model": other, "optimizer": target})
    assert_equal(other.state_dict(), model.state_dict())
    assert_equal(target.state_dict()["state"], optimizer.state_dict()["state"])
    memory = {parameter.untyped_storage().data_ptr() for parameter in other.parameters()}
    for state in target.state.values():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() not in memory


def test_one_optimizer_of_two_modules(place: Storage) -> None:
    """Its state has the names of both; the modules may be given in another order when it is loaded."""

    def make(seed: int) -> tuple[Net, Net, torch.optim.Optimizer]:
        a, b = Net(seed), Net(seed + 1)
        return a, b, torch.optim.AdamW([*a.parameters(), *b.parameters()])

    a, b, optimizer = make(1)
    train(nn.Sequential(a, nn.Linear(2, 3), b), optimizer, range(2))
    shardckpt.save(place, {"nets": [a, b], "optimizer": optimizer})
    names = shardckpt.open(place).tensors
    assert "optimizer/state/nets.0.one.weight/exp_avg" in names
    assert "optimizer/state/nets.1.one.weight/exp_avg" in names
    c, d, _ = make(5)
    other = torch.optim.AdamW([*d.parameters(), *c.parameters()])
    shardckpt.load(place, {"optimizer": other, "nets": [c, d]})
    for old, new in zip(
        [*a.parameters(), *b.parameters()], [*c.parameters(), *d.parameters()], strict=True
    ):
        assert_equal(dict(sorted(other.state[new].items())), dict(sorted(optimizer.state[old].items())))


def test_an_optimizer_without_its_module(place: Storage) -> None:
    """Where no module of the state has its parameters, they are known by their number."""
    model, again = Net(1), Net(2)
    optimizer, other = (torch.optim.AdamW(m.parameters()) for m in (model, again))
    train(model, optimizer, range(2))
    shardckpt.save(place, {"optimizer": optimizer})
    assert "optimizer/state/0/exp_avg" in shardckpt.open(place).tensors
    shardckpt.load(place, {"optimizer": other})
    assert_equal(sorted_state(other.state_dict()), sorted_state(optimizer.state_dict()))


def test_parameters_in_another_order(place: Storage) -> None:
    """State belongs to names: an optimizer that has its parameters in another order gets the right state."""
    model, again = Net(1), Net(2)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    other = torch.optim.AdamW(list(again.parameters())[::-1])
    shardckpt.load(place, {"model": again, "optimizer": other})
    train(model, optimizer, range(2, 4))
    train(again, other, range(2, 4))
    assert_equal(again.state_dict(), model.state_dict())


def test_frozen_parameters(place: Storage) -> None:
    """Parameters without gradient have no state; loading gives them none."""
    model, again = Net(1), Net(2)
    for net in (model, again):
        net.one.weight.requires_grad_(False)
    optimizer, other = (torch.optim.AdamW(m.parameters()) for m in (model, again))
    train(model, optimizer, range(2))
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    shardckpt.load(place, {"model": again, "optimizer": other})
    assert not again.one.weight.requires_grad
    assert again.one.weight not in other.state
    train(model, optimizer, range(2, 4))
    train(again, other, range(2, 4))
    assert_equal(again.state_dict(), model.state_dict())


def test_groups_that_mix_what_was_apart(place: Storage) -> None:
    """Parameters of one group that were in several: their options would be a guess, which is an error."""
    model, again = Net(1), Net(2)
    shardckpt.save(place, {"model": model, "optimizer": torch.optim.AdamW(_groups(model))})
    with pytest.raises(StateError, match=r"'optimizer'.*group 0 were in 2 groups"):
        shardckpt.load(place, {"model": again, "optimizer": torch.optim.AdamW(again.parameters())})
    assert_equal(again.state_dict(), Net(2).state_dict())


def test_strict_names_of_an_optimizer(place: Storage) -> None:
    """An optimizer of more or other parameters: an error; with strict=False what both have is loaded."""
    model, again = Net(1), Net(2)
    optimizer = torch.optim.AdamW([model.one.weight, model.two.bias], lr=0.7)
    train(model, optimizer, range(2))
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    other = torch.optim.AdamW([again.one.weight, again.two.weight])
    train(again, other, range(1))
    kept = copy.deepcopy(other.state[again.two.weight])
    with pytest.raises(MissingKeysError, match=r"optimizer/state/two\.weight"):
        shardckpt.load(place, {"model": again, "optimizer": other})
    loaded = shardckpt.load(place, {"model": again, "optimizer": other}, strict=False)
    assert loaded.missing == ("optimizer/state/two.weight",)
    assert loaded.unexpected == ("optimizer/state/two.bias",)
    assert_equal(other.state[again.two.weight], kept)
    assert_equal(
        sorted(other.state[again.one.weight].items()), sorted(optimizer.state[model.one.weight].items())
    )
    assert other.param_groups[0]["lr"] == 0.7


def test_names_of_two_optimizers_parameters_do_not_collide(place: Storage) -> None:
    """A parameter outside the state, known by its number, beside one that is called so in its module."""
    inside, outside = nn.ParameterList([torch.ones(2)]), nn.Parameter(torch.zeros(3))

    def make() -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([outside, *inside], lr=0.1, momentum=0.9)
        for parameter in (outside, *inside):
            parameter.grad = torch.full_like(parameter, float(len(parameter)))
        return optimizer

    optimizer = make()
    optimizer.step()
    shardckpt.save(place, {"model": inside, "optimizer": optimizer})
    other = make()
    shardckpt.load(place, {"model": inside, "optimizer": other})
    assert_equal(sorted_state(other.state_dict()), sorted_state(optimizer.state_dict()))
