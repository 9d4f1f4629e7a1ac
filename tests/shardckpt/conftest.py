"""Fixtures of the library's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_saver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process outlives a test: saves are written by the test's own process, unless it asks for a saver."""
    monkeypatch.setenv("SHARDCKPT_SNAPSHOTS", "0")
