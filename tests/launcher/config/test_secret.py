"""The secret by which the nodes of a job know each other: given, made, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.config.secret import Secret, configured_secret, find_secret, generated_secret
from launcher.errors import UsageError

TEXT = "0123456789abcdef"


def secret_file(path: Path, text: str = f"{TEXT}\n", mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_beats_the_environment(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "secret")
    assert configured_secret({"secret": str(path)}, "x" * 40) == Secret(TEXT, str(path))
    assert configured_secret({}, f" {TEXT}\n") == Secret(TEXT, "LAUNCH_SECRET")
    assert configured_secret({}, None) is None
    assert TEXT not in repr(configured_secret({}, TEXT))


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        (TEXT, 0o604, "chmod 600"),
        (TEXT, 0o620, "chmod 600"),
        ("short", 0o600, "expected 16 to 4096 characters"),
        ("", 0o600, "found 0"),
        ("x" * 5000, 0o600, "expected 16 to 4096 characters"),
    ],
)
def test_a_file_that_is_no_secret(tmp_path: Path, text: str, mode: int, reason: str) -> None:
    path = secret_file(tmp_path / "secret", text, mode)
    with pytest.raises(UsageError, match=f"secret={path}.*{reason}"):
        configured_secret({"secret": str(path)}, None)


def test_no_file_at_all(tmp_path: Path) -> None:
    """Not what a FIFO or a device would do to whoever opens it, either."""
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (
        ("missing", "No such file"),
        ("fifo", "expected a file with the job's secret"),
        (".", "expected a file|Is a directory"),
    ):
        with pytest.raises(UsageError, match=reason):
            configured_secret({"secret": str(tmp_path / name)}, None)


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    """By whoever comes first, and only its user can read it."""
    first = generated_secret(tmp_path)
    assert first is not None
    assert first == generated_secret(tmp_path)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert len(first.text) == 64
    (tmp_path / "secret").chmod(0o644)
    assert generated_secret(tmp_path) is None
    (tmp_path / "secret").unlink()
    (tmp_path / "secret").symlink_to(secret_file(tmp_path / "other"))
    assert generated_secret(tmp_path) is None
    assert generated_secret(tmp_path / "missing") is None
    (tmp_path / "secret").unlink()
    secret_file(tmp_path / "secret", "\n")
    assert generated_secret(tmp_path) is None  # an empty one protects nothing


def test_where_a_secret_is_made(tmp_path: Path) -> None:
    """Where all nodes find it: on one machine, or on a network file system; nowhere else."""
    given = Secret(TEXT, "test")
    assert find_secret(given, "node1", tmp_path, "ext4") == given
    assert find_secret(None, "node1", tmp_path, "ext4") is None
    shared = find_secret(None, "node1", tmp_path, "nfs4")
    assert shared == generated_secret(tmp_path)
    here = find_secret(None, "127.0.0.1", tmp_path, "ext4", tmp_path)
    assert here is not None
    assert here == find_secret(None, "localhost", tmp_path / "other", "ext4", tmp_path)
    assert here != shared


@pytest.mark.parametrize("what", ["link", "file", "writable"])
def test_a_directory_that_is_not_this_users_alone(tmp_path: Path, what: str) -> None:
    """The job does not go on without a secret because somebody was there first."""
    path = tmp_path / f"launch-{os.geteuid()}"
    if what == "link":
        path.symlink_to(tmp_path)
    elif what == "file":
        path.touch()
    else:
        path.mkdir()
        path.chmod(0o777)
    with pytest.raises(UsageError, match=f"{path}, where the job's secret is to be, is not a directory"):
        find_secret(None, "localhost", tmp_path, "ext4", tmp_path)
    given = Secret(TEXT, "test")
    assert find_secret(given, "localhost", tmp_path, "ext4", tmp_path) == given
