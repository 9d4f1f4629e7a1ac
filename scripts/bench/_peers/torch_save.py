"""torch.save."""

from __future__ import annotations

from pathlib import Path

import torch

from _peers.files import OneFile

__all__ = ["TorchSave"]


class TorchSave(OneFile):
    name = "torch.save per rank"
    suffix = "pt"

    def _write(self, path: Path) -> None:
        torch.save(self.state.tensors, path)

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        loaded: dict[str, torch.Tensor] = torch.load(path, mmap=True, weights_only=True)
        return loaded
