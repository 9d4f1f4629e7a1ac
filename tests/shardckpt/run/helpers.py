"""What several tests of runs need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shardckpt.ranks.world import Alone
from shardckpt.run.places import iter_places
from shardckpt.storage import open_storage
from tests.kit.worlds import Checkpoints

__all__ = ["FOR_EVER", "committed", "save_alone", "state_at"]

FOR_EVER = 600.0
"""Seconds that no test takes."""


def state_at(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), float(step)), "step": step}


def committed(url: Path) -> list[tuple[int, int]]:
    """(attempt, step) of what exists, the newest first."""
    return [place.order[:2] for place in iter_places(open_storage(url)) if place.is_committed()]


def save_alone(run: Path, step: int = 1) -> None:
    """Save in a new attempt, by a job on its own."""
    Checkpoints(open_storage(run), Alone()).save(step, state_at(step)).wait()
