"""Cache of state_dict walks, reused while the module's and optimizer's tensors are the same objects.

A walk over a large model and its optimizer takes as long as copying hundreds of megabytes. Modules and optimizers
whose state_dict is torch's own are therefore walked once, and compared at later saves: while their dicts hold the
same objects, and their tensors the same memory, another walk would find the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardckpt.state.overrides import is_patched, optimizer_saves_plainly, saves_plainly
from shardckpt.state.tensors import TensorShard
from shardckpt.state.wrapped import PLAIN_TYPES, flat, is_wrapper, memory_parts, own_part

__all__ = ["CachedWalk", "StateDictCache"]

T = TypeVar("T")


@dataclass(frozen=True)
class CachedWalk:
    """What a walk over a module or an optimizer found: its tensors, and its JSON form."""

    tensors: Sequence[TensorShard]
    encoded: Any


@dataclass(frozen=True)
class _Entry:
    owner: weakref.ref[Any]
    signature: list[Any]
    walk: CachedWalk
    guards: Sequence[weakref.ref[torch.Tensor]]


class StateDictCache:
    """The walks over the state of one process.

    It keeps tensors alive, but drops everything as soon as one of the live tensors is deleted.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._modules: list[tuple[str, int]] = []
        self._derived: dict[str, tuple[Sequence[object], Any]] = {}

    def begin(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Begin a save of a state with these modules.

        If one of them has changed, everything is dropped: the names of parameters depend on all modules.
        """
        found = [(path, id(module)) for path, module in modules]
        if found != self._modules or not all(self._holds(path, module) for path, module in modules):
            self.clear()
            self._modules = found

    def find(self, path: str, value: nn.Module | torch.optim.Optimizer) -> CachedWalk | None:
        """What a walk over `value` at `path` would find; None if it has to be walked."""
        if (path, id(value)) in self._modules and path in self._entries:  # compared by `begin`
            return self._entries[path].walk
        return self._entries[path].walk if self._holds(path, value) else None

    def add(
        self,
        path: str,
        value: nn.Module | torch.optim.Optimizer,
        tensors: Sequence[TensorShard],
        encoded: Any,
    ) -> None:
        """Add what a walk over `value` found, if a signature can tell whether another would find the same."""
        if not _has_default_state_dict(value):
            return
        live = list(_tensors(value))
        memory = {_storage(part) for tensor in live for part in memory_parts(tensor)}
        if all(not tensor.data.numel() or _storage(tensor.data) in memory for tensor in tensors):
            guards = [weakref.ref(tensor, lambda _: self.clear()) for tensor in live]
            walk = CachedWalk(tuple(tensors), encoded)
            self._entries[path] = _Entry(weakref.ref(value), _signature(value), walk, guards)

    def derived(self, name: str, inputs: Sequence[object], make: Callable[[], T]) -> T:
        """What `make` returns for these very objects. It is called again once other objects are passed.

        Args:
            name: of what is made; one result is kept for each.
            inputs: the objects that the result depends on, compared by identity.
            make: called without arguments.
        """
        if (found := self._derived.get(name)) is not None:
            former, made = found
            if len(former) == len(inputs) and all(map(is_, former, inputs)):
                return made  # type: ignore[no-any-return]
        result = make()
        self._derived[name] = (tuple(inputs), result)
        return result

    def _holds(self, path: str, value: nn.Module | torch.optim.Optimizer) -> bool:
        entry = self._entries.get(path)
        return entry is not None and entry.owner() is value and entry.signature == _signature(value)

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._derived.clear()
        self._modules = []


def _has_default_state_dict(value: nn.Module | torch.optim.Optimizer) -> bool:
    """True if what state_dict() returns depends on nothing but what `_signature` contains."""
    if isinstance(value, torch.optim.Optimizer):
        return optimizer_saves_plainly(value) and all(
            isinstance(v, torch.Tensor) for state in value.state.values() for v in state.values()
        )
    return all(map(saves_plainly, value.modules()))


def _tensors(value: nn.Module | torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.optim.Optimizer):
        for state in value.state.values():
            yield from state.values()
    else:
        yield from value.parameters()
        yield from value.buffers()


def _signature(value: nn.Module | torch.optim.Optimizer) -> list[Any]:
    """Plain data that is equal at two saves only if walks find the same at both."""
    signature: list[Any] = []
    if isinstance(value, torch.optim.Optimizer):
        for group in value.param_groups:
            signature += [len(group["params"]), *map(id, group["params"])]
        for parameter, state in value.state.items():
            signature += [id(parameter), *state]
            signature += map(_memory, state.values())
        signature.append(optimizer_saves_plainly(value))
        return signature
    for child in value.modules():
        signature += [id(child), *child._modules, *child._non_persistent_buffers_set]
        signature += [*child._state_dict_hooks, *child._state_dict_pre_hooks, is_patched(child)]
        for held in (child._parameters, child._buffers):
            signature += held
            signature += map(_memory, held.values())
    return signature


def _memory(tensor: Any) -> Any:
    """Which object a tensor is, and where and how its elements lie."""
    if type(tensor) in PLAIN_TYPES:  # nearly all are; this is most of the cost of each save
        where = id(tensor), tensor.data_ptr(), tensor.device, tensor.dtype
        return where, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    if not isinstance(tensor, torch.Tensor):
        return id(tensor)
    local = own_part(tensor)
    if is_wrapper(local):
        inner, context = flat(local)
        return id(tensor), id(local), repr(context), *((name, _memory(held)) for name, held in inner)
    layout: Any = id(tensor._spec) if isinstance(tensor, DTensor) else tensor.device
    bits = local.is_conj(), local.is_neg()
    return id(tensor), local.data_ptr(), local.shape, local.stride(), local.dtype, bits, layout


def _storage(part: torch.Tensor) -> int:
    return part.untyped_storage().data_ptr()
