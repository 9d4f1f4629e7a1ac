"""Conform: convert a loaded value to the type that the state has at its place.

The format has numbers, texts, lists and dicts, but no classes of the user's. A member of an enum, a NumPy scalar
or a dict of another class gets its type from the live object that it replaces.
"""

from __future__ import annotations

import copy
from collections import deque
from enum import Enum
from typing import Any

import numpy as np

from shardckpt.errors import StateError
from shardckpt.format.tree import EnumRef, Record

__all__ = ["conform"]

_BUILTIN = (int, float, str, bytes)
"""Types as which numbers and texts of subclasses are saved."""


def conform(value: Any, held: Any, path: str) -> Any:
    """`value`, which was saved at `path`, in the type of `held`, which the state has there.

    If the two types are unrelated, it is returned as it was saved. Raises StateError for a member that the
    state's enum lacks, for a member where the state has none, and for named tuples with different names.
    """
    if isinstance(value, EnumRef) or (isinstance(held, Enum) and isinstance(value, (int, str, float))):
        return _member(value, held, path)
    if isinstance(held, np.generic) and isinstance(value, (bool, int, float, complex)):
        return _scalar(value, held)
    if type(value) in _BUILTIN and type(held) not in (bool, type(value)) and isinstance(held, type(value)):
        return _of_subclass(value, held)
    if isinstance(value, Record) and hasattr(type(held), "_make"):
        if value._fields != held._fields:
            raise StateError(
                f"state[{path!r}] is a {type(held).__qualname__} of {', '.join(held._fields)}, but in the "
                f"checkpoint it has {', '.join(value._fields)}. Pass one as it was when it was saved."
            )
        return type(held)._make(value)
    for plain in (dict, list, deque):
        if isinstance(held, plain) and isinstance(value, plain) and type(held) is not plain:
            return _filled(held, value)
    return value


def _member(value: Any, held: Any, path: str) -> Any:
    """The member of the state's enum that has this value."""
    if not isinstance(held, Enum):
        raise StateError(
            f"state[{path!r}] was saved as the member {value.value!r} of the enum {value.type}, and is "
            f"{held!r} here. A checkpoint has no classes: pass any member of that enum there."
        )
    plain = value.value if isinstance(value, EnumRef) else value
    try:
        return type(held)(plain)
    except ValueError as error:
        raise StateError(
            f"state[{path!r}] is a {type(held).__qualname__}, which has no member of the value {plain!r} "
            "that was saved. Pass a member of the enum as it was then."
        ) from error


def _scalar(value: complex, held: np.generic) -> Any:
    """The value as a NumPy scalar of the type of `held`, if that represents it exactly."""
    try:
        made = held.dtype.type(value)
    except (OverflowError, TypeError, ValueError):
        return value
    return made if made == value or (made != made and value != value) else value


def _of_subclass(value: Any, held: Any) -> Any:
    """The value in the class of `held`, a subclass of a number or text, if it stays equal."""
    try:
        made = type(held)(value)
    except Exception:  # of the user's own code
        return value
    return made if type(made) is type(held) and made == value else value


def _filled(held: Any, value: Any) -> Any:
    """A copy of `held` with the content of `value`: a defaultdict, for example, keeps its factory."""
    if type(value) is type(held) and not hasattr(held, "default_factory"):
        return value
    made = copy.copy(held)
    made.clear()
    if isinstance(made, dict):
        dict.update(made, value)
    else:
        made.extend(value)
    return made
