"""What a training has not saved: what its last step told, and the saves that failed."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping
from typing import Any

from shardckpt.saving.handle import SaveHandle

__all__ = ["Failures", "Unsaved"]

_log = logging.getLogger("shardckpt")


class Unsaved:
    """What the last call of `step` told and nothing has saved: its arguments.

    Where a Checkpointer ends without `close`, though no error is on its way, that is logged.
    """

    def __init__(self, owner: object, url: str, *, tells: bool) -> None:
        self.arguments: tuple[int, dict[str, Any], Mapping[str, float] | None] | None = None
        weakref.finalize(owner, self._remind, url, tells=tells)

    def _remind(self, url: str, *, tells: bool) -> None:
        if self.arguments is not None and self.arguments[0] and tells and not hasattr(sys, "last_value"):
            _log.warning(
                "step %d is not saved in %s: training has ended without Checkpointer.close, which saves the last "
                "step; so does the end of `with Checkpointer(...)`",
                self.arguments[0],
                url,
            )
        self.arguments = None


class Failures:
    """The saves that failed since they were last told of.

    Attributes:
        first: the first of them.
        standing: those that no later save has made good, by being durable wherever they were to be; of
            several that were to go to the same tiers, the first.
    """

    def __init__(self) -> None:
        self.first: SaveHandle | None = None
        self.standing: list[SaveHandle] = []

    def note(self, save: SaveHandle, *, failed: bool) -> None:
        """Note what became of a save, which is later than those noted before."""
        if not failed:
            self.standing = [other for other in self.standing if not set(other.tiers) <= set(save.tiers)]
            return
        self.first = self.first or save
        if all(other.tiers != save.tiers for other in self.standing):
            self.standing.append(save)
