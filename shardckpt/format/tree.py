"""Decoded values: what stands in them for tensors and other values, and how to walk them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "MAX_DEPTH",
    "EnumRef",
    "PerRankRef",
    "Record",
    "TensorRef",
    "WrapperRef",
    "children",
    "iter_references",
    "rebuilt",
]

MAX_DEPTH = 100
"""Levels of nesting that values may have: more would exhaust the recursion of JSON parsers."""


class TensorRef:
    """Stands for a tensor: its name, and whether it is loaded as a NumPy array."""

    __slots__ = ("name", "ndarray")

    def __init__(self, name: str, *, ndarray: bool = False) -> None:
        self.name = name
        self.ndarray = ndarray

    def __repr__(self) -> str:
        return f"TensorRef({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorRef) and (self.name, self.ndarray) == (
            other.name,
            other.ndarray,
        )

    def __hash__(self) -> int:
        return hash((self.name, self.ndarray))


class PerRankRef:
    """Stands for a value that differs between ranks; `path` is its place in the state."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"PerRankRef({self.path!r})"


class WrapperRef(dict[str, Any]):
    """Stands for a tensor subclass: attribute -> a reference to the tensor that it has there.

    An inner tensor whose shards only the subclass understands is a list of references, one for each shard.

    Attributes:
        type: the full name of its class, for messages and for comparison with the live tensor's.
        dtype: the name of its element type.
        shape: its global shape.
        sharding: (dimension, parts, split factor) of each split, if shards are stored one by one; otherwise
            empty.
        context: what else the subclass needs, as plain data.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        *,
        type: str,
        dtype: str,
        shape: tuple[int, ...],
        sharding: tuple[tuple[int, int, int], ...],
        context: Any,
    ) -> None:
        super().__init__(tensors)
        self.type = type
        self.dtype = dtype
        self.shape = shape
        self.sharding = sharding
        self.context = context

    def with_tensors(self, tensors: Mapping[str, Any]) -> WrapperRef:
        """The same subclass, consisting of these tensors."""
        return WrapperRef(
            tensors,
            type=self.type,
            dtype=self.dtype,
            shape=self.shape,
            sharding=self.sharding,
            context=self.context,
        )


class Record(tuple[Any, ...]):
    """A named tuple whose class is not imported: its items by position and by name."""

    _fields: tuple[str, ...]

    def __new__(cls, items: Mapping[str, Any]) -> Record:
        """Make one of `items`, in their order."""
        self = super().__new__(cls, items.values())
        self._fields = tuple(items)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_fields", ()):
            return self[self._fields.index(name)]
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{n}={v!r}' for n, v in zip(self._fields, self, strict=True))})"

    def __reduce__(self) -> Any:
        return Record, (dict(zip(self._fields, self, strict=True)),)


class EnumRef:
    """Stands for a member of an Enum: the full name of its class, and its value."""

    __slots__ = ("type", "value")

    def __init__(self, type: str, value: Any) -> None:
        self.type = type
        self.value = value

    def __repr__(self) -> str:
        return f"EnumRef({self.type!r}, {self.value!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EnumRef) and (self.type, self.value) == (other.type, other.value)

    def __hash__(self) -> int:
        return hash((self.type, self.value))


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """(key or number, item) of each item of a container; nothing for any other value."""
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple, deque)) else ()


def rebuilt(value: Any, items: Iterable[Any]) -> Any:
    """A container like `value` with other items, as many as `children` has, and in that order."""
    if isinstance(value, WrapperRef):
        return value.with_tensors(dict(zip(value, items, strict=True)))
    if isinstance(value, dict):
        pairs = dict(zip(value, items, strict=True))
        return (
            defaultdict(value.default_factory, pairs)
            if isinstance(value, defaultdict)
            else type(value)(pairs)
        )
    if isinstance(value, Record):
        return Record(dict(zip(value._fields, items, strict=True)))
    return deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)


def iter_references(value: Any) -> Iterator[TensorRef | PerRankRef]:
    """Every reference in a decoded value, depth first, in order."""
    if isinstance(value, TensorRef | PerRankRef):
        yield value
        return
    stack = [iter((value,))]
    while stack:
        for item in stack[-1]:
            if isinstance(item, dict):
                stack.append(iter(item.values()))
                break
            if isinstance(item, list | tuple | deque):
                stack.append(iter(item))
                break
            if isinstance(item, TensorRef | PerRankRef):
                yield item
        else:
            stack.pop()
