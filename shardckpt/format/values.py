"""Plain values as data: the JSON form of everything in a state that is not a tensor.

Numbers, strings, lists, None and dicts with string keys are themselves. What JSON lacks is an object
with one key that begins with `$`:

    {"$tuple": [..]}   {"$bytes": "base64"}   {"$float": "nan" | "inf" | "-inf"}   {"$int": "hexadecimal"}
    {"$dict": [[key, value], ..]}     a dict with keys that are not strings, or that begin with $
    {"$mapping": [class, dict]}       an OrderedDict, a Counter, or a defaultdict (then a third item)
    {"$namedtuple": {name: value}}    {"$deque": [[..], maxlen]}   {"$set": [..]}   {"$frozenset": [..]}
    {"$complex": [real, imaginary]}
    {"$enum": [class, value]}         a member of an Enum that is neither a number nor a string
    {"$tensor": "name"}               a tensor of this checkpoint
    {"$ndarray": "name"}              the same, and it was a NumPy array
    {"$wrapper": {..}}                a tensor subclass that consists of other tensors
    {"$per_rank": "path"}             a value that every rank has its own of

and those of `shardckpt.format.kinds`. Reading values executes and imports nothing, and unpickles nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from shardckpt.errors import FormatError, UnsupportedValueError
from shardckpt.format.kinds import KEY_KINDS, kind_of, kinds
from shardckpt.format.tree import (
    EnumRef,
    PerRankRef,
    Record,
    TensorRef,
    WrapperRef,
    children,
    iter_references,
    rebuilt,
)

__all__ = [
    "MAX_DEPTH",
    "EnumRef",
    "PerRankRef",
    "Record",
    "TensorRef",
    "WrapperRef",
    "children",
    "decode",
    "encode",
    "form_of",
    "iter_references",
    "join",
    "join_shown",
    "key_text",
    "rebuilt",
    "segment",
]

_INT64 = 1 << 63
_LARGE_INT = re.compile("-?0x[1-9a-f][0-9a-f]*")
_KEY_TAGS = KEY_KINDS | {"$tuple", "$bytes", "$float", "$int", "$complex", "$frozenset", "$namedtuple"}

_WRAPPER_KEYS = {"type", "dtype", "shape", "sharding", "context", "tensors"}

_MOST_SPLITS = 64
"""Of a sharded wrapper: one for each dimension of a mesh, which is a tensor."""

_LONGEST_SHOWN = 2000
_MOST_COLLIDING = 1024
"""Keys of one hash in a dict: with more, which only a forger finds, it would take quadratic time to fill."""

MAX_DEPTH = 100
"""Levels of nesting: more would exhaust the recursion of JSON parsers."""


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


def key_text(key: object, path: str) -> str:
    """The text of `key`, of a dict at `path`.

    Raises UnsupportedValueError for an integer of more than some thousand digits, which Python does not write.
    """
    try:
        return str(key)
    except ValueError as error:
        raise UnsupportedValueError(
            f"state[{path!r}] has a key that cannot be written: {error}. Choose another key."
        ) from error


def join(path: str, key: object) -> str:
    """The name of what lies under `key` at `path`."""
    return f"{path}/{segment(key)}" if path else segment(key)


def join_shown(path: str, key: object) -> str:
    """`join`, where the name is for people: one that is too long to be read is shortened.

    So that a key of a megabyte is not repeated for each of the many values that may lie below it.
    """
    joined = join(path, key)
    if len(joined) <= _LONGEST_SHOWN:
        return joined
    digest = hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{joined[:100]}...{digest}...{joined[-100:]}"


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
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if path.count("/") >= MAX_DEPTH:
        raise UnsupportedValueError(
            f"state[{path!r}] lies {MAX_DEPTH} levels deep. Does it contain itself? Flatten it."
        )
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, leaf)
    if (
        isinstance(value, (list, tuple, deque))
        and (found := _encode_sequence(value, path, leaf)) is not None
    ):
        return found
    if (kind := kind_of(type(value))) is not None:
        try:
            content = kind.write(value)
        except ValueError as error:
            raise UnsupportedValueError(
                f"state[{path!r}] is {value!r}, which cannot be stored: {error}. Convert it, or leave it out."
            ) from error
        return {kind.tag: _checked_text(content, path) if isinstance(content, str) else content}
    if type(value) is complex:
        return {"$complex": [encode(value.real, path), encode(value.imag, path)]}
    if type(value) in (set, frozenset):
        items = [_encode_hashable(item, f"{path} (an item)") for item in value]
        # sorted, since ranks must agree, and the order of a set depends on the seed of hash()
        by_text = {json.dumps(item, sort_keys=True): item for item in items}
        if len(by_text) < len(items):
            raise UnsupportedValueError(
                f"state[{path!r}] is a set with two items of one form, such as two NaNs"
            )
        return {f"${type(value).__name__}": [by_text[text] for text in sorted(by_text)]}
    if isinstance(value, Enum):
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"$enum": [name, encode(value.value, path)]}
    if leaf is not None and (encoded := leaf(value, path)) is not NotImplemented:
        return encoded
    raise UnsupportedValueError(
        f"state[{path!r}] is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored "
        "as data. Storable: tensors, NumPy arrays, numbers, strings, bytes, None, lists, tuples, dicts, sets, "
        "enum members, dates, paths, torch's types and devices, "
        "and objects with state_dict() and load_state_dict(). Convert it, or leave it out."
    )


def _encode_hashable(value: Any, path: str) -> Any:
    """The form of a key or of a set's item, where no live object says which class it has."""
    form = encode(value, path)
    _check_no_member(value, path)
    return form


def _check_no_member(value: Any, path: str) -> None:
    """Raise UnsupportedValueError for a member of an enum that `encode` stores as one, at any depth."""
    if isinstance(value, Enum) and not isinstance(value, (int, str, float)):
        raise UnsupportedValueError(
            f"state[{path!r}] is the member {value} of an enum, which can be stored as a value only, not as a "
            "key or in a set. Pass its value or its name."
        )
    if isinstance(value, (tuple, frozenset)):
        for item in value:
            _check_no_member(item, path)


def form_of(reference: TensorRef | WrapperRef) -> Any:
    """The JSON form of a reference to a tensor, or of several."""
    if isinstance(reference, TensorRef):
        return {"$ndarray" if reference.ndarray else "$tensor": reference.name}
    return {
        "$wrapper": {
            "type": reference.type,
            "dtype": reference.dtype,
            "shape": list(reference.shape),
            "sharding": [list(split) for split in reference.sharding],
            "context": encode(reference.context, "the context"),
            "tensors": {
                name: [form_of(r) for r in part] if isinstance(part, list) else form_of(part)
                for name, part in reference.items()
            },
        }
    }


def _encode_mapping(value: Mapping[Any, Any], path: str, leaf: Callable[[Any, str], Any] | None) -> Any:
    _check_distinct(value, path)
    form: Any
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        form = {_checked_text(key, path): encode(v, join(path, key), leaf) for key, v in value.items()}
    else:
        form = {
            "$dict": [
                [_encode_hashable(key, f"{path} (a key)"), encode(v, join(path, key), leaf)]
                for key, v in value.items()
            ]
        }
    if type(value) is OrderedDict or type(value) is Counter:
        return {"$mapping": [type(value).__name__, form]}
    if type(value) is defaultdict:
        factory = next((name for name, made in _FACTORIES.items() if made is value.default_factory), None)
        return {"$mapping": ["defaultdict", form, factory]}
    return form


def _encode_sequence(
    value: list[Any] | tuple[Any, ...] | deque[Any], path: str, leaf: Callable[[Any, str], Any] | None
) -> Any:
    """None for a kind of tuple that has a form of its own, or none at all."""
    names = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    if isinstance(value, tuple) and type(value) is not tuple and names is None:
        return None
    items = [encode(v, join(path, i), leaf) for i, v in enumerate(value)]
    if names is not None:
        return {"$namedtuple": dict(zip(names, items, strict=True))}
    if isinstance(value, deque):
        return {"$deque": [items, value.maxlen]}
    return items if isinstance(value, list) else {"$tuple": items}


_FACTORIES: dict[str | None, Any] = {
    **{made.__name__: made for made in (list, dict, int, float, set, str, tuple, bool, bytes)},
    None: None,
}
"""What a defaultdict may make, by name. One that makes anything else comes back with None."""


def decode(value: Any) -> Any:
    """The value of a JSON form; tensors become TensorRef, per-rank values PerRankRef.

    Raises FormatError for what no `encode` makes: a tag that this version does not know, or a wrong content.
    """
    try:
        return _decode(value, 0)
    except _InvalidError as error:
        path = "/".join(segment(key)[:80] for key in reversed(error.keys[-8:]))
        raise FormatError(f"values: {path!r} {error}") from error.__cause__
    except RecursionError as error:
        raise FormatError(f"values: they lie more than {MAX_DEPTH} levels deep") from error


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
    return _decode_object(value, level + 1)


def _decode_object(content: Any, level: int) -> dict[str, Any]:
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
    try:
        if (kind := kinds(tag)) is not None:
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
        return defaultdict(_FACTORIES[what], made)
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
    if not all(type(n) is int and 0 <= n < _INT64 for row in numbers for n in row):
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
    if next(iter_references(value), None) is not None:
        raise TypeError("it refers to a tensor, or to values of ranks")


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
        raise TypeError(f"unhashable key: {key!r}")
    found = _decode(key, level)
    if isinstance(found, tuple):
        _check_plain(found)
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
        if (name := segment(key if isinstance(key, str) else key_text(key, path))) in seen:
            raise UnsupportedValueError(
                f"state[{path!r}] has the keys {seen[name]!r} and {key!r}, which would share the name "
                f"{name!r}. Rename one of them."
            )
        seen[name] = key
