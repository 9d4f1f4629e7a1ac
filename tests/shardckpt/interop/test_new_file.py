"""A local file that appears only once it is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardckpt.errors import CheckpointExistsError, StorageFullError
from shardckpt.interop.new_file import new_file


def test_it_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    with new_file(tmp_path / "out", 3, overwrite=False) as file:
        file.write(b"abc")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == b"abc"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").write_bytes(b"earlier")
    with pytest.raises(error), new_file(tmp_path / "out", 3, overwrite=True) as file:
        file.write(b"abc")
        raise error
    assert (tmp_path / "out").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_came_in_the_meantime_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointExistsError), new_file(tmp_path / "out", 3, overwrite=False) as file:
        file.write(b"abc")
        (tmp_path / "out").write_bytes(b"other")
    assert (tmp_path / "out").read_bytes() == b"other"


def test_a_full_disk_is_found_before_the_block(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageFullError, match="are free"),
        new_file(tmp_path / "x", 1 << 60, overwrite=False),
    ):
        raise AssertionError
    assert not list(tmp_path.iterdir())
