"""What of a state is as it was at the save before, so that it need not be walked again.

A walk over a large model and its optimizer takes as long as copying hundreds of megabytes. Modules and
optimizers that are built as usual are therefore walked once, and then compared: as long as all their dicts
hold the very same objects, and all tensors the same memory, the walk would find the same.
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

__all__ = ["Known", "StateDictCache"]

T = TypeVar("T")


@dataclass(frozen=True)
class Known:
    """What a walk over a module or an optimizer has found: its tensors, and its JSON form."""

    tensors: Sequence[TensorShard]
    encoded: Any


@dataclass(frozen=True)
class _Entry:
    owner: weakref.ref[Any]
    looks: list[Any]
    known: Known
    guards: Sequence[weakref.ref[torch.Tensor]]


class StateDictCache:
    """What the walks over one process's state have found.

    It holds the memory of tensors, but only as long as all the tensors that it was told of live.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._modules: list[tuple[str, int]] = []
        self._derived: dict[str, tuple[Sequence[object], Any]] = {}

    def begin(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Begin a walk over a state that has these modules. The names of parameters depend on all of them."""
        found = [(path, id(module)) for path, module in modules]
        if found != self._modules or not all(self._holds(path, module) for path, module in modules):
            self.clear()
            self._modules = found

    def recall(self, path: str, value: nn.Module | torch.optim.Optimizer) -> Known | None:
        """What the walk over `value` at `path` would find, if that is known."""
        if (path, id(value)) in self._modules and path in self._entries:  # `begin` has looked
            return self._entries[path].known
        return self._entries[path].known if self._holds(path, value) else None

    def remember(
        self,
        path: str,
        value: nn.Module | torch.optim.Optimizer,
        tensors: Sequence[TensorShard],
        encoded: Any,
    ) -> None:
        """Note what a walk has found, if one can tell whether another one would find the same."""
        if not _has_default_state_dict(value):
            return
        live = list(_tensors(value))
        memory = {_storage(part) for tensor in live for part in memory_parts(tensor)}
        if all(not tensor.data.numel() or _storage(tensor.data) in memory for tensor in tensors):
            guards = [weakref.ref(tensor, lambda _: self.clear()) for tensor in live]
            known = Known(tuple(tensors), encoded)
            self._entries[path] = _Entry(weakref.ref(value), _signature(value), known, guards)

    def derived(self, name: str, inputs: Sequence[object], make: Callable[[], T]) -> T:
        """What `make` makes of these very objects: made once, until others are given under this name."""
        if (found := self._derived.get(name)) is not None:
            former, made = found
            if len(former) == len(inputs) and all(map(is_, former, inputs)):
                return made  # type: ignore[no-any-return]
        result = make()
        self._derived[name] = (tuple(inputs), result)
        return result

    def _holds(self, path: str, value: nn.Module | torch.optim.Optimizer) -> bool:
        entry = self._entries.get(path)
        return entry is not None and entry.owner() is value and entry.looks == _signature(value)

    def clear(self) -> None:
        """Know nothing, and hold nothing."""
        self._entries.clear()
        self._derived.clear()
        self._modules = []


def _has_default_state_dict(value: nn.Module | torch.optim.Optimizer) -> bool:
    """Whether what state_dict() gives depends on nothing but what `_signature` looks at."""
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
    """Plain data that is equal to what it was before only if a walk finds what it found before."""
    looks: list[Any] = []
    if isinstance(value, torch.optim.Optimizer):
        for group in value.param_groups:
            looks += [len(group["params"]), *map(id, group["params"])]
        for parameter, state in value.state.items():
            looks += [id(parameter), *state]
            looks += map(_memory, state.values())
        looks.append(optimizer_saves_plainly(value))
        return looks
    for child in value.modules():
        looks += [id(child), *child._modules, *child._non_persistent_buffers_set]
        looks += [*child._state_dict_hooks, *child._state_dict_pre_hooks, is_patched(child)]
        for held in (child._parameters, child._buffers):
            looks += held
            looks += map(_memory, held.values())
    return looks


def _memory(tensor: Any) -> Any:
    """Which object it is, and where and how its elements lie."""
    if type(tensor) in PLAIN_TYPES:  # nearly all are, and this is what each save costs
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
