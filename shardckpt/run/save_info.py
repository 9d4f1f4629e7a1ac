"""SaveInfo: what identifies one save, the same in every process that takes part in it."""

from __future__ import annotations

import msgspec

from shardckpt.run.places import checkpoint_order

__all__ = ["SaveInfo"]


class SaveInfo(msgspec.Struct, frozen=True, array_like=True):
    """One save, as its ranks, its savers and its committer know it.

    Attributes:
        id: unique among all saves.
        path: the checkpoint's path below its run; empty for one that lies alone. In memory it has the name with
            which the attempt began, in storage the name under which the attempt was claimed.
        step: optimizer steps done.
        attempt: number of the attempt; 0 for a checkpoint that lies alone.
        world_size: number of ranks that write a part.
    """

    id: str
    path: str
    step: int
    attempt: int
    world_size: int

    def at(self, path: str) -> SaveInfo:
        """The same save at another path of its run, once its attempt has been claimed there."""
        return SaveInfo(self.id, path, self.step, checkpoint_order(path)[0], self.world_size)

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts a run's saves by attempt, then step: the last one is the newest."""
        return checkpoint_order(self.path)
