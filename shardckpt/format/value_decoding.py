"""Decode values: from the JSON forms of `shardckpt.format.value_encoding` to values and references."""

from __future__ import annotations

import base64
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

from shardckpt.errors import FormatError
from shardckpt.format.kinds import FACTORIES, INT64, KEY_KINDS, kind_of_tag
from shardckpt.format.names import segment
from shardckpt.format.tree import (
    MAX_DEPTH,
    EnumRef,
    PerRankRef,
    Record,
    TensorRef,
    WrapperRef,
    iter_references,
)

__all__ = ["decode_value"]

_LARGE_INT = re.compile("-?0x[1-9a-f][0-9a-f]*")
_KEY_TAGS = KEY_KINDS | {"$tuple", "$bytes", "$float", "$int", "$complex", "$frozenset", "$namedtuple"}
_WRAPPER_KEYS = {"type", "dtype", "shape", "sharding", "context", "tensors"}
_MOST_SPLITS = 64
"""Splits of a sharded wrapper: one for each dimension of a device mesh, which is itself a tensor."""
_MOST_COLLIDING = 1024
"""Keys of one dict that may have the same hash: more occur in forgeries only, and take quadratic time."""


def decode_value(value: Any) -> Any:
    """The value of a JSON form. Tensors become a TensorRef or WrapperRef, per-rank values a PerRankRef.

    Members of enums become an EnumRef and named tuples a Record, since their classes are not imported. Raises
    FormatError for whatever `encode_value` does not produce: an unknown tag, or content that does not belong to
    it.

    >>> decode_value({"rates": {"$tuple": [0.5, {"$float": "inf"}]}})
    {'rates': (0.5, inf)}
    """
    try:
        return _decode(value, 0)
    except _InvalidError as error:
        path = "/".join(segment(key)[:80] for key in reversed(error.keys[-8:]))
        raise FormatError(f"values: {path!r} {error}") from error.__cause__
    except RecursionError as error:
        raise FormatError(f"values: they lie more than {MAX_DEPTH} levels deep") from error


class _InvalidError(Exception):
    """What is wrong with a value, and the keys that lead to it, the innermost first.

    The keys are collected while the exception passes up, so that no path is built for a valid value.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.keys: list[object] = []


def _decode(value: Any, level: int) -> Any:
    if isinstance(value, list):
        return _decode_items(value, level + 1)
    if isinstance(value, int) and not isinstance(value, bool) and not -INT64 <= value < INT64:
        raise _InvalidError("is an integer that does not fit 64 bits, which is written as $int")
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and isinstance(name := value.get("$tensor"), str):  # as most are
        return TensorRef(name)
    for tag in value:
        if tag.startswith("$"):
            return _decode_tagged(tag if len(value) == 1 else ", ".join(value), value[tag], level)
    return _decode_object(value, level + 1)


def _decode_object(content: Any, level: int) -> dict[str, Any]:
    """A dict of decoded values. Raises TypeError if `content` is no object."""
    if not isinstance(content, dict):
        raise TypeError(f"expected an object, found {content!r}")
    _check_level(level)
    done: dict[str, Any] = {}
    key = ""
    try:
        for key, item in content.items():
            done[key] = _decode(item, level)
    except _InvalidError as error:
        error.keys.append(key)
        raise
    return done


def _decode_items(items: list[Any], level: int) -> list[Any]:
    _check_level(level)
    done: list[Any] = []
    try:
        for item in items:
            done.append(_decode(item, level))
    except _InvalidError as error:
        error.keys.append(len(done))
        raise
    return done


def _check_level(level: int) -> None:
    if level > MAX_DEPTH + 1:
        raise _InvalidError(f"lies more than {MAX_DEPTH} levels deep")


def _decode_tagged(tag: str, content: Any, level: int) -> Any:
    """The value of an object with one `$` key. `tag` is that key, or all keys if there are several."""
    try:
        if (kind := kind_of_tag(tag)) is not None:
            made = kind.read(content)
            if kind.write(made) != content:
                raise ValueError("it is not as this library writes it")
            return made
        match tag:
            case "$tuple":
                return tuple(_decode_items(_list(content), level + 1))
            case "$bytes":
                return base64.b64decode(content, validate=True)
            case "$float":
                return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
            case "$int":
                return _large_int(content)
            case "$dict":
                items = map(_list, _list(content))
                pairs = [(_decode_key(key, level), value) for key, value in items]
                for key, _ in pairs:
                    segment(key)  # ValueError for an integer of more digits than Python writes
                return _dict(pairs, _decode_items([value for _, value in pairs], level + 1))
            case "$mapping":
                return _decode_mapping(_list(content), level)
            case "$namedtuple":
                return Record(_decode_object(content, level + 1))
            case "$deque":
                return _decode_deque(_list(content), level)
            case "$set" | "$frozenset":
                return _decode_set(_list(content), level, set if tag == "$set" else frozenset)
            case "$complex":
                real, imaginary = _decode_items(_list(content), level + 1)
                if type(real) is not float or type(imaginary) is not float:
                    raise TypeError(f"expected two floats, found {content!r}")
                return complex(real, imaginary)
            case "$enum":
                name, member = _decode_items(_list(content), level + 1)
                if not isinstance(name, str):
                    raise TypeError(f"expected the name of a class, found {name!r}")
                _check_plain(member)
                return EnumRef(name, member)
            case "$wrapper":
                return _decode_wrapper(content, level)
            case "$tensor" | "$ndarray" if isinstance(content, str):
                return TensorRef(content, ndarray=tag == "$ndarray")
            case "$per_rank" if isinstance(content, str):
                return PerRankRef(content)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise _InvalidError(f"has an invalid {tag}: {_short(error)}") from error
    raise _InvalidError(
        f"has the entry type {tag[:80]!r}, which this version does not know; "
        "read this checkpoint with a newer shardckpt"
    )


def _decode_mapping(content: list[Any], level: int) -> Any:
    name, form, *factory = content
    made = _decode(form, level)
    if type(made) is not dict:
        raise TypeError(f"expected a dict, found {form!r}")
    if name == "defaultdict":
        (what,) = factory
        return defaultdict(FACTORIES[what], made)
    if factory or name not in ("OrderedDict", "Counter"):
        raise ValueError(f"no class {name!r}")
    return OrderedDict(made) if name == "OrderedDict" else Counter(made)


def _decode_deque(content: list[Any], level: int) -> deque[Any]:
    items, length = content
    if length is not None and (type(length) is not int or length < len(_list(items))):
        raise ValueError(f"expected a length, found {length!r}")
    return deque(_decode_items(_list(items), level + 1), length)


def _decode_set(content: list[Any], level: int, kind: type) -> Any:
    _check_level(level + 1)
    items = [_decode_key(item, level) for item in content]
    return kind(_dict([(item, None) for item in items], items))


def _decode_wrapper(content: Any, level: int) -> WrapperRef:
    if not isinstance(content, dict) or set(content) != _WRAPPER_KEYS:
        raise ValueError(f"expected the keys {', '.join(sorted(_WRAPPER_KEYS))}")
    if not isinstance(content["type"], str) or not isinstance(content["dtype"], str):
        raise TypeError("expected the names of a class and of a type")
    numbers = [_list(content["shape"]), *map(_list, _list(content["sharding"]))]
    if not all(type(n) is int and 0 <= n < INT64 for row in numbers for n in row):
        raise TypeError("expected integers from 0 to 2^63 - 1")
    if len(numbers) > 1 + _MOST_SPLITS or not all(len(split) == 3 for split in numbers[1:]):
        raise ValueError(
            f"expected a dimension, parts and a factor of each of at most {_MOST_SPLITS} splits"
        )
    shards = math.prod(parts for _, parts, _ in numbers[1:])
    tensors = _decode_object(content["tensors"], level + 1)
    for name, part in tensors.items():
        if not all(isinstance(p, TensorRef | WrapperRef) for p in (part if type(part) is list else [part])):
            raise TypeError(f"expected tensors at {name!r}")
        if type(part) is list and len(part) != shards:
            raise ValueError(f"expected {shards} shards at {name!r}, found {len(part)}")
    context = _decode(content["context"], level + 1)
    _check_plain(context)
    return WrapperRef(
        tensors,
        type=content["type"],
        dtype=content["dtype"],
        shape=tuple(numbers[0]),
        sharding=tuple((dim, parts, factor) for dim, parts, factor in numbers[1:]),
        context=context,
    )


def _check_plain(value: Any) -> None:
    """Raise TypeError if `value` has a reference anywhere in it."""
    if next(iter_references(value), None) is not None:
        raise TypeError("it refers to a tensor, or to values of ranks")


def _large_int(content: str) -> int:
    """The integer of this text, which stands for one that does not fit 64 bits."""
    if not _LARGE_INT.fullmatch(content):
        raise ValueError("it is not -0x or 0x with hexadecimal digits, of which the first is not 0")
    value = int(content, 16)
    if -INT64 <= value < INT64:
        raise ValueError("it fits 64 bits, and is to be a plain number")
    return value


def _list(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise TypeError(f"expected a list, found {content!r}")
    return content


def _decode_key(key: Any, level: int) -> Any:
    """A dict's key or a set's item. Raises TypeError if it cannot be hashed."""
    if isinstance(key, list) or (isinstance(key, dict) and not _KEY_TAGS.intersection(key)):
        raise TypeError(f"unhashable key: {key!r}")
    found = _decode(key, level)
    if isinstance(found, tuple):
        _check_plain(found)
    return found


def _dict(pairs: list[tuple[Any, Any]], values: list[Any]) -> dict[Any, Any]:
    """The dict of the keys of `pairs` and these values. Raises ValueError for a key that occurs twice."""
    keys = [key for key, _ in pairs]
    if max(Counter(map(hash, keys)).values(), default=0) > _MOST_COLLIDING:
        raise ValueError("its keys are made to be slow")
    made = dict(zip(keys, values, strict=True))
    if len(made) < len(values):
        raise ValueError("a key occurs twice")
    return made


def _short(error: Exception) -> str:
    text = repr(error)
    return text if len(text) <= 200 else f"{text[:200]}..."
