"""File systems of the tests' own. Who may not mount any gets a user namespace in which that is allowed.

A test that needs some asks for the fixture `mounts`, or is marked so. Where this process may not mount, such
tests run in a process of their own that is the same user, in a user and mount namespace, with CAP_SYS_ADMIN
there and no other capability: so permissions are enforced as everywhere. Where that is not allowed either, they
are skipped, all at one place, so that one line says so.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

__all__ = ["InNamespace", "Mount", "mounted", "needs_namespace", "remount_read_only"]

Mount = Callable[..., None]

_CAP_SYS_ADMIN = 21
_MS_RDONLY, _MS_REMOUNT, _MNT_DETACH = 1, 32, 2
_NAMESPACE = (
    *("unshare", "--user", "--mount", "--map-current-user", "--keep-caps"),
    *("setpriv", "--inh-caps=-all,+sys_admin", "--ambient-caps=-all,+sys_admin"),
)


def mounted() -> Iterator[Mount]:
    """Gives a function that mounts a file system of a kind at a folder; all are unmounted at the end."""
    folders: list[bytes] = []

    def mount(kind: str, folder: Path, options: str = "") -> None:
        _mount(kind, bytes(folder), 0, options)
        folders.append(bytes(folder))

    yield mount
    for folder in reversed(folders):
        ctypes.CDLL(None).umount2(folder, _MNT_DETACH)


def remount_read_only(folder: Path, *, read_only: bool = True, options: str = "") -> None:
    """Have a mounted file system refuse all writes, or take them again."""
    _mount(None, bytes(folder), _MS_REMOUNT | (_MS_RDONLY if read_only else 0), options)


def needs_namespace(item: pytest.Item) -> bool:
    """Whether a test mounts, which this process may not."""
    mounts = "mounts" in getattr(item, "fixturenames", ()) or item.get_closest_marker("mounts") is not None
    return mounts and not _may_mount()


class InNamespace(pytest.Item):
    """A test that is run by a process that may mount, together with the others of its function."""

    @classmethod
    def of(cls, item: pytest.Item) -> InNamespace:
        """The same test, to be run there."""
        assert item.parent is not None
        made: InNamespace = cls.from_parent(item.parent, name=item.name)
        made.own_markers = list(item.iter_markers())
        made.keywords.update(item.keywords)
        return made

    def runtest(self) -> None:
        """Run it, and have its outcome for this one's."""
        if reason := _why_no_namespace():
            pytest.skip(f"needs to mount: not as this user, and in no user namespace ({reason})")
        options = [f"-W{warning}" for warning in self.config.option.pythonwarnings or []]
        lines = _outcomes(str(self.config.rootpath), self.nodeid.partition("[")[0], *options)
        own = [line for line in lines if line.partition(" - ")[0].rstrip().endswith(f" {self.nodeid}")]
        if not any(line.startswith("PASSED") for line in own):
            pytest.fail("\n".join(["in a user namespace:", *lines]), pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where it is, and what it is called."""
        return self.path, None, self.nodeid.partition("::")[2]


@cache
def _outcomes(root: str, function: str, *options: str) -> list[str]:
    """What pytest prints of a function's tests, in a namespace: at last a line for each, with its outcome."""
    command = [
        *_NAMESPACE,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *options, function],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()


def _mount(kind: str | None, folder: bytes, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    name = None if kind is None else kind.encode()
    if libc.mount(name, folder, name, flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fsdecode(folder))


@cache
def _may_mount() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_SYS_ADMIN & 1)
    return False


@cache
def _why_no_namespace() -> str:
    """Why no process of this user may mount; empty if one may."""
    if lacking := [name for name in ("unshare", "setpriv") if shutil.which(name) is None]:
        return f"no {lacking[0]} is installed"
    script = (
        "import ctypes, sys; sys.exit(ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) != 0)"
    )
    command = [*_NAMESPACE, sys.executable, "-S", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or "no file system can be mounted there"
