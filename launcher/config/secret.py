"""The secret by which the nodes of a job know each other's messages. docs/security.md has all of it."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import UsageError

__all__ = ["VARIABLE", "Secret", "configured_secret", "find_secret", "generated_secret"]

VARIABLE = "LAUNCH_SECRET"
"""In the environment of `launch`; its workers do not get it."""

_LEAST, _MOST = 16, 4096  # characters
_PRIVATE = "it lets whoever reads it take part in the job: chmod 600"
_HERE = ("localhost", "127.0.0.1", "::1")
_NETWORK = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs", "afs"),
    *("cifs", "smb3", "fuse.juicefs", "panfs", "wekafs", "ocfs2", "gfs2", "orangefs", "pvfs2"),
)
"""File systems that several nodes see alike, as Linux calls them."""

_WRITING = 2.0  # seconds that another node may take to write a file that it has made


@dataclass(frozen=True)
class Secret:
    """A secret, and in words where it comes from."""

    text: str = field(repr=False)
    source: str


def configured_secret(conf: Mapping[str, str], text: str | None) -> Secret | None:
    """The one that the user gives: a file in --rdzv-conf, or else `text` from the environment.

    Raises `UsageError` for one that is no secret: too short, or in a file that others can read.
    """
    if (name := conf.get("secret")) is not None:
        return Secret(_read(Path(name)), name)
    if text is not None:
        return Secret(_checked(text, VARIABLE), VARIABLE)
    return None


def find_secret(
    given: Secret | None,
    host: str,
    run_dir: Path,
    file_system: str | None = None,
    temporary: Path = Path("/tmp"),
) -> Secret | None:
    """The secret of a job of several nodes that meet at `host`; None if there is none that all of them have.

    Where none is given, one is made where all nodes find it: on one machine in a directory of this user in
    `temporary`, and on several ones in a run directory that lies on a network file system (`file_system`; None:
    find out). Raises `UsageError` if another user has put something else where that directory is to be: so
    nobody can have the job go on without a secret.
    """
    if given is not None:
        return given
    if host in _HERE:
        return generated_secret(_own_directory(temporary))
    is_shared = (_file_system(run_dir) if file_system is None else file_system) in _NETWORK
    return generated_secret(run_dir) if is_shared else None


def generated_secret(directory: Path) -> Secret | None:
    """The secret in a directory, made by whoever comes first; None if it cannot be this user's alone."""
    try:
        path = directory / "secret"
        if not path.exists():
            _create(path)
        found = os.lstat(path)
        is_own = found.st_uid == os.geteuid() or found.st_uid == _user_in(directory)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or not is_own:
            return None
        deadline = time.monotonic() + _WRITING
        while not (text := path.read_text()).endswith("\n"):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        text = text.strip()
        return Secret(text, str(path)) if _LEAST <= len(text) <= _MOST else None
    except (OSError, UnicodeDecodeError):
        return None


def _own_directory(temporary: Path) -> Path:
    """A directory of this machine that all agents of this user know, whatever their environment says.

    Raises `UsageError` if it is not this user's alone.
    """
    path = temporary / f"launch-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700)
    except OSError:  # it exists, or cannot be made
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise UsageError(
                    f"{path}, where the job's secret is to be, is not a directory that this user alone can write "
                    "to: remove it, or give the job a secret by --rdzv-conf secret=FILE or LAUNCH_SECRET"
                ) from None
    return path


def _user_in(directory: Path) -> int:
    """Who this user is in a directory: on a network file system, root may be nobody."""
    import tempfile  # it loads a dozen modules, and `launch` starts without

    with tempfile.TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_uid


def _read(path: Path) -> str:
    """The secret in a file of the user's. Raises `UsageError`."""
    source = f"rdzv_conf: secret={path}"
    try:
        # A FIFO would have to wait for whoever writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{source}: expected a file with the job's secret, found something else")
            if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise UsageError(f"{source}: others than its owner and group have rights to it: {_PRIVATE}")
            text = file.read(_MOST + 1).decode()
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{source}: expected text, as of `openssl rand -hex 32`") from None
    return _checked(text, source)


def _checked(text: str, source: str) -> str:
    text = text.strip()
    if not _LEAST <= len(text) <= _MOST:
        raise UsageError(
            f"{source}: expected {_LEAST} to {_MOST} characters, as of `openssl rand -hex 32`, found {len(text)}"
        )
    return text


def _create(path: Path) -> None:
    """Write a new secret, unless another node has done so meanwhile."""
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    with open(made, "w") as file:
        file.write(f"{os.urandom(32).hex()}\n")


def _file_system(path: Path) -> str:
    """The kind of file system that a directory lies on, as Linux calls it; empty if that cannot be found
    out."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0]
    except (OSError, IndexError):
        pass
    return ""
