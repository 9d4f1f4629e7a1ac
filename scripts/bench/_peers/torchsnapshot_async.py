"""torchsnapshot."""

from __future__ import annotations

from typing import Any

from _peers.base import PerRank, Wait

__all__ = ["Torchsnapshot"]


class Torchsnapshot(PerRank):
    """Its async mode, without DTensors, which it does not know: each rank's tensors are its own."""

    name = "torchsnapshot per rank"
    overlaps = True
    needs = "torchsnapshot"

    def save(self, step: int) -> Wait:
        from torchsnapshot import Snapshot

        return Snapshot.async_take(
            str(self.folder / f"step-{step:08d}"), self._objects(write=self.writes)
        ).wait

    def load(self) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(max(self.folder.iterdir()))).restore(self._objects(write=True))

    def _objects(self, *, write: bool) -> dict[str, Any]:
        from torchsnapshot import StateDict

        return {"state": StateDict(**self.state.tensors)} if write else {}
