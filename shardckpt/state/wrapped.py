"""Tensors that consist of other tensors: DTensors, and wrapper subclasses (quantized, float8, two-tensor ones).

A wrapper subclass has no memory of its own. It names the tensors that it consists of in `__tensor_flatten__`, the
protocol that torch.compile uses, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "PLAIN_TYPES",
    "describe",
    "flat",
    "inner_names",
    "is_wrapper",
    "memory_parts",
    "own_part",
    "storages",
]

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""Tensors of exactly these classes consist of no other tensors."""
_OF_THIS_PROCESS = (torch.device, torch.Size, DeviceMesh, ProcessGroup)
"""Types in a wrapper's context that describe its place or its shard's shape: they may differ between ranks."""


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's local tensor, or another tensor itself. Waits for a collective that is writing it."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    while isinstance(local, AsyncCollectiveTensor):
        local = local.wait()
    return local


def is_wrapper(local: torch.Tensor) -> bool:
    """True if a tensor, as `own_part` returns it, consists of other tensors instead of memory."""
    return type(local) not in PLAIN_TYPES and not local.is_nested and is_traceable_wrapper_subclass(local)


def inner_names(wrapper: Any) -> list[str]:
    """The attributes of a wrapper that have the tensors that it consists of."""
    return list(wrapper.__tensor_flatten__()[0])


def flat(wrapper: Any) -> tuple[list[tuple[str, torch.Tensor]], Any]:
    """(attribute, tensor) of each tensor that a wrapper consists of, and its context as plain data."""
    names, context = wrapper.__tensor_flatten__()
    return [(name, getattr(wrapper, name)) for name in names], describe(context)


def memory_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own that this rank's part of a tensor consists of."""
    local = tensor if type(tensor) in PLAIN_TYPES else own_part(tensor)
    if is_wrapper(local):
        for name in inner_names(local):
            yield from memory_parts(getattr(local, name))
    else:
        yield local


def storages(tensor: torch.Tensor) -> set[tuple[torch.device, int]]:
    """(device, address) of each storage in which this rank's part of a tensor lies; empty if it has no memory."""
    found = set()
    for part in memory_parts(tensor):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            found.add((part.device, part.untyped_storage().data_ptr()))
    return found


def describe(context: Any) -> Any:
    """A wrapper's context as plain data: equal for two wrappers in which the same inner tensors mean the same.

    Devices, meshes and shapes of shards are left out. An object that is no data is described by its class or its
    repr.
    """
    if context is None or isinstance(context, _OF_THIS_PROCESS):
        return None
    if isinstance(context, enum.Enum):
        return str(context)
    if isinstance(context, (bool, int, float, str)):
        return context
    if dataclasses.is_dataclass(context) and not isinstance(context, type):
        fields = {f.name: describe(getattr(context, f.name)) for f in dataclasses.fields(context)}
        return {type(context).__qualname__: fields}
    if isinstance(context, tuple) and hasattr(context, "_asdict"):
        return {type(context).__qualname__: describe(context._asdict())}
    if isinstance(context, dict):
        return {str(key): describe(value) for key, value in context.items()}
    if isinstance(context, (list, tuple)):
        return [describe(item) for item in context]
    if isinstance(context, (set, frozenset)):
        return sorted(str(describe(item)) for item in context)
    if isinstance(context, type) or callable(context):
        return getattr(context, "__qualname__", type(context).__qualname__)
    text = repr(context)
    return type(context).__qualname__ if " at 0x" in text or isinstance(context, torch.Tensor) else text
