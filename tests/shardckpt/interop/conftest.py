"""A checkpoint with one of everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shardckpt
from tests.shardckpt.interop.helpers import (
    make_state,
)


@pytest.fixture(scope="session")
def state() -> dict[str, Any]:
    return make_state()


@pytest.fixture(scope="session")
def saved(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("saved") / "checkpoint")
    shardckpt.save(url, state, step=7, metrics={"loss": 1.5, "worst": float("inf")})
    return url


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("big")
    state = {f"t{i}": torch.full((6 << 10, 1 << 10), float(i)) for i in range(10)}
    shardckpt.save(folder, state)
    yield str(folder)
    (folder / "rank-00000/data.pack").unlink()
