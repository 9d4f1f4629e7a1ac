"""The client of a running job: send one request to its agent, yield the answers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.agent.control import peer
from launcher.agent.control_record import RECORD, is_alive, read_record, user_name
from launcher.errors import LaunchError, NotRunningError, UnreachableError, UsageError

__all__ = ["ask", "is_running"]


def is_running(run_dir: Path) -> bool:
    """Whether a job of this host runs in `run_dir`, as far as can be told without asking it."""
    try:
        record = _find_record(run_dir)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(0)
            connection.connect(f"\0{record['address']}")
    except BlockingIOError:  # so many ask it already
        return True
    except (OSError, LaunchError):
        return False
    return True


def ask(
    run_dir: Path,
    verb: str,
    number: int | None = None,
    *,
    without: Collection[int] = (),
    timeout: float = 3.0,
) -> Iterator[dict[str, Any]]:
    """Ask the job that runs in `run_dir`, and yield its answers as they come.

    `number` of workers, and the slots `without` any, are for "scale". `timeout` is in seconds, for each of
    the answers. Raises `UsageError` if there is no such run, or if the job refuses; `NotRunningError` if no job
    runs there; `UnreachableError` if it runs on another host or as another user, or does not answer.
    """
    record = _find_record(run_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(f"\0{record['address']}")
        except OSError:
            raise _unreachable(run_dir, record) from None
        if os.geteuid() != 0 and peer(connection) not in (os.geteuid(), 0):
            owner = user_name(peer(connection))
            raise UnreachableError(f"the job in {run_dir} is of user {owner}: ask as that user")
        try:
            _send_request(connection, {"verb": verb, "number": number, "without": sorted(without)})
            yield from _answers(connection)
        except TimeoutError:
            raise UnreachableError(
                f"launch (pid {record['pid']}) in {run_dir} has not answered in {timeout:g} s: it may be stopped "
                f"(kill -CONT {record['pid']})"
            ) from None
        except (ConnectionError, EOFError):
            raise NotRunningError(f"the job in {run_dir} ended before it had answered") from None


def _send_request(connection: socket.socket, request: Mapping[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(request).encode() + b"\n")
    except BrokenPipeError:
        pass  # refused before it was heard: the reason can be read


def _answers(connection: socket.socket) -> Iterator[dict[str, Any]]:
    with connection.makefile("rb") as lines:
        for line in lines:
            message = json.loads(line)
            if "error" in message["answer"]:
                raise UsageError(message["answer"]["error"])
            yield message["answer"]
            if not message["more"]:
                return
    raise EOFError


def _find_record(run_dir: Path) -> dict[str, Any]:
    """Where the agent of this host is asked, of a job that may have agents on several."""
    try:
        paths = [run_dir / RECORD, *sorted(run_dir.glob(f"nodes/*/{RECORD}"))] if run_dir.is_dir() else []
    except PermissionError:
        raise UnreachableError(f"{run_dir} is closed to user {user_name(os.geteuid())}") from None
    if not paths:
        raise UsageError(f"no run in {run_dir}: expected a run directory, as launch makes it")
    records = [record for path in paths if (record := read_record(path))]
    here = [record for record in records if record["host"] == socket.gethostname()]
    if here:
        return next(filter(is_alive, here), here[0])
    if records:
        hosts = ", ".join(sorted({record["host"] for record in records}))
        raise UnreachableError(
            f"the job in {run_dir} runs on {hosts}, and this is {socket.gethostname()}: ask there"
        )
    raise NotRunningError(f"nothing runs in {run_dir}")


def _unreachable(run_dir: Path, record: Mapping[str, Any]) -> UnreachableError:
    """Why nobody listens at the address in `record`."""
    if is_alive(record):
        return UnreachableError(
            f"launch (pid {record['pid']}) in {run_dir} cannot be reached from here: ask from within its "
            f"container or network namespace"
        )
    return NotRunningError(f"nothing runs in {run_dir}: its launch (pid {record['pid']}) was killed")
