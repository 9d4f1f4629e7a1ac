"""Values of options."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import parse
from launcher.errors import UsageError

pytestmark = pytest.mark.usefixtures("folder")


def test_a_folder_with_the_name_of_a_url() -> None:
    assert parse(["--ckpt", "./s3:/x", "train.py"]).checkpoints == str(Path("s3:/x").absolute())


def test_ckpt_is_no_folder_of_an_attempt(folder: Path) -> None:
    """Its name does not show that: a run may have the same."""
    attempt = folder / "run/attempt-0001"
    attempt.mkdir(parents=True)
    parse(["--ckpt", "run/attempt-0001", "train.py"])
    (attempt / "attempt.json").touch()
    with pytest.raises(UsageError, match="a run, not an attempt in it: give run, found 'run/attempt-0001'"):
        parse(["--ckpt", "run/attempt-0001", "train.py"])
