"""Orbax."""

from __future__ import annotations

import numpy as np
import torch

from _peers.base import PerRank, Wait

__all__ = ["Orbax"]


class Orbax(PerRank):
    """Its async checkpointer over NumPy views of the tensors; each rank is a JAX process of its own."""

    name = "orbax per rank"
    again = overlaps = True
    needs = "orbax"

    def prepare(self) -> None:
        import orbax.checkpoint as ocp

        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def save(self, step: int) -> Wait:
        import orbax.checkpoint as ocp

        if not self.writes:
            return lambda: None
        path = (self.folder / f"{self.source}" / f"step-{step:08d}").absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._checkpointer.save(path, args=ocp.args.PyTreeSave(self._arrays()))
        return self._checkpointer.wait_until_finished

    def load(self) -> None:
        import orbax.checkpoint as ocp

        path = max((self.folder / f"{self.source}").iterdir()).absolute()
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in self.state.tensors}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            loaded = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        self.apply({name: torch.from_numpy(array) for name, array in loaded.items()})

    def close(self) -> None:
        self._checkpointer.close()

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.state.tensors.items()}
