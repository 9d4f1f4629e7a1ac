"""Cache of walks over modules, optimizers and containers, reused while they hold the same tensors.

A walk over a large model and its optimizer takes as long as copying hundreds of megabytes. Modules and optimizers
whose state_dict is torch's own, and containers of nothing but tensors, are therefore walked once, and compared
at later saves: while they hold the same objects, and their tensors the same memory, another walk would find the
same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn

from shardckpt.state.overrides import optimizer_saves_plainly, saves_plainly
from shardckpt.state.signature import (
    Signature,
    all_modules,
    module_signature,
    optimizer_signature,
)
from shardckpt.state.tensors import TensorShard
from shardckpt.state.wrapped import memory_parts

__all__ = ["CachedWalk", "StateDictCache"]

T = TypeVar("T")


@dataclass(frozen=True)
class CachedWalk:
    """What a walk over a module, an optimizer or a container found.

    Attributes:
        tensors: its tensors.
        encoded: its JSON form, as text; of an optimizer a dict, in which its state is text.
    """

    tensors: Sequence[TensorShard]
    encoded: Any


@dataclass(frozen=True)
class _Entry:
    owner: weakref.ref[Any] | None  # None for a container, which is compared by its content
    signature: Signature
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
    ) -> Any:
        """Add what a walk over `value` found, if a signature can tell whether another would find the same.

        Returns `encoded`, or what takes its place from now on.
        """
        if not _has_default_state_dict(value):
            return encoded
        signature = _signature(value)
        memory = {_storage(part) for tensor in signature[1] for part in memory_parts(tensor)}
        if any(tensor.data.numel() and _storage(tensor.data) not in memory for tensor in tensors):
            return encoded
        if isinstance(value, torch.optim.Optimizer):  # numbers in its groups may change from save to save
            encoded = {**encoded, "state": _encoded(encoded["state"])}
        else:
            encoded = _encoded(encoded)
        return self._add(path, weakref.ref(value), signature, tensors, encoded)

    def find_container(self, path: str, signature: tuple[list[Any], list[Any]]) -> CachedWalk | None:
        """What a walk over the container at `path` that has this signature would find; None: walk it."""
        entry = self._entries.get(path)
        if entry is None or entry.owner is not None or not entry.signature.matches(*signature):
            return None
        return entry.walk

    def add_container(
        self,
        path: str,
        signature: tuple[list[Any], list[Any]],
        tensors: Sequence[TensorShard],
        encoded: Any,
    ) -> Any:
        """Add what a walk over a container found. Returns what takes the place of `encoded` from now on."""
        return self._add(path, None, signature, tensors, _encoded(encoded))

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
        if entry is None or entry.owner is None or entry.owner() is not value:
            return False
        try:
            return entry.signature.matches(*_signature(value))
        except AttributeError:  # a module in it is of another kind now
            return False

    def _add(
        self,
        path: str,
        owner: weakref.ref[Any] | None,
        signature: tuple[list[Any], list[Any]],
        tensors: Sequence[TensorShard],
        encoded: Any,
    ) -> Any:
        structure, live = signature
        guards = [weakref.ref(tensor, self._forget) for tensor in live]
        walk = CachedWalk(tuple(tensors), encoded)
        self._entries[path] = _Entry(owner, Signature(structure, live), walk, guards)
        return encoded

    def _forget(self, _: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._derived.clear()
        self._modules = []


def _has_default_state_dict(value: nn.Module | torch.optim.Optimizer) -> bool:
    """True if what state_dict() returns depends on nothing but what its signature contains."""
    if isinstance(value, torch.optim.Optimizer):
        return optimizer_saves_plainly(value) and all(
            isinstance(v, torch.Tensor) for state in value.state.values() for v in state.values()
        )
    return all(map(saves_plainly, all_modules(value)))


def _signature(value: nn.Module | torch.optim.Optimizer) -> tuple[list[Any], list[Any]]:
    return (
        optimizer_signature(value) if isinstance(value, torch.optim.Optimizer) else module_signature(value)
    )


def _encoded(form: Any) -> msgspec.Raw:
    """A JSON form as text: later saves need not encode it, which takes longer than to compare all tensors."""
    return msgspec.Raw(msgspec.json.encode(form))


def _storage(part: torch.Tensor) -> int:
    return part.untyped_storage().data_ptr()
