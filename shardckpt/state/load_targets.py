"""LoadTargets: what a load fills, and what it does once everything is verified, and once everything is filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shardckpt.errors import StateError
from shardckpt.progress import doing
from shardckpt.state.tensors import TensorShard

__all__ = ["LoadTargets", "Undo"]

Undo = Callable[[], object]
"""Reverts what an action has changed."""


@dataclass
class LoadTargets:
    """What a load fills.

    Call `prepare` when all new memory is filled and before any memory of the state is, `begin` after it, and
    `apply` when every tensor is filled. If the load fails in between, on this rank or another, call `undo`.

    Attributes:
        tensors: memory to fill: the state's own, and new memory that `apply` hands to the state's objects.
        missing: names in the state that the checkpoint lacks.
        unexpected: names in the checkpoint that an object of the state lacks.
        unused: top-level names of the checkpoint that the state does not have.
        kept: paths of PerRank values that this rank keeps, since fewer ranks saved the checkpoint.
        live: tensors of the state that are filled in place.
        live_entries: the state's top-level entries that have such tensors.
        on_verified: (path, action) of what `prepare` does; an action may return what reverts it.
        on_filled: (path, action) of what `apply` does.
    """

    tensors: list[TensorShard] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    live: list[torch.Tensor] = field(default_factory=list)
    live_entries: set[str] = field(default_factory=set)
    on_verified: list[tuple[str, Callable[[], Undo | None]]] = field(default_factory=list)
    on_filled: list[tuple[str, Callable[[], object]]] = field(default_factory=list)
    _undo: list[Undo] = field(default_factory=list)

    def prepare(self) -> None:
        """Do everything that may still refuse the checkpoint. Raises StateError and others; `undo` reverts it."""
        for path, action in self.on_verified:
            with doing(f"load_state_dict of {path!r}"):
                undo = action()
            if undo is not None:
                self._undo.append(undo)

    def undo(self) -> None:
        """Revert what `prepare` has changed."""
        while self._undo:
            self._undo.pop()()

    def begin(self) -> None:
        """Tell autograd that tensors of the state are about to be written to."""
        torch.autograd.graph.increment_version(self.live)

    def apply(self) -> None:
        """Hand what was loaded to the state's objects, once. Raises StateError if one does not accept it."""
        for path, action in self.on_filled:
            try:
                with doing(f"load_state_dict of {path!r}"):  # reported if the user's code hangs
                    action()
            except Exception as error:
                raise StateError(
                    f"state[{path!r}] did not accept what was loaded: {type(error).__name__}: {error}. "
                    "The state is partly loaded: do not go on with it."
                ) from error
