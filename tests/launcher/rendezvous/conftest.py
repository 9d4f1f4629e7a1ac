"""Fixtures of the tests of rendezvous."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.teams import Team


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    """A team of one or two nodes, empty yet."""
    team = Team(tmp_path, 1, 2)
    yield team
    team.close()
