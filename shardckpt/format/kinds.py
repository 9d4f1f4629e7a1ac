"""Value types of the standard library and of torch that have a JSON form of their own, by class.

A kind is a constructor of values that cannot contain other values, and its inverse. A subclass is not of its
base's kind: a pandas Timestamp is no datetime. Imports no torch: its types are known if torch is imported
already, and are read as text and tuples otherwise.
"""

from __future__ import annotations

import base64
import datetime
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

__all__ = ["FACTORIES", "INT64", "KEY_KINDS", "Kind", "kind_of", "kind_of_tag"]

INT64 = 1 << 63
"""Integers from -INT64 to INT64 - 1 are JSON numbers; others are written as text."""
_FRACTION = re.compile("-?[0-9]+(/[0-9]+)?")
_DTYPE = re.compile("[a-z0-9_]+")
_DEVICE = re.compile("[a-z0-9_]+(:[0-9]+)?")


FACTORIES: dict[str | None, Any] = {
    **{made.__name__: made for made in (list, dict, int, float, set, str, tuple, bool, bytes)},
    None: None,
}
"""Factories of a defaultdict by name. A defaultdict of any other factory is loaded with None."""


@dataclass(frozen=True)
class Kind:
    """One type of values.

    Attributes:
        tag: the key of its JSON form.
        write: from a value to the content of the form, of JSON's own types. Raises ValueError if the value is not
            pure data.
        read: its inverse. Raises TypeError, ValueError or ArithmeticError for other content.
    """

    tag: str
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def kind_of(cls: type) -> Kind | None:
    """The kind of exactly this class; None if it has none."""
    name = _TORCH_CLASSES.get(cls.__qualname__)
    if name is not None and cls.__module__.partition(".")[0] == "torch":
        return _BY_TAG[name]
    return _BY_CLASS.get(cls)


def kind_of_tag(tag: str) -> Kind | None:
    """The kind with this tag; None if there is none."""
    return _BY_TAG.get(tag)


def _integers(content: Any, count: int, *, optional: bool = False) -> tuple[Any, ...]:
    if not isinstance(content, list) or len(content) != count:
        raise TypeError(f"expected {count} numbers, found {content!r}")
    if not all(_is_int64(n) or (optional and n is None) for n in content):
        raise TypeError(f"expected integers of 64 bits, found {content!r}")
    return tuple(content)


def _is_int64(number: Any) -> bool:
    return type(number) is int and -INT64 <= number < INT64


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError(f"expected a text, found {content!r}")
    return content


def _read_bytes(content: Any) -> bytearray:
    return bytearray(base64.b64decode(content, validate=True))


def _write_slice(value: slice) -> list[int | None]:
    parts = [value.start, value.stop, value.step]
    if not all(n is None or (type(n) is int and abs(n) < INT64) for n in parts):
        raise ValueError("its ends are no integers")
    return parts


def _write_range(value: range) -> list[int]:
    parts = [value.start, value.stop, value.step]
    if not all(abs(n) < INT64 for n in parts):
        raise ValueError("its ends do not fit 64 bits")
    return parts


def _write_time(value: Any) -> str:
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        raise ValueError("its time zone is more than an offset; convert it with astimezone(datetime.UTC)")
    return str(value.isoformat())


def _write_size(value: Any) -> list[int]:
    return [int(n) for n in value]


def _read_size(content: Any) -> Any:
    sizes = _integers(content, len(content) if isinstance(content, list) else -1)
    torch = sys.modules.get("torch")
    return torch.Size(sizes) if torch is not None else sizes


def _read_fraction(content: Any) -> Fraction:
    if not _FRACTION.fullmatch(_text(content)):  # Fraction takes exponents, too, for powers of any size
        raise ValueError("it is not a number, or two with / between them")
    return Fraction(content)


def _read_dtype(content: Any) -> Any:
    torch = sys.modules.get("torch")
    if not _DTYPE.fullmatch(_text(content)):
        raise ValueError("no type")
    if torch is None:
        return f"torch.{content}"
    found = vars(torch).get(content)  # getattr imports what is not there yet
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch {torch.__version__} has no type {content!r}")
    return found


def _read_device(content: Any) -> Any:
    if not _DEVICE.fullmatch(_text(content)):
        raise ValueError("no device")
    torch = sys.modules.get("torch")
    try:
        return torch.device(content) if torch is not None else content
    except RuntimeError as error:
        raise ValueError(f"torch has no such device: {error}") from error


_BY_CLASS: dict[type, Kind] = {
    bytearray: Kind("$bytearray", lambda v: base64.b64encode(v).decode("ascii"), _read_bytes),
    range: Kind("$range", _write_range, lambda c: range(*_integers(c, 3))),
    slice: Kind("$slice", _write_slice, lambda c: slice(*_integers(c, 3, optional=True))),
    type(Path()): Kind("$path", str, lambda c: Path(_text(c))),
    datetime.datetime: Kind("$datetime", _write_time, lambda c: datetime.datetime.fromisoformat(_text(c))),
    datetime.date: Kind("$date", datetime.date.isoformat, lambda c: datetime.date.fromisoformat(_text(c))),
    datetime.time: Kind("$time", _write_time, lambda c: datetime.time.fromisoformat(_text(c))),
    datetime.timedelta: Kind(
        "$timedelta",
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda c: datetime.timedelta(*_integers(c, 3)),
    ),
    Decimal: Kind("$decimal", str, lambda c: Decimal(_text(c))),
    Fraction: Kind("$fraction", str, _read_fraction),
}

_BY_TAG: dict[str, Kind] = {
    **{kind.tag: kind for kind in _BY_CLASS.values()},
    "$size": Kind("$size", _write_size, _read_size),
    "$dtype": Kind("$dtype", lambda v: str(v).removeprefix("torch."), _read_dtype),
    "$device": Kind("$device", str, _read_device),
}

KEY_KINDS = frozenset(_BY_TAG) - {"$bytearray", "$slice"}
"""Tags of the kinds whose values may be keys of a dict, and items of a set."""

_TORCH_CLASSES = {"Size": "$size", "dtype": "$dtype", "device": "$device"}
