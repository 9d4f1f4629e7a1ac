"""shardckpt."""

from __future__ import annotations

from typing import Any

import shardckpt
from _peers.base import Candidate, Wait

__all__ = ["Shardckpt"]

_NEVER = 10**9  # steps


class Shardckpt(Candidate):
    name = "shardckpt"
    again = reshards = syncs = overlaps = recalls = prepares = True

    @property
    def _objects(self) -> dict[str, Any]:
        return dict(self.state.objects)

    def prepare(self) -> None:
        self.resume()
        self._manager.step(1, self._objects)

    def resume(self) -> None:
        """What a job does first: load the newest checkpoint, if there is one."""
        self._manager = self._open()
        self._manager.restore(self._objects)

    def save(self, step: int) -> Wait:
        return self._manager.save(step, self._objects).wait

    def load(self) -> None:
        shardckpt.load(self.folder, self._objects, atomic=False)

    def recall(self) -> str:
        with self._open() as manager:
            loaded = manager.restore(self._objects)
        assert loaded is not None
        return loaded.tier

    def close(self) -> None:
        self._manager.close()
        del self._manager

    def _open(self) -> shardckpt.Checkpointer:
        return shardckpt.Checkpointer(self.folder, every_steps=_NEVER, keep_last=2)
