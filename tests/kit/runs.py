"""Runs: states whose content is their step, and what a run's storage has of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

import shardckpt
from shardckpt.run.places import iter_places
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.protocol import Before
from tests.kit.faults import FaultyStorage

__all__ = ["SlowStorage", "break_pack", "committed", "restored", "saved", "state_at"]


def state_at(step: int) -> dict[str, Any]:
    return {"t": torch.full((100,), step), "step": step}


def restored(url: Any, **options: Any) -> int | None:
    """The step of the newest good checkpoint, loaded and checked."""
    state = state_at(-1)
    loaded = shardckpt.Checkpointer(url, **options).restore(state)
    if loaded is None:
        assert state["step"] == -1
        return None
    assert int(state["t"].unique()) == state["step"] == loaded.step
    return loaded.step


def committed(root: Storage) -> list[int]:
    return [place.order[1] for place in iter_places(root) if place.is_committed()]


def saved(url: Any, *steps: int, **options: Any) -> shardckpt.Checkpointer:
    """A new attempt that has saved these steps."""
    checkpointer = shardckpt.Checkpointer(url, **options)
    checkpointer.restore(state_at(-1))
    for step in steps:
        checkpointer.save(step, state_at(step))
    checkpointer.wait()
    return checkpointer


class SlowStorage(FaultyStorage):
    """Packs are written once `gate` is open."""

    gate = threading.Event()

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        assert self.gate.wait(60)
        super().write_pack(path, buffer, before)


def break_pack(folder: Path, step: int) -> Path:
    """Flip a bit in the pack of a step; the checkpoint's folder."""
    (place,) = [place for place in iter_places(open_storage(folder)) if place.order[1] == step]
    pack = folder / place.path / "rank-00000" / "data.pack"
    content = bytearray(pack.read_bytes())
    content[17] ^= 4
    pack.write_bytes(content)
    return folder / place.path
