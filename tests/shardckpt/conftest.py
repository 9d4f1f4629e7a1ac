"""Fixtures of the library's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from shardckpt.saver.client import SaverClient
from tests.savers import SaverProcess, connected


@pytest.fixture(autouse=True)
def _no_saver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process outlives a test: saves are written by the test's own process, unless it asks for a saver."""
    monkeypatch.setenv("SHARDCKPT_SNAPSHOTS", "0")


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
