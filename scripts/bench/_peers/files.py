"""A file for each rank, without checksums or a commit."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from _peers.base import PerRank, Wait

__all__ = ["OneFile"]


class OneFile(PerRank):
    """No checksums, no commit."""

    suffix: ClassVar[str]

    def save(self, step: int) -> Wait:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / f"step-{step:08d}.{self.source}.{self.suffix}")
        return lambda: None

    def load(self) -> None:
        self.apply(self._read(max(self.folder.glob(f"*.{self.source}.{self.suffix}"))))

    def _write(self, path: Path) -> None:
        raise NotImplementedError

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        raise NotImplementedError
