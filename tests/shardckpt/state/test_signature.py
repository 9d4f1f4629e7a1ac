"""A signature notices every change of a tensor's memory, whatever compares it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shardckpt.state.signature import PythonGuards, Signature, all_modules, torch_guards

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another memory": lambda tensor: tensor.clone(),
    "transposed": lambda tensor: tensor.t(),
    "another shape": lambda tensor: tensor.view(-1),
    "a part": lambda tensor: tensor[:1],
    "another type": lambda tensor: tensor.view(torch.int32),
    "negated": torch._neg_view,
    "a parameter": nn.Parameter,
}


@pytest.mark.parametrize("make_guards", [torch_guards, PythonGuards])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_it_notices(
    change: Callable[[torch.Tensor], torch.Tensor], make_guards: Callable[..., object]
) -> None:
    tensors = [torch.ones(3, 3), torch.ones(3, 3)]
    signature = Signature(["structure"], tensors, make_guards)  # type: ignore[arg-type]
    assert signature.matches(["structure"], tensors)
    assert not signature.matches(["another"], tensors)
    assert not signature.matches(["structure"], tensors[:1])
    assert not signature.matches(["structure"], [tensors[0], change(tensors[1])])
    tensors[1] += 1
    assert signature.matches(["structure"], tensors)


def test_torch_has_guards() -> None:
    """Otherwise all saves are slower, and nobody would notice."""
    assert not isinstance(torch_guards([torch.ones(1)]), PythonGuards)


def test_all_modules_are_found_once() -> None:
    inner = nn.Linear(2, 2)
    module = nn.Sequential(inner, nn.Sequential(nn.ReLU(), inner))
    module.register_module("none", None)
    assert set(all_modules(module)) == set(module.modules())
    assert len(all_modules(module)) == len(list(module.modules()))
