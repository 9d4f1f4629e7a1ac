"""Tensors that consist of other tensors: DTensors, and wrapper subclasses (quantized, float8, two-tensor ones).

A wrapper subclass has no memory of its own. What it consists of is what `__tensor_flatten__` names, the protocol
that torch.compile uses too.
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
"""Tensors of these very classes have memory of their own, if any."""
_OF_THIS_PROCESS = (torch.device, torch.Size, DeviceMesh, ProcessGroup)
"""What a wrapper knows of its place, or of its local shape: another process may have another."""


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, without a graph; waits for a collective that is still writing it."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    while isinstance(local, AsyncCollectiveTensor):
        local = local.wait()
    return local


def is_wrapper(local: torch.Tensor) -> bool:
    """Whether the tensor, of which a DTensor's local part is meant, has other tensors instead of memory."""
    return type(local) not in PLAIN_TYPES and not local.is_nested and is_traceable_wrapper_subclass(local)


def inner_names(wrapper: Any) -> list[str]:
    """The attributes of a wrapper that hold the tensors that it consists of."""
    return list(wrapper.__tensor_flatten__()[0])


def flat(wrapper: Any) -> tuple[list[tuple[str, torch.Tensor]], Any]:
    """The tensors that a wrapper consists of, by attribute, and what else it needs to know, as plain data."""
    names, context = wrapper.__tensor_flatten__()
    return [(name, getattr(wrapper, name)) for name in names], describe(context)


def memory_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own that make up this rank's part of a tensor."""
    local = tensor if type(tensor) in PLAIN_TYPES else own_part(tensor)
    if is_wrapper(local):
        for name in inner_names(local):
            yield from memory_parts(getattr(local, name))
    else:
        yield local


def storages(tensor: torch.Tensor) -> set[tuple[torch.device, int]]:
    """The memory that a tensor lies in, as far as this rank holds it; none, for what has none."""
    found = set()
    for part in memory_parts(tensor):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            found.add((part.device, part.untyped_storage().data_ptr()))
    return found


def describe(context: Any) -> Any:
    """A wrapper's context as plain data: equal if two wrappers mean the same by the same inner tensors.

    Devices, meshes and local shapes are left out. What is no data is known by its class, or by its repr.
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
