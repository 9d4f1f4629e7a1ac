"""Real jobs in temporary directories, and which processes of theirs are left."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

FAKES = Path(__file__).parent / "fakes"
LAUNCH = [sys.executable, str(Path(sys.executable).with_name("launch"))]
# Workers ignore SIGUSR1, as the worker contract says: it is for launch, and schedulers send it to all.
WITHOUT_SIGUSR1 = ["sh", "-c", """trap '' USR1; exec "$@" """, "sh"]
PATIENCE = 30.0  # seconds; far more than anything here takes

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class Job:
    """Starts `launch` in a directory of its own. Unless asked for torch, with a stand-in for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[str]] = []
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PET_", "LAUNCH_", "TORCHELASTIC_", "PYTHON", "OMP_"))
        }
        self.environment = {
            **inherited,
            "LAUNCH_TEST_MARK": self.mark,
            "PYTHONPATH": str(FAKES),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def use_torch(self) -> None:
        del self.environment["PYTHONPATH"]

    def script(self, source: str, name: str = "train.py") -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return name

    def fifo(self, name: str = "fifo") -> Path:
        """A pipe with a name, through which workers tell that they got somewhere."""
        os.mkfifo(self.path / name)
        return self.path / name

    def start(self, *args: str, **options: object) -> subprocess.Popen[str]:
        defaults: dict[str, object] = {
            "cwd": self.path,
            "env": self.environment,
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "errors": "replace",
        }
        process = subprocess.Popen([*LAUNCH, *args], **{**defaults, **options})  # type: ignore[call-overload]
        self.started.append(process)
        return process  # type: ignore[no-any-return]

    def end(self, process: subprocess.Popen[str]) -> Ended:
        out, err = process.communicate(timeout=PATIENCE)
        return Ended(process.returncode, out, err)

    def run(self, *args: str) -> Ended:
        return self.end(self.start(*args))

    def log(self, rank: int = 0, stream: str = "out", number: int = 1, run: str = "train") -> str:
        path = self.path / f"runs/{run}/logs/round-{number:04d}/rank-{rank:05d}.{stream}"
        return path.read_bytes().decode(errors="replace")

    def left_over(self) -> list[str]:
        """Command lines of the processes that this job has started and that still exist."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                pass
        return [line for line in found if line]

    def kill_left_over(self) -> None:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    os.kill(int(path.name), 9)
            except OSError:
                pass


def until(look: Callable[[], _T]) -> _T:
    """What `look` returns, once it is something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The next line of `launch` with this text; what it says before is passed over."""
    assert process.stderr is not None
    line = "-"
    while line and text not in line:
        line = process.stderr.readline()
    assert text in line
    return line


def lines_told(fifo: Path, count: int) -> list[str]:
    """The next `count` lines that processes write to a named pipe, each in one write.

    It stays open all the while: what is written between one reader's end of file and the next reader is lost.
    """
    with open(os.open(fifo, os.O_RDWR)) as lines:
        return [next(lines).rstrip("\n") for _ in range(count)]


def wait_for_death(pid: int) -> None:
    """Return when process `pid` is dead; fail if it lives on."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        assert poll.poll(PATIENCE * 1000), f"process {pid} lives on"
    finally:
        os.close(pidfd)
