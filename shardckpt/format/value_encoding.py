"""Encode values: the JSON form of everything in a state that is not a tensor.

Numbers, strings, lists, None and dicts with string keys are their own form. What JSON lacks is an object with one
key that begins with `$`:

    {"$tuple": [..]}   {"$bytes": "base64"}   {"$float": "nan" | "inf" | "-inf"}   {"$int": "hexadecimal"}
    {"$dict": [[key, value], ..]}     a dict with keys that are not strings, or that begin with $
    {"$mapping": [class, dict]}       an OrderedDict, a Counter, or a defaultdict (then a third item)
    {"$namedtuple": {name: value}}    {"$deque": [[..], maxlen]}   {"$set": [..]}   {"$frozenset": [..]}
    {"$complex": [real, imaginary]}
    {"$enum": [class, value]}         a member of an Enum that is neither a number nor a string
    {"$tensor": "name"}               a tensor of this checkpoint
    {"$ndarray": "name"}              the same, and it was a NumPy array
    {"$wrapper": {..}}                a tensor subclass that consists of other tensors
    {"$per_rank": "path"}             a value that differs between ranks

and the forms of `shardckpt.format.kinds`. Decoding executes nothing, imports nothing and unpickles nothing.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from shardckpt.errors import UnsupportedValueError
from shardckpt.format.kinds import FACTORIES, INT64, kind_of
from shardckpt.format.names import join, key_text, plain_text, segment
from shardckpt.format.tree import MAX_DEPTH, TensorRef, WrapperRef

__all__ = ["Leaf", "encode_value", "reference_form"]

Leaf = Callable[[Any, str], Any]
"""Given a value that is not plain data, and its path: its JSON form, or NotImplemented if it is unknown."""


def encode_value(value: Any, path: str, leaf: Leaf | None = None) -> Any:
    """The JSON form of `value`, which lies at `path` of the state.

    Args:
        value: plain data, or a container of it.
        path: for error messages; the paths of items are formed from it.
        leaf: called for a value that is not plain data, and for what it contains.

    Raises UnsupportedValueError, which names the path, for a value that has no form.

    >>> encode_value({"rates": (0.5, float("inf")), 3: b"raw"}, "")
    {'$dict': [['rates', {'$tuple': [0.5, {'$float': 'inf'}]}], [3, {'$bytes': 'cmF3'}]]}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked_text(value, path)
    if isinstance(value, int):
        return int(value) if -INT64 <= value < INT64 else {"$int": hex(value)}
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
        return {"$complex": [encode_value(value.real, path), encode_value(value.imag, path)]}
    if type(value) in (set, frozenset):
        return _encode_set(value, path)
    if isinstance(value, Enum):
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"$enum": [name, encode_value(value.value, path)]}
    if leaf is not None and (encoded := leaf(value, path)) is not NotImplemented:
        return encoded
    raise UnsupportedValueError(
        f"state[{path!r}] is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored "
        "as data. Storable: tensors, NumPy arrays, numbers, strings, bytes, None, lists, tuples, dicts, sets, "
        "enum members, dates, paths, torch's types and devices, "
        "and objects with state_dict() and load_state_dict(). Convert it, or leave it out."
    )


def reference_form(reference: TensorRef | WrapperRef) -> Any:
    """The JSON form of a reference to a tensor, or to the tensors that a wrapper subclass consists of."""
    if isinstance(reference, TensorRef):
        return {"$ndarray" if reference.ndarray else "$tensor": reference.name}
    return {
        "$wrapper": {
            "type": reference.type,
            "dtype": reference.dtype,
            "shape": list(reference.shape),
            "sharding": [list(split) for split in reference.sharding],
            "context": encode_value(reference.context, "the context"),
            "tensors": {
                name: [reference_form(r) for r in part] if isinstance(part, list) else reference_form(part)
                for name, part in reference.items()
            },
        }
    }


def _encode_mapping(value: Mapping[Any, Any], path: str, leaf: Leaf | None) -> Any:
    _check_distinct(value, path)
    form: Any
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        form = {
            _checked_text(key, path): encode_value(v, join(path, key), leaf) for key, v in value.items()
        }
    else:
        form = {
            "$dict": [
                [_encode_hashable(key, f"{path} (a key)"), encode_value(v, join(path, key), leaf)]
                for key, v in value.items()
            ]
        }
    if type(value) is OrderedDict or type(value) is Counter:
        return {"$mapping": [type(value).__name__, form]}
    if type(value) is defaultdict:
        factory = next((name for name, made in FACTORIES.items() if made is value.default_factory), None)
        return {"$mapping": ["defaultdict", form, factory]}
    return form


def _encode_sequence(value: list[Any] | tuple[Any, ...] | deque[Any], path: str, leaf: Leaf | None) -> Any:
    """The form of a list, tuple or deque; None for any other subclass of tuple, such as torch.Size."""
    names = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    if isinstance(value, tuple) and type(value) is not tuple and names is None:
        return None
    items = [encode_value(v, join(path, i), leaf) for i, v in enumerate(value)]
    if names is not None:
        return {"$namedtuple": dict(zip(names, items, strict=True))}
    if isinstance(value, deque):
        return {"$deque": [items, value.maxlen]}
    return items if isinstance(value, list) else {"$tuple": items}


def _encode_set(value: set[Any] | frozenset[Any], path: str) -> Any:
    items = [_encode_hashable(item, f"{path} (an item)") for item in value]
    # Sorted, since ranks must agree, and the order of a set depends on the seed of hash().
    by_text = {json.dumps(item, sort_keys=True): item for item in items}
    if len(by_text) < len(items):
        raise UnsupportedValueError(
            f"state[{path!r}] is a set with two items of one form, such as two NaNs"
        )
    return {f"${type(value).__name__}": [by_text[text] for text in sorted(by_text)]}


def _encode_hashable(value: Any, path: str) -> Any:
    """The form of a dict's key or a set's item. A load finds no live object there that tells an enum's class."""
    form = encode_value(value, path)
    _check_no_member(value, path)
    return form


def _check_no_member(value: Any, path: str) -> None:
    """Raise UnsupportedValueError for a member of an enum that is stored as `$enum`, at any depth."""
    if isinstance(value, Enum) and not isinstance(value, (int, str, float)):
        raise UnsupportedValueError(
            f"state[{path!r}] is the member {value} of an enum, which can be stored as a value only, not as a "
            "key or in a set. Pass its value or its name."
        )
    if isinstance(value, (tuple, frozenset)):
        for item in value:
            _check_no_member(item, path)


def _checked_text(text: str, path: str) -> str:
    """The characters of `text`. Raises UnsupportedValueError for lone surrogates, which JSON in UTF-8 lacks."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedValueError(
            f"state[{path!r}] holds a text that is not Unicode: {error}. Store it as bytes."
        ) from error
    return plain_text(text)


def _check_distinct(value: Mapping[Any, Any], path: str) -> None:
    """Raise UnsupportedValueError for two keys that would share a name, as 1 and "1" would."""
    seen: dict[str, object] = {}
    for key in value:
        if (name := segment(key if isinstance(key, str) else key_text(key, path))) in seen:
            raise UnsupportedValueError(
                f"state[{path!r}] has the keys {seen[name]!r} and {key!r}, which would share the name "
                f"{name!r}. Rename one of them."
            )
        seen[name] = key
