"""Schedulers, gradient scalers and averaged models go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import shardckpt
from shardckpt.storage import Storage
from tests.kit.states import Net, assert_equal, train

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
