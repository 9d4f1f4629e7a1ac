"""Unflatten: from a manifest and a state to what a load fills, and how it is handed to the state's objects."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from shardckpt.errors import FormatError, MissingKeysError, StateError
from shardckpt.format.manifest import Manifest
from shardckpt.format.names import join
from shardckpt.format.tree import MAX_DEPTH, PerRankRef, Record
from shardckpt.format.value_decoding import decode_value
from shardckpt.state.conform import conform
from shardckpt.state.flatten import PerRank, check_state, per_rank_path
from shardckpt.state.load_targets import LoadTargets
from shardckpt.state.module_targets import bind_module
from shardckpt.state.modules import Stateful, is_sharded, iter_modules, parameter_names, reshard
from shardckpt.state.optimizer_targets import bind_optimizer, with_layouts
from shardckpt.state.target_builder import TargetBuilder, mismatch

__all__ = ["bind_state"]

_ABSENT = object()
_LISTED = 8


def bind_state(state: dict[str, Any], manifest: Manifest, rank: int, *, strict: bool) -> LoadTargets:
    """Compare a state with a checkpoint, and return what a load fills on this rank. Changes nothing.

    Args:
        state: as `load` has it.
        manifest: of the checkpoint.
        rank: this rank.
        strict: raise MissingKeysError if names below a top-level key of the state differ from the checkpoint's.

    Raises ShapeMismatchError and StateError.
    """
    check_state(state)
    modules = dict(iter_modules(state))
    reshard(modules.values())
    builder = TargetBuilder(manifest, cache(lambda: any(map(is_sharded, modules.values()))))
    walk = _Walk(builder, manifest, rank, parameter_names(modules), strict)
    saved = decode_value(manifest.values)
    walk.entries(state, saved, "")
    targets = builder.build()
    targets.unused = [key for key in saved if key not in state]
    if strict and (targets.missing or targets.unexpected):
        raise MissingKeysError(_difference(targets))
    return targets


class _Walk:
    """Walks over a state and, side by side, over what was saved of it."""

    def __init__(
        self,
        builder: TargetBuilder,
        manifest: Manifest,
        rank: int,
        names: Mapping[int, tuple[str, str]],
        strict: bool,
    ) -> None:
        self._builder = builder
        self._manifest = manifest
        self._rank = rank
        self._names = names
        self._strict = strict

    def entries(self, live: Any, saved: Any, path: str) -> None:
        """Bind the entries of a dict or list that contains tensors or objects."""
        is_dict = isinstance(live, Mapping)
        if not isinstance(saved, dict if is_dict else (list, tuple)):
            raise mismatch(path, type(live).__qualname__, saved)
        if isinstance(saved, Record):
            conform(saved, live, path)  # raises if it has other names
        wanted = dict(saved if isinstance(saved, dict) else enumerate(saved))
        for key, value in list(live.items() if is_dict else enumerate(live)):
            self._entry(live, key, value, wanted.pop(key, _ABSENT), join(path, key))
        if path:
            for key, value in wanted.items():
                self._builder.add_unexpected(value, join(path, key))

    def _entry(self, parent: Any, key: Any, live: Any, saved: Any, path: str) -> None:
        if saved is _ABSENT:
            self._builder.add_missing(path)
        elif isinstance(live, PerRank):
            self._per_rank(live, saved, path)
        elif isinstance(live, nn.Module):
            bind_module(self._builder, live, saved, path, strict=self._strict)
        elif isinstance(live, torch.optim.Optimizer):
            bind_optimizer(self._builder, live, saved, path, self._names)
        elif isinstance(live, torch.Tensor):
            self._builder.fill(live, path, saved)
        elif isinstance(live, Stateful) and not isinstance(live, type):
            tree = self._builder.new_value(saved, with_layouts(live, path), path)
            self._builder.on_filled(path, lambda: live.load_state_dict(tree()))
        elif isinstance(live, (Mapping, list, tuple)) and _has_objects(live):
            self.entries(live, saved, path)
        else:
            self._value(parent, key, live, saved, path)

    def _value(self, parent: Any, key: Any, live: Any, saved: Any, path: str) -> None:
        """Bind plain data: it is refilled, or replaces the live value."""
        if not isinstance(parent, tuple):
            made = self._builder.refilled_value(saved, live, path)
            self._builder.on_filled(path, lambda: parent.__setitem__(key, made()))
        elif self._builder.is_refillable(live, saved):
            self._builder.on_filled(path, self._builder.refilled_value(saved, live, path))
        elif isinstance(live, tuple) and isinstance(saved, tuple) and len(live) == len(saved):
            self.entries(live, saved, path)
        elif repr(saved := conform(saved, live, path)) != repr(live):
            raise StateError(
                f"state[{path!r}] is {live!r} in a tuple, which cannot be changed, and {saved!r} in the "
                "checkpoint. Use a list instead of the tuple."
            )

    def _per_rank(self, live: PerRank, saved: Any, path: str) -> None:
        if not isinstance(saved, PerRankRef):
            raise mismatch(path, "PerRank", saved)
        saved_values = {}
        if self._rank < self._manifest.world_size:
            saved_values = self._manifest.per_rank[self._rank]
        if not saved_values:  # a smaller world saved it, perhaps resharded since
            self._builder.targets.kept.append(path)
            return
        if saved.path not in saved_values:
            raise FormatError(f"the checkpoint lacks rank {self._rank}'s value of state[{path!r}]")
        content = decode_value(saved_values[saved.path])
        holder = {"value": live.value}
        self._entry(holder, "value", live.value, content, per_rank_path(path, self._rank))
        self._builder.on_filled(path, lambda: setattr(live, "value", holder["value"]))


def _has_objects(live: Any, depth: int = 0) -> bool:
    """True if the container has a tensor or an object in it, which is loaded into and not just replaced."""
    if depth > MAX_DEPTH:  # it contains itself
        return False
    if isinstance(live, Mapping):
        return any(_has_objects(value, depth + 1) for value in live.values())
    if isinstance(live, (list, tuple)):
        return any(_has_objects(value, depth + 1) for value in live)
    return isinstance(live, (torch.Tensor, PerRank)) or (
        isinstance(live, Stateful) and not isinstance(live, type)
    )


def _difference(targets: LoadTargets) -> str:
    """Which names only one side has, for a message."""
    lines = ["the state and the checkpoint do not have the same names."]
    for names, what in (
        (targets.missing, "in the state but not in the checkpoint"),
        (targets.unexpected, "in the checkpoint but not in the state"),
    ):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:_LISTED])}{more}")
    lines.append(
        "Nothing was loaded. With strict=False what both have is loaded, and the rest is reported."
    )
    return "\n".join(lines)
