"""Fixtures of the library's tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from shardckpt.saver.client import SaverClient
from shardckpt.storage import Storage, open_storage
from tests.savers import SaverProcess, connected

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _no_saver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process outlives a test: saves are written by the test's own process, unless it asks for a saver."""
    monkeypatch.setenv("SHARDCKPT_SNAPSHOTS", "0")


@pytest.fixture
def place() -> Iterator[Storage]:
    """An empty folder in memory."""
    root = open_storage(f"memory://test-{next(_numbers)}")
    yield root
    root.delete_tree("")


@pytest.fixture
def saver() -> Iterator[SaverProcess]:
    made = SaverProcess(f"shardckpt-test-{os.getpid()}-{os.urandom(6).hex()}")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def client(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[SaverClient]:
    """A trainer of this process."""
    made = connected(saver, monkeypatch)
    yield made
    made.close()
