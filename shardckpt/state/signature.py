"""Signatures: data that is equal at two saves only if a walk over an object finds the same at both.

An object may have 100,000 tensors, which every save compares. What is compared is therefore gathered by functions
that run at C speed over whole lists, and how tensors lie in memory is compared by torch's own guards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardckpt.format.tree import MAX_DEPTH
from shardckpt.state.overrides import is_patched, optimizer_saves_plainly
from shardckpt.state.wrapped import PLAIN_TYPES, flat, is_wrapper, own_part

__all__ = [
    "PythonGuards",
    "Signature",
    "all_modules",
    "container_signature",
    "module_signature",
    "optimizer_signature",
    "torch_guards",
]

_TENSORS = frozenset({*PLAIN_TYPES, DTensor})
_CONTAINERS = frozenset({dict, list, tuple})
_KEYS = frozenset({str, int})

_data_ptr = torch.Tensor.data_ptr
_local_tensor = attrgetter("_local_tensor")
_spec = attrgetter("_spec")
_modules = attrgetter("_modules")
_module_parts = attrgetter("_parameters", "_buffers", "_non_persistent_buffers_set")
_module_hooks = attrgetter("_state_dict_hooks", "_state_dict_pre_hooks")


class Guards(Protocol):
    """Compares tensors with others that it was made of."""

    def check(self, *parts: torch.Tensor) -> bool:
        """Return True if these have the same types, devices, shapes and strides, in this order."""


class PythonGuards:
    """Guards that work with every version of torch."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._expected = list(map(_memory, parts))

    def check(self, *parts: torch.Tensor) -> bool:
        """See Guards."""
        return list(map(_memory, parts)) == self._expected


def torch_guards(parts: Sequence[torch.Tensor]) -> Guards:
    """What torch.compile checks the inputs of a compiled function with: ten times as fast as PythonGuards.

    It is no public part of torch. PythonGuards take its place where it is missing or takes other arguments.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*parts, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (ImportError, TypeError, ValueError, RuntimeError):
        return PythonGuards(parts)


class Signature:
    """What of an object determines which tensors a walk finds: its structure, and where its tensors lie.

    Args:
        structure: names, and ids of objects that live as long as the tensors.
        tensors: in an order that depends on the structure alone.
        make_guards: makes what compares plain tensors.
    """

    def __init__(
        self,
        structure: list[Any],
        tensors: Sequence[Any],
        make_guards: Callable[[Sequence[torch.Tensor]], Guards] = torch_guards,
    ) -> None:
        self._structure = structure
        self._types = list(map(type, tensors))
        self._kinds: list[list[bool]] | None = None
        if not set(self._types) <= set(PLAIN_TYPES):
            kinds = list(map(_kind, tensors))
            self._kinds = [[kind == wanted for kind in kinds] for wanted in range(3)]
        parts, self._layouts, self._others = self._split(tensors)
        self._guards = make_guards(parts)
        self._addresses = list(map(_data_ptr, parts))

    def matches(self, structure: list[Any], tensors: Sequence[Any]) -> bool:
        """Return True if the object has still this structure, and its tensors lie where and as they did."""
        if structure != self._structure or list(map(type, tensors)) != self._types:
            return False
        parts, layouts, others = self._split(tensors)
        return (
            all(map(is_, layouts, self._layouts))
            and others == self._others
            and self._guards.check(*parts)
            and list(map(_data_ptr, parts)) == self._addresses
        )

    def _split(self, tensors: Sequence[Any]) -> tuple[Sequence[torch.Tensor], list[Any], list[Any]]:
        """Return plain tensors and DTensors' local ones, the specs of DTensors, and what describes others."""
        if self._kinds is None:
            return tensors, [], []
        plain, sharded, others = (list(compress(tensors, kind)) for kind in self._kinds)
        parts = [*plain, *map(_local_tensor, sharded)]
        return parts, list(map(_spec, sharded)), list(map(_memory, others))


def _kind(tensor: Any) -> int:
    """0 for a plain tensor, 1 for a DTensor whose local tensor is one, 2 for others."""
    if type(tensor) in PLAIN_TYPES:
        return 0
    return 1 if type(tensor) is DTensor and type(tensor._local_tensor) in PLAIN_TYPES else 2


def _memory(tensor: Any) -> Any:
    """Where and how a tensor's elements lie."""
    if not isinstance(tensor, torch.Tensor):
        return id(tensor)
    local = own_part(tensor)
    if is_wrapper(local):
        inner, context = flat(local)
        return id(tensor), id(local), repr(context), *((name, _memory(held)) for name, held in inner)
    layout: Any = id(tensor._spec) if isinstance(tensor, DTensor) else tensor.device
    bits = local.is_conj(), local.is_neg()
    return local.data_ptr(), local.shape, local.stride(), local.dtype, bits, layout


def all_modules(module: nn.Module) -> list[nn.Module]:
    """The module and all modules in it, each once."""
    found: dict[nn.Module, None] = {}
    level = [module]
    while level:
        found |= dict.fromkeys(level)
        inner = chain.from_iterable([held.values() for held in map(_modules, level)])
        level = [child for child in dict.fromkeys(inner) if child is not None and child not in found]
    return list(found)


def module_signature(module: nn.Module) -> tuple[list[Any], list[torch.Tensor]]:
    """The structure of a module, and its parameters and buffers, also those that are not saved.

    Raises AttributeError for a module that keeps them elsewhere, as a ScriptModule does.
    """
    modules = all_modules(module)
    structure: list[Any] = list(map(id, modules))
    holders: list[Any] = [*chain.from_iterable(map(_module_parts, modules))]
    holders += chain.from_iterable(map(_module_hooks, modules))
    inner = list(map(_modules, modules))
    structure += map(len, holders)
    structure += chain.from_iterable(holders)
    structure += map(len, inner)
    structure += chain.from_iterable(inner)
    structure += map(id, chain.from_iterable([held.values() for held in inner]))
    structure += map(is_patched, modules)
    values = [held.values() for parts in map(_module_parts, modules) for held in parts[:2]]
    tensors = list(chain.from_iterable(values))
    structure += map(id, tensors)
    return structure, [tensor for tensor in tensors if tensor is not None]


def optimizer_signature(optimizer: torch.optim.Optimizer) -> tuple[list[Any], list[Any]]:
    """The structure of an optimizer, and the values of its state."""
    structure: list[Any] = [optimizer_saves_plainly(optimizer)]
    for group in optimizer.param_groups:
        structure.append(len(group["params"]))
        structure += map(id, group["params"])
    states = list(optimizer.state.values())
    structure += map(id, optimizer.state)
    structure += map(len, states)
    structure += chain.from_iterable(states)
    values = list(chain.from_iterable([state.values() for state in states]))
    structure += map(id, values)
    return structure, values


def container_signature(value: Any) -> tuple[list[Any], list[torch.Tensor]] | None:
    """The structure of a dict, list or tuple, and the tensors in it.

    None if there is anything in it beside tensors and further dicts, lists and tuples, each of them once, or if a
    dict has keys other than texts and integers.
    """
    structure: list[Any] = []
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()
    level = [value]
    for _ in range(MAX_DEPTH):
        if not set(map(type, level)) <= _CONTAINERS:
            return None
        seen_before = len(seen)
        seen.update(map(id, level))
        if len(seen) < seen_before + len(level):
            return None
        structure += map(type, level)
        structure += map(len, level)
        items: list[Any] = []
        for held in level:
            if type(held) is dict:
                if not set(map(type, held)) <= _KEYS:  # 1, 1.0 and True would be equal
                    return None
                structure += held
                items += held.values()
            else:
                items += held
        types = list(map(type, items))
        if set(types) <= _TENSORS:
            return structure, [*tensors, *items]
        structure += types
        level = [item for item, kind in zip(items, types, strict=True) if kind not in _TENSORS]
        tensors += [item for item, kind in zip(items, types, strict=True) if kind in _TENSORS]
    return None
