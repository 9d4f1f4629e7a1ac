"""Plain values as data: the JSON form of everything in a state that is not a tensor.

Numbers, strings, lists, None and dicts with string keys are themselves. What JSON lacks is an object
with one key that begins with `$`:

    {"$tuple": [..]}   {"$bytes": "base64"}   {"$float": "nan" | "inf" | "-inf"}   {"$int": "hexadecimal"}
    {"$dict": [[key, value], ..]}     a dict with keys that are not strings, or that begin with $
    {"$tensor": "name"}               a tensor of this checkpoint
    {"$ndarray": "name"}              the same, and it was a NumPy array
    {"$per_rank": "path"}             a value that every rank has its own of

Nothing is ever executed when values are read, and there is no pickle.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from shardckpt.errors import FormatError, UnsupportedValueError

__all__ = ["MAX_DEPTH", "PerRankRef", "TensorRef", "decode", "encode", "iter_references", "join", "segment"]

_INT64 = 1 << 63
_LARGE_INT = re.compile("-?0x[1-9a-f][0-9a-f]*")
_KEY_TAGS = frozenset(("$tuple", "$bytes", "$float", "$int"))

_MOST_COLLIDING = 1024
"""Keys of one hash in a dict: with more, which only a forger finds, it would take quadratic time to fill."""

MAX_DEPTH = 100
"""Levels of nesting: more would exhaust the recursion of JSON parsers."""


class TensorRef:
    """Stands in a tree of values for a tensor: its name, and whether NumPy or torch should have it."""

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
    """Stands in a tree of values for a value that every rank has its own of; `path` is its place."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"PerRankRef({self.path!r})"


def segment(key: object) -> str:
    """One part of a tensor's name: `key` as text that is also a legal Zarr node name.

    Slashes, control characters and what Zarr reserves are percent-encoded, so different keys of one
    dict have different segments.
    """
    return _segment_of_text(_plain(key) if isinstance(key, str) else str(key))


@lru_cache(maxsize=1 << 16)
def _segment_of_text(text: str) -> str:
    encoded = quote(text, safe=" !$&'()*+,;=:@[]{}<>|^`\"#?~", encoding="utf-8", errors="surrogatepass")
    if not encoded.strip(".") or encoded.startswith("__"):
        encoded = "".join(f"%{byte:02X}" for byte in text[:1].encode() or b"\0") + encoded[1:]
    return encoded if encoded != "zarr.json" else "%7Aarr.json"


def join(path: str, key: object) -> str:
    """The name of what lies under `key` at `path`."""
    return f"{path}/{segment(key)}" if path else segment(key)


def encode(value: Any, path: str, leaf: Callable[[Any, str], Any] | None = None) -> Any:
    """The JSON form of `value`, which lies at `path` of the state.

    `leaf` may turn a value that is not plain into its JSON form; it returns NotImplemented for what it
    does not know. Raises UnsupportedValueError, which names the path, for anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked_text(value, path)
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if path.count("/") >= MAX_DEPTH:
        raise UnsupportedValueError(
            f"state[{path!r}] lies {MAX_DEPTH} levels deep. Does it contain itself? Flatten it."
        )
    if isinstance(value, Mapping):
        _check_distinct(value, path)
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {_checked_text(key, path): encode(v, join(path, key), leaf) for key, v in value.items()}
        return {
            "$dict": [
                [encode(key, f"{path} (a key)"), encode(v, join(path, key), leaf)]
                for key, v in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [encode(v, join(path, i), leaf) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if leaf is not None and (encoded := leaf(value, path)) is not NotImplemented:
        return encoded
    raise UnsupportedValueError(
        f"state[{path!r}] is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored "
        "as data. Storable: tensors, NumPy arrays, numbers, strings, bytes, None, lists, tuples, dicts, "
        "and objects with state_dict() and load_state_dict(). Convert it, or leave it out."
    )


def decode(value: Any) -> Any:
    """The value of a JSON form; tensors become TensorRef, per-rank values PerRankRef.

    Raises FormatError for what no `encode` makes: a tag that this version does not know, or a wrong content.
    """
    try:
        return _decode(value, 0)
    except _InvalidError as error:
        path = "/".join(segment(key)[:80] for key in reversed(error.keys[-8:]))
        raise FormatError(f"values: {path!r} {error}") from error.__cause__


def iter_references(value: Any) -> Iterator[TensorRef | PerRankRef]:
    """Every reference in a decoded value, in order."""
    if isinstance(value, TensorRef | PerRankRef):
        yield value
        return
    waiting = [iter((value,))]
    while waiting:
        for item in waiting[-1]:
            if isinstance(item, dict):
                waiting.append(iter(item.values()))
                break
            if isinstance(item, list | tuple):
                waiting.append(iter(item))
                break
            if isinstance(item, TensorRef | PerRankRef):
                yield item
        else:
            waiting.pop()


class _InvalidError(Exception):
    """What is wrong with a value, and the keys that lead to it, the last one first.

    They are gathered on the way up, so that nobody builds the path of a value with which nothing is wrong.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.keys: list[object] = []


def _decode(value: Any, level: int) -> Any:
    if isinstance(value, list):
        return _decode_items(value, level + 1)
    if isinstance(value, int) and not isinstance(value, bool) and not -_INT64 <= value < _INT64:
        raise _InvalidError("is an integer that does not fit 64 bits, which is written as $int")
    if not isinstance(value, dict):
        return value
    for tag in value:
        if tag.startswith("$"):
            return _decode_tagged(tag if len(value) == 1 else ", ".join(value), value[tag], level)
    _check_level(level + 1)
    done: dict[str, Any] = {}
    key = ""
    try:
        for key, item in value.items():
            done[key] = _decode(item, level + 1)
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
    try:
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
                return _dict(pairs, _decode_items([value for _, value in pairs], level + 1))
            case "$tensor" | "$ndarray" if isinstance(content, str):
                return TensorRef(content, ndarray=tag == "$ndarray")
            case "$per_rank" if isinstance(content, str):
                return PerRankRef(content)
    except (KeyError, TypeError, ValueError) as error:
        raise _InvalidError(f"has an invalid {tag}: {_short(error)}") from error
    raise _InvalidError(
        f"has the entry type {tag[:80]!r}, which this version does not know; "
        "read this checkpoint with a newer shardckpt"
    )


def _large_int(content: str) -> int:
    """The integer of this text, which `encode` writes where 64 bits are too few."""
    if not _LARGE_INT.fullmatch(content):
        raise ValueError("it is not -0x or 0x with hexadecimal digits, of which the first is not 0")
    value = int(content, 16)
    if -_INT64 <= value < _INT64:
        raise ValueError("it fits 64 bits, and is to be a plain number")
    return value


def _list(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise TypeError(f"expected a list, found {content!r}")
    return content


def _decode_key(key: Any, level: int) -> Any:
    if isinstance(key, list) or (isinstance(key, dict) and not _KEY_TAGS.intersection(key)):
        raise TypeError("unhashable key: it must be a number, a text, bytes, None or a tuple of these")
    found = _decode(key, level)
    if isinstance(found, tuple) and next(iter_references(found), None) is not None:
        raise TypeError("a key that refers to a tensor")
    return found


def _dict(pairs: list[tuple[Any, Any]], values: list[Any]) -> dict[Any, Any]:
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


def _plain(text: str) -> str:
    """The characters of `text`, also if it is a member of an Enum, which has a text of its own."""
    return str.__str__(text)


def _checked_text(text: str, path: str) -> str:
    """`text`, which JSON can hold if it is Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedValueError(
            f"state[{path!r}] holds a text that is not Unicode: {error}. Store it as bytes."
        ) from error
    return _plain(text)


def _check_distinct(value: Mapping[Any, Any], path: str) -> None:
    """Two keys must not share a name: 1 and "1" in one dict would."""
    seen: dict[str, object] = {}
    for key in value:
        if (name := segment(key)) in seen:
            raise UnsupportedValueError(
                f"state[{path!r}] has the keys {seen[name]!r} and {key!r}, which would share the name "
                f"{name!r}. Rename one of them."
            )
        seen[name] = key
