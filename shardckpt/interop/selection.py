"""What of a checkpoint is exported, and under which names. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardckpt.errors import MissingKeysError, StateError
from shardckpt.format.manifest import Manifest, TensorEntry, tied_names
from shardckpt.format.names import segment
from shardckpt.format.tree import PerRankRef, TensorRef, children, rebuilt
from shardckpt.format.value_decoding import decode_value
from shardckpt.interop.formats.base import Selection

__all__ = ["select"]


def select(manifest: Manifest, only: str | None, patterns: Sequence[str], url: str) -> Selection:
    """Select a part of a state.

    Args:
        manifest: the checkpoint's.
        only: a path into the state; what lies there becomes the whole, with names as it has them itself.
        patterns: globs; only tensors whose name, below `only`, matches one. The tree is then a flat dict.
        url: the checkpoint's, for messages.

    Raises MissingKeysError if `only` or a pattern matches nothing; StateError if two tensors get one name.
    """
    state = _subtree(manifest, decode_value(manifest.values), only)
    tensors = _matching(_named(manifest, state, only), patterns, url)
    tree = {name: TensorRef(tensor.name) for name, tensor in tensors.items()} if patterns else state
    return Selection(
        step=manifest.step,
        tree=tree,
        tensors=tensors,
        entries={tensor.name: tensor for tensor in manifest.tensors},
        tied=tied_names(manifest),
    )


def _subtree(manifest: Manifest, state: Any, only: str | None) -> Any:
    """What lies at the path `only` of the state, with per-rank values as lists by rank."""
    found = _with_ranks(state, manifest)
    for number, part in enumerate(only.strip("/").split("/") if only else ()):
        below = {segment(key): value for key, value in children(found)}
        if part not in below:
            place = "/".join(str(only).strip("/").split("/")[:number])
            names = ", ".join(list(below)[:8]) + (" ..." if len(below) > 8 else "")
            there = f"{place or 'the state'} has {names or 'nothing below it'}"
            raise MissingKeysError(f"nothing is saved at {only!r}: {there}")
        found = below[part]
    return found


def _with_ranks(value: Any, manifest: Manifest) -> Any:
    if isinstance(value, PerRankRef):
        return [decode_value(values[value.path]) for values in manifest.per_rank if value.path in values]
    items = [_with_ranks(item, manifest) for _, item in children(value)]
    return rebuilt(value, items) if items else value


def _named(manifest: Manifest, state: Any, only: str | None) -> dict[str, TensorEntry]:
    """Every tensor by its new name: its own, or below `only` the keys that lead to it."""
    entries = {tensor.name: tensor for tensor in manifest.tensors}
    if only is None:
        return entries
    named: dict[str, TensorEntry] = {}
    last = only.strip("/").rpartition("/")[2]
    for name, ref in _references(state):
        if (name or last) in named:
            raise StateError(f"two tensors below {only!r} would have the name {name!r}")
        named[name or last] = entries[ref]
    return named


def _references(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[str, str]]:
    """The tensors of a tree: the keys that lead to each, and its name in the checkpoint."""
    if isinstance(value, TensorRef):
        yield "/".join(map(str, keys)), value.name
    else:
        for key, item in children(value):
            yield from _references(item, (*keys, key))


def _matching(
    named: Mapping[str, TensorEntry], patterns: Sequence[str], url: str
) -> dict[str, TensorEntry]:
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in named if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            some = ", ".join(list(named)[:4])
            raise MissingKeysError(
                f"no tensor's name matches {pattern!r}; {url} has {len(named)}, like {some or 'none at all'}"
            )
        chosen |= matching
    return {name: named[name] for name in named if name in chosen} if patterns else dict(named)
