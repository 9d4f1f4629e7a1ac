"""A small model, its training, and how two states are compared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

__all__ = ["Net", "assert_equal", "sorted_state", "train"]


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


def sorted_state(tree: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict with keys in order, which means nothing in it."""
    return {
        "state": {n: dict(sorted(s.items())) for n, s in sorted(tree["state"].items())},
        "param_groups": [dict(sorted(group.items())) for group in tree["param_groups"]],
    }
