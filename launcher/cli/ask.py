"""The client of a running job: send one request to its agent, yield the answers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from launcher.agent.control_protocol import (
    RECORD,
    ControlRecord,
    decode_answer,
    encode_request,
    peer_user,
    user_name,
)
from launcher.errors import LaunchError, NotRunningError, UnreachableError, UsageError

__all__ = ["ask", "is_running"]


def is_running(run_dir: Path) -> bool:
    """True if a job of this host runs in `run_dir`, as far as can be seen without a request to it."""
    try:
        record = _find_record(run_dir)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(0)
            connection.connect(f"\0{record.address}")
    except BlockingIOError:  # its queue of clients is full
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
    user: Callable[[], int] = os.geteuid,
    peer: Callable[[socket.socket], int] = peer_user,
) -> Iterator[dict[str, Any]]:
    """Send a request to the job in `run_dir`, and yield its answers as they come.

    Args:
        run_dir: Its run directory.
        verb: One of `control_protocol.VERBS`.
        number: Workers, for "scale".
        without: Slots that get no worker, for "scale".
        timeout: Seconds to wait for each answer.
        user: The user ID of this process.
        peer: The user ID at the other end of a connection.

    Raises:
        UsageError: There is no such run, or the job refuses.
        NotRunningError: No job runs there.
        UnreachableError: It runs on another host or as another user, or does not answer.
    """
    record = _find_record(run_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(f"\0{record.address}")
        except OSError:
            raise _explain_no_listener(run_dir, record) from None
        if user() != 0 and peer(connection) not in (user(), 0):
            owner = user_name(peer(connection))
            raise UnreachableError(f"the job in {run_dir} is of user {owner}: ask as that user")
        try:
            _send(connection, encode_request(verb, number, without))
            yield from _receive(connection)
        except TimeoutError:
            raise UnreachableError(
                f"launch (pid {record.pid}) in {run_dir} has not answered in {timeout:g} s: it may be stopped "
                f"(kill -CONT {record.pid})"
            ) from None
        except (ConnectionError, EOFError):
            raise NotRunningError(f"the job in {run_dir} ended before it had answered") from None


def _send(connection: socket.socket, request: bytes) -> None:
    try:
        connection.sendall(request)
    except BrokenPipeError:
        pass  # refused before it was read: the answer says why


def _receive(connection: socket.socket) -> Iterator[dict[str, Any]]:
    with connection.makefile("rb") as lines:
        for line in lines:
            answer, more = decode_answer(line)
            if "error" in answer:
                raise UsageError(answer["error"])
            yield answer
            if not more:
                return
    raise EOFError


def _find_record(run_dir: Path) -> ControlRecord:
    """The record of this host's agent, in a job that may have agents on several."""
    try:
        paths = [run_dir / RECORD, *sorted(run_dir.glob(f"nodes/*/{RECORD}"))] if run_dir.is_dir() else []
    except PermissionError:
        raise UnreachableError(f"{run_dir} is closed to user {user_name(os.geteuid())}") from None
    if not paths:
        raise UsageError(f"no run in {run_dir}: expected a run directory, as launch makes it")
    records = [record for path in paths if (record := ControlRecord.read(path))]
    here = [record for record in records if record.host == socket.gethostname()]
    if here:
        return next((record for record in here if record.is_alive), here[0])
    if records:
        hosts = ", ".join(sorted({record.host for record in records}))
        raise UnreachableError(
            f"the job in {run_dir} runs on {hosts}, and this is {socket.gethostname()}: ask there"
        )
    raise NotRunningError(f"nothing runs in {run_dir}")


def _explain_no_listener(run_dir: Path, record: ControlRecord) -> UnreachableError:
    if record.is_alive:
        return UnreachableError(
            f"launch (pid {record.pid}) in {run_dir} cannot be reached from here: ask from within its "
            f"container or network namespace"
        )
    return NotRunningError(f"nothing runs in {run_dir}: its launch (pid {record.pid}) was killed")
