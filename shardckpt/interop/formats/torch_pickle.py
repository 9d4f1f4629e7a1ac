"""The pickle in a `.pt` file: a state in which each tensor is a call that rebuilds it from a numbered storage."""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardckpt.errors import StateError
from shardckpt.format.kinds import kind_of
from shardckpt.format.manifest import TensorEntry
from shardckpt.format.tree import EnumRef, Record, TensorRef, children

__all__ = ["pickle_state"]

_MOST_BITS = 255 * 8 - 1  # beside the sign, in pickle's short form

_LOADABLE = (torch.Size, torch.dtype, torch.device, bytearray)
"""Types that weights_only reads as they are."""

_STORAGES = {
    "bool": "BoolStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
"""Types that torch.save writes as typed storages; it writes newer types as untyped bytes."""


def pickle_state(
    state: Any, tensors: Mapping[str, TensorEntry], tied: Mapping[str, str]
) -> tuple[bytes, list[TensorEntry]]:
    """Pickle a state as torch.save does, for `torch.load(weights_only=True)`.

    Args:
        state: plain values and TensorRefs.
        tensors: the entry of each tensor that `state` refers to, by name.
        tied: names of tensors that share another one's storage -> that one's name.

    Returns the pickle, and the tensor that fills each storage, by the storage's number. Raises StateError for a
    value that weights_only does not read.
    """
    storages: dict[str, _Storage] = {}

    def storage(name: str) -> _Storage:
        owner = tied.get(name, name)
        return storages.setdefault(owner, _Storage(len(storages), tensors[name]))

    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(
        _replaced(state, lambda name: _Placeholder(tensors[name], storage(name)))
    )
    return pickled.getvalue(), [each.tensor for each in storages.values()]


class _Storage:
    """A storage of the file: its number, and the tensor that fills it."""

    def __init__(self, number: int, tensor: TensorEntry) -> None:
        self.number = number
        self.tensor = tensor


class _Placeholder:
    """Stands for a tensor, and is pickled as one."""

    def __init__(self, tensor: TensorEntry, storage: _Storage) -> None:
        self.tensor = tensor
        self.storage = storage


class _NoBytes:
    """Stands for empty bytes: weights_only refuses the way in which pickle writes them by default."""


_NO_BYTES = _NoBytes()


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = _STORAGES.get(obj.tensor.dtype)
        items = int(np.prod(obj.tensor.shape, dtype=np.int64))
        if kind is not None:
            return "storage", getattr(torch, kind), str(obj.number), "cpu", items
        return "storage", torch.UntypedStorage, str(obj.number), "cpu", obj.tensor.nbytes

    def reducer_override(self, obj: Any) -> Any:
        if obj is _NO_BYTES:
            return codecs.encode, ("", "latin1")
        if not isinstance(obj, _Placeholder):
            return NotImplemented
        shape = obj.tensor.shape
        layout: tuple[Any, ...] = (obj.storage, 0, shape, _strides(shape), False, OrderedDict())
        if obj.tensor.dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, layout
        return torch._utils._rebuild_tensor_v3, (*layout, getattr(torch, obj.tensor.dtype))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    stride = 1
    for n in reversed(shape):
        strides.append(stride)
        stride *= max(n, 1)
    return tuple(reversed(strides))


def _replaced(value: Any, tensor: Callable[[str], _Placeholder]) -> Any:
    """The tree with a placeholder for each tensor, and plain data for types that weights_only refuses."""
    if isinstance(value, TensorRef):
        return tensor(value.name)
    items = [_replaced(item, tensor) for _, item in children(value)]
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind(zip(map(_hashable, value), items, strict=True))
    if isinstance(value, Record):
        return dict(zip(value._fields, items, strict=True))
    if isinstance(value, list | tuple | deque) and not isinstance(value, torch.Size):
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, set | frozenset):
        return set(map(_hashable, value))
    plain = _plain(value)
    return (
        list(plain) if isinstance(plain, tuple) and not isinstance(value, torch.Size | EnumRef) else plain
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, frozenset):
        return tuple(sorted(map(_hashable, value), key=repr))
    return tuple(map(_hashable, value)) if type(value) is tuple else _plain(value)


def _plain(value: Any) -> Any:
    """The value, or plain data for it, that weights_only reads. Raises StateError if there is none."""
    if isinstance(value, EnumRef):
        return _plain(value.value)
    if type(value) is bytes and not value:
        return _NO_BYTES
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise StateError(
            f"an integer of the state, {hex(value)[:12]}..., has {value.bit_length()} bits, and "
            f"torch.load(weights_only=True) reads no more than {_MOST_BITS}. Leave it out with --only or --select"
        )
    kind = kind_of(type(value))
    if kind is None or isinstance(value, _LOADABLE):
        return value
    content = kind.write(value)
    return tuple(content) if isinstance(content, list) else content
