"""safetensors."""

from __future__ import annotations

from pathlib import Path

import torch

from _peers.files import OneFile

__all__ = ["Safetensors"]


class Safetensors(OneFile):
    name = "safetensors per rank"
    suffix = "safetensors"

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.state.tensors, path)

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(path)
