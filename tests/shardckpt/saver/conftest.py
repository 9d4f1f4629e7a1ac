"""Fixtures for the tests of the saver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.savers import SaverProcess
from tests.kit.trainer_processes import Trainers


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Trainers]:
    made = Trainers(tmp_path)
    yield made
    made.end()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def nodes() -> Iterator[list[SaverProcess]]:
    made = [SaverProcess(f"shardckpt-test-{number}-{os.urandom(6).hex()}") for number in range(2)]
    yield made
    for saver in made:
        saver.close()
