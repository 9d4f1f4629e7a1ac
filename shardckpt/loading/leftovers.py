"""Leftovers: what a failed load has left in a state, until another one overwrites it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardckpt.errors import ShardckptError, StateError
from shardckpt.state.load_targets import LoadTargets

__all__ = ["Leftovers"]


class Leftovers:
    """The entries of a state that loads have begun to write to on this rank, and have not filled."""

    def __init__(self) -> None:
        self._entries: set[str] = set()
        self._untouched: set[str] | None = None

    def add(self, targets: LoadTargets) -> None:
        """A load begins to write to its targets."""
        untouched = {*targets.missing, *targets.kept}
        self._untouched = untouched if self._untouched is None else self._untouched & untouched
        self._entries |= targets.live_entries

    def clear(self) -> None:
        """A load has filled its targets."""
        self._entries.clear()
        self._untouched = None

    def check(self, targets: LoadTargets) -> None:
        """Raise StateError if a load of these targets would not overwrite all that earlier ones wrote to."""
        if self._untouched is None:
            return
        for path in (*targets.missing, *targets.kept):
            if not any(path == other or path.startswith(f"{other}/") for other in self._untouched):
                raise StateError(
                    f"this checkpoint has no value for state[{path!r}], which a newer one that is damaged has "
                    "partly filled"
                )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Have errors of the block say what is partly filled."""
        try:
            yield
        except Exception as error:
            if self._entries:
                names = ", ".join(map(repr, sorted(self._entries)))
                text = f"The state is partly loaded: do not go on with its entries {names}."
                if isinstance(error, ShardckptError):
                    error.args = (f"{str(error).rstrip('.')}. {text}",)
                else:
                    error.add_note(text)
            raise
