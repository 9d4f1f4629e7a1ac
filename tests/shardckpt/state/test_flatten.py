"""Everything that a state may hold: what is saved, what comes back, and how training goes on with it."""

from __future__ import annotations

import copy
import enum
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import shardckpt
from shardckpt.errors import (
    MissingKeysError,
    RankMismatchError,
    ShapeMismatchError,
    StateError,
    UnsupportedValueError,
)
from shardckpt.ranks.world import Alone
from shardckpt.run.places import Place
from shardckpt.saving.session import SaveSession
from shardckpt.state.flatten import flatten
from shardckpt.storage import Storage
from tests.kit.worlds import PeerGoneError, ThreadRanks, outcomes, run_threads, start_save


class Net(nn.Module):
    """Two layers, the second with a bias; a buffer; two dimensions each, so that every optimizer takes it."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one = nn.Linear(3, 4, bias=False)
        self.two = nn.Linear(4, 2)
        self.register_buffer("seen", torch.tensor(seed))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: Any = None) -> None:
    """Steps whose data depends on nothing but their number."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        data = torch.randn(5, 3, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)

        def closure(data: torch.Tensor = data) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def assert_equal(found: Any, wanted: Any, path: str = "") -> None:
    """Two trees are equal: types, order, and every bit of every tensor."""
    assert type(found) is type(wanted) or {type(found), type(wanted)} <= {nn.Parameter, torch.Tensor}, path
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype, path
        assert found.device == wanted.device, path
        assert found.shape == wanted.shape, path
        one, other = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (found, wanted))
        assert torch.equal(one, other), path
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), path
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), path
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(a, b, f"{path}/{number}")
    elif isinstance(wanted, float):
        assert found == wanted or (math.isnan(found) and math.isnan(wanted)), path
    else:
        assert found == wanted, path


# -- optimizers

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
        assert_equal(_sorted(other.state_dict()), _sorted(saved))
        train(again, other, range(3, 6))
        assert_equal(again.state_dict(), model.state_dict())
        assert_equal(_sorted(other.state_dict()), _sorted(optimizer.state_dict()))


def _sorted(tree: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict with keys in order, which means nothing in it."""
    return {
        "state": {n: dict(sorted(s.items())) for n, s in sorted(tree["state"].items())},
        "param_groups": [dict(sorted(group.items())) for group in tree["param_groups"]],
    }


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
    assert_equal(_sorted(fresh.state_dict()), _sorted(optimizer.state_dict()))


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
    assert_equal(_sorted(other.state_dict()), _sorted(optimizer.state_dict()))


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


# -- schedulers, scalers, averages

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "CyclicLR exp": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="exp_range"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: SWALR(o, 0.05),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def test_every_scheduler_is_tested() -> None:
    """A scheduler class that a new torch brings is missed here, and not by a user."""
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and name[0] != "_"
    }
    assert classes - {"LRScheduler"} == {name.split()[0] for name in SCHEDULERS} - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_schedulers(name: str, rate: float | torch.Tensor, place: Storage) -> None:
    """Every scheduler of torch goes on as if it had not been interrupted, in fresh objects."""

    def make(seed: int) -> tuple[Net, torch.optim.Optimizer, Any]:
        model = Net(seed)
        lr = rate.clone() if isinstance(rate, torch.Tensor) else rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.8, 0.9))
        return model, optimizer, SCHEDULERS[name](optimizer)

    model, optimizer, scheduler = make(1)
    train(model, optimizer, range(3), scheduler)
    shardckpt.save(place, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    train(model, optimizer, range(3, 7), scheduler)
    again, other, fresh = make(2)
    shardckpt.load(place, {"model": again, "optimizer": other, "scheduler": fresh})
    train(again, other, range(3, 7), fresh)
    assert_equal(again.state_dict(), model.state_dict())
    assert float(other.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
    assert float(other.param_groups[0]["lr"]) != 0.0


def test_grad_scaler(place: Storage) -> None:
    """The loss scale and its counters come back."""
    scaler, fresh = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 2.0))
    scaler.scale(torch.ones(1))
    scaler.update(16.0)
    shardckpt.save(place, {"scaler": scaler})
    shardckpt.load(place, {"scaler": fresh})
    assert fresh.state_dict() == scaler.state_dict()
    assert fresh.get_scale() == 16.0


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_models(average: Any, place: Storage) -> None:
    """A running average of the model, with the number of models in it."""
    model, again = Net(1), Net(2)
    mean, fresh = (AveragedModel(net, multi_avg_fn=average) for net in (model, again))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        mean.update_parameters(model)
    shardckpt.save(place, {"model": model, "mean": mean})
    shardckpt.load(place, {"model": again, "mean": fresh})
    assert_equal(fresh.state_dict(), mean.state_dict())
    assert fresh.n_averaged == 3


# -- modules and what wraps them


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


# -- plain values


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


# -- what every rank has its own of


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
        loaded = load_place(place, state, ranks)
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


def load_place(place: Storage, state: dict[str, Any], ranks: Any, **options: Any) -> shardckpt.Loaded:
    """`shardckpt.load`, among ranks that are threads."""
    from shardckpt.loading.load import load_place

    return load_place(Place(place), state, ranks, strict=options.get("strict", True), started=0.0)


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


# -- names and shapes that do not agree


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


# -- the plan and the buffer that are kept from save to save


def test_a_state_that_changes_between_saves(place: Storage) -> None:
    """The plan of the save before is used only as long as it fits: other shapes, types, names, ties."""
    session = SaveSession(Alone(), 60)
    shared = torch.arange(4.0)
    states: list[dict[str, Any]] = [
        {"t": torch.zeros(4)}, {"t": torch.ones(4)}, {"t": torch.ones(5)},
        {"t": torch.ones(5, dtype=torch.int32)}, {"u": torch.ones(5)}, {"t": torch.ones(5), "u": torch.zeros(2)},
        {"t": shared, "u": shared}, {"t": shared, "u": shared.clone()}, {"v": 1}, {"t": torch.ones(4)},
    ]  # fmt: skip
    for number, state in enumerate(states):
        folder = place.at(f"{number}")
        start_save(session, folder, state, step=number).wait()
        loaded = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in state.items()}
        shardckpt.load(folder, loaded)
        assert_equal(loaded, state)


def test_one_rank_changes_its_structure(place: Storage) -> None:
    """If the structure changes on one rank only, all ranks plan anew."""

    def run(ranks: ThreadRanks) -> None:
        session = SaveSession(ranks, 60)
        for number in range(3):
            own = torch.full((1 + number * ranks.rank,), number)
            state = {"own": shardckpt.PerRank(own), "t": torch.full((5,), number)}
            start_save(session, place.at(f"{number}"), state).wait()

    run_threads(2, run)
    for number in range(3):
        checkpoint = shardckpt.open(place.at(f"{number}"))
        checkpoint.verify()
        assert checkpoint.read("own/rank-00001").tolist() == [number] * (1 + number)
        assert checkpoint.read("t").tolist() == [number] * 5


def test_a_mismatch_found_once_is_found_again(place: Storage) -> None:
    """Replicas that differ where samples would not show it are an error each time they are saved."""

    def run(ranks: ThreadRanks) -> None:
        session = SaveSession(ranks, 60)
        tensor = torch.zeros(1 << 20)
        tensor[1 << 18] = ranks.rank
        for number in range(2):
            with pytest.raises(RankMismatchError, match=r"'t'.*rank 0.*rank 1"):
                start_save(session, place.at(f"{number}"), {"t": tensor})

    run_threads(2, run)
    assert place.list() == []


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
    assert_equal(_sorted(other.state_dict()), _sorted(optimizer.state_dict()))


def test_the_outcomes_of_threads() -> None:
    """The world of threads itself: a rank that leaves early does not hang the one that waits for it."""
    found = outcomes(2, lambda ranks: ranks.gather(b"") if ranks.rank else None)
    assert found[0] is None
    assert isinstance(found[1], PeerGoneError)
