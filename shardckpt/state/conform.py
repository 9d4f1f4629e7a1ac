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


def conform(value: Any, live: Any, path: str) -> Any:
    """`value`, which was saved at `path`, in the type of `live`, which the state has there.

    If the two types are unrelated, it is returned as it was saved. Raises StateError for a member that the
    state's enum lacks, for a member where the state has none, and for named tuples with different names.
    """
    if isinstance(value, EnumRef) or (isinstance(live, Enum) and isinstance(value, (int, str, float))):
        return _member(value, live, path)
    if isinstance(live, np.generic) and isinstance(value, (bool, int, float, complex)):
        return _scalar(value, live)
    if type(value) in _BUILTIN and type(live) not in (bool, type(value)) and isinstance(live, type(value)):
        return _of_subclass(value, live)
    if isinstance(value, Record) and hasattr(type(live), "_make"):
        if value._fields != live._fields:
            raise StateError(
                f"state[{path!r}] is a {type(live).__qualname__} of {', '.join(live._fields)}, but in the "
                f"checkpoint it has {', '.join(value._fields)}. Pass one as it was when it was saved."
            )
        return type(live)._make(value)
    for plain in (dict, list, deque):
        if isinstance(live, plain) and isinstance(value, plain) and type(live) is not plain:
            return _filled(live, value)
    return value


def _member(value: Any, live: Any, path: str) -> Any:
    """The member of the state's enum that has this value."""
    if not isinstance(live, Enum):
        raise StateError(
            f"state[{path!r}] was saved as the member {value.value!r} of the enum {value.type}, and is "
            f"{live!r} here. A checkpoint has no classes: pass any member of that enum there."
        )
    plain = value.value if isinstance(value, EnumRef) else value
    try:
        return type(live)(plain)
    except ValueError as error:
        raise StateError(
            f"state[{path!r}] is a {type(live).__qualname__}, which has no member of the value {plain!r} "
            "that was saved. Pass a member of the enum as it was then."
        ) from error


def _scalar(value: complex, live: np.generic) -> Any:
    """The value as a NumPy scalar of the type of `live`, if that represents it exactly."""
    try:
        made = live.dtype.type(value)
    except (OverflowError, TypeError, ValueError):
        return value
    return made if made == value or (made != made and value != value) else value


def _of_subclass(value: Any, live: Any) -> Any:
    """The value in the class of `live`, a subclass of a number or text, if it stays equal."""
    try:
        made = type(live)(value)
    except Exception:  # of the user's own code
        return value
    return made if type(made) is type(live) and made == value else value


def _filled(live: Any, value: Any) -> Any:
    """A copy of `live` with the content of `value`: a defaultdict, for example, keeps its factory."""
    if type(value) is type(live) and not hasattr(live, "default_factory"):
        return value
    made = copy.copy(live)
    made.clear()
    if isinstance(made, dict):
        dict.update(made, value)
    else:
        made.extend(value)
    return made
