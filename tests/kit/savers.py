"""Savers as processes of their own, and trainers that are connected to them."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardckpt.run.places import step_path
from shardckpt.run.save_info import SaveInfo
from shardckpt.saver.channel import listen
from shardckpt.saver.client import SaverClient

__all__ = ["LIMIT", "SaverProcess", "connected", "save_info", "wait_until"]

LIMIT = 60.0
"""Seconds that nothing takes longer than, unless it hangs."""


class SaverProcess:
    """A saver as `launch` starts it: it inherits a listening socket and a control connection."""

    def __init__(self, address: str, *options: str) -> None:
        self.address = address
        self._listener = listen(address)
        self._lines = b""
        self.start(*options)

    def start(self, *options: str) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(LIMIT)
        fds = (self._listener.fileno(), theirs.fileno())
        command = [
            sys.executable,
            "-m",
            "shardckpt.saver",
            "--listen",
            str(fds[0]),
            "--control",
            str(fds[1]),
        ]
        self._process = subprocess.Popen([*command, *options], pass_fds=fds, start_new_session=True)
        theirs.close()
        self.pid = self._process.pid

    def send(self, signum: int) -> None:
        self._process.send_signal(signum)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT)

    def shrink_control(self) -> None:
        """Have the kernel keep little of what this one is told."""
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

    def told(self, *events: str) -> dict[str, Any]:
        """The next line of these kinds."""
        while True:
            line, end, rest = self._lines.partition(b"\n")
            if end:
                self._lines = rest
                told: dict[str, Any] = json.loads(line)
                if told["event"] in events:
                    return told
            else:
                more = self._control.recv(1 << 16)
                assert more, f"the saver ended without a line about {events!r}"
                self._lines += more

    def told_of(self, step: int) -> dict[str, Any]:
        """The next line about what became of this step's save in a tier."""
        while True:
            told = self.told("persisted", "failed", "superseded")
            if told["step"] == step:
                return told

    def ask_to_end(self) -> None:
        """End its control connection, and do not wait for what it does then."""
        self._control.shutdown(socket.SHUT_WR)

    def drain(self) -> int:
        """Ask it to end; its exit code."""
        self.ask_to_end()
        self.told("drained")
        return self._process.wait(LIMIT)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()
        self._listener.close()

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def memory(self) -> int:
        """Bytes of the snapshot buffers that it has mapped."""
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        found = re.findall(r"^(\w+)-(\w+) .*memfd:shardckpt", maps, re.MULTILINE)
        return sum(int(end, 16) - int(start, 16) for start, end in found)


def connected(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch, run: str = "run") -> SaverClient:
    monkeypatch.setenv("LAUNCH_SAVER", saver.address)
    return SaverClient(run, [], 2, LIMIT, linger=0)


def save_info(step: int, world_size: int = 1) -> SaveInfo:
    """A save of attempt 1."""
    return SaveInfo(f"save-{step}", step_path("attempt-0001", step), step, 1, world_size)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
