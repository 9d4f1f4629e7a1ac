"""The agent's handle on its zygote: start it, order forks and signals, receive events."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from launcher.config.command import Kind
from launcher.config.job import Config
from launcher.errors import InternalError
from launcher.events import (
    Event,
    SpawnFailed,
    WorkerExited,
    WorkersGone,
    WorkerStarted,
    ZygoteLost,
    ZygoteReady,
)
from launcher.system.processes import Subreaper
from launcher.zygote.orders import WorkerOrder, shared_environment

__all__ = ["ZygoteHandle"]

_HOOK_DIR = Path(__file__).parent / "hook"
_KILL_SECONDS = 10.0  # until SIGKILL has an effect; on uninterruptible sleep it may have none
_EVENTS = {
    "ready": ZygoteReady,
    "started": WorkerStarted,
    "exited": WorkerExited,
    "spawn_failed": SpawnFailed,
}


class ZygoteHandle:
    """A running zygote. The zygote, its workers and all that they have started die with this process.

    The constructor returns at once. The zygote carries out orders once it has imported torch (`ZygoteReady`).

    Raises:
        InternalError: The interpreter or the command cannot be started.
    """

    def __init__(self, config: Config, reaper: Subreaper) -> None:
        self._reaper = reaper  # ends what a killed zygote leaves behind
        ours, theirs = socket.socketpair()
        command = config.command
        orders = {
            "socket": theirs.fileno(),
            "agent": os.getpid(),
            "command": command.argv,
            "preload": config.preload,
            "import_dir": None if sys.flags.safe_path else command.import_dir,
            "main_file": command.target if command.kind is Kind.SCRIPT else None,
            "source": command.source,
            "imports": str(config.directory / "imports.json") if config.is_warm else None,
            "files": reaper.files,
        }
        argv, environment = _command_line(config, shared_environment(config))
        environment["LAUNCH_ZYGOTE"] = json.dumps(orders)
        try:
            self._process = subprocess.Popen(
                argv, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
            )
        except OSError as error:
            raise InternalError(f"cannot start {argv[0]}: {error.strerror}") from None
        finally:
            theirs.close()
        self._socket = ours
        self._pidfd = os.pidfd_open(self._process.pid)
        self._unread = b""
        self.lost: ZygoteLost | None = None
        """The last event, once `receive` has returned it."""
        self.is_ready = False
        """True once it has imported what it should, and carries out orders."""
        self._is_killed = False  # by the agent

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has events; none after the last."""
        return () if self.lost else (self._socket.fileno(), self._pidfd)

    @property
    def pid(self) -> int:
        """Its process ID."""
        return self._process.pid

    def spawn(self, workers: Sequence[WorkerOrder]) -> None:
        """Order the fork of `workers`; it happens once the imports are done."""
        self._send(spawn=[asdict(worker) for worker in workers])

    def signal(self, signum: int) -> None:
        """Send `signum` to every process of every worker's tree."""
        self._send(signal=int(signum))

    def receive(self) -> list[Event]:
        """The events since the last call; does not wait.

        `ZygoteLost` is the last event: no process of the workers' trees is left then.
        """
        try:
            received = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            received = b""
        except ConnectionResetError:
            received = b""
        *lines, self._unread = (self._unread + received).split(b"\n")
        events = [_decode(line) for line in lines]
        self.is_ready = self.is_ready or any(isinstance(event, ZygoteReady) for event in events)
        if not received and self._process.poll() is not None:
            self._reaper.end_children(_KILL_SECONDS)
            self.lost = ZygoteLost(self._process.returncode, time.monotonic(), self._is_killed)
            events.append(self.lost)
        return events

    def kill(self) -> None:
        """Kill the zygote; `ZygoteLost` follows."""
        self._is_killed = True
        self._process.kill()

    def close(self, patience: float = _KILL_SECONDS) -> None:
        """End the zygote and everything below it; wait until nothing is left, for `patience` seconds at most."""
        deadline = time.monotonic() + patience
        self._socket.close()
        if not self.is_ready:
            self._process.kill()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reaper.end_children(deadline - time.monotonic())
        os.close(self._pidfd)

    def _send(self, **order: object) -> None:
        try:
            self._socket.sendall(json.dumps(order).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # `ZygoteLost` follows


def _command_line(config: Config, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command and environment that start the zygote, warm or cold."""
    if not config.is_warm:
        return [sys.executable, "-S", "-E", str(_HOOK_DIR / "sitecustomize.py")], environment
    path = environment.get("PYTHONPATH")
    return config.command.argv, {
        **environment,
        "PYTHONPATH": os.pathsep.join([str(_HOOK_DIR), *([path] if path else [])]),
    }


def _decode(line: bytes) -> Event:
    message: Mapping[str, object] = json.loads(line)
    fields = {key: value for key, value in message.items() if key != "event"}
    kind = str(message["event"])
    return WorkersGone() if kind == "drained" else _EVENTS[kind](**fields)
