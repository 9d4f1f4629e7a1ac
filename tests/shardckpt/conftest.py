"""What holds for all of the library's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_saver(no_saver: None) -> None:
    """A test asks for a saver, or has none."""
