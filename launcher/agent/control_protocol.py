"""Live control of a running job: what its agent and the client of `launch status`, `scale` and so on exchange.

The agent listens on an abstract unix socket, whose name is in RUN_DIR/control.json, and answers its own user and
root. A client sends one line, `{"verb": "scale", "number": 6, "without": [3]}`, and gets one line or several:
`{"answer": {...}, "more": false}`; "more" is false in the last one. An answer with the key "error" is a refusal.
"without" may be missing.

verb     number           what the client asks for
status                    the state of the job
stacks                    where every worker is; it is not disturbed
restart                   a new round, begun at a step boundary if the workers can drain; a second request does
                          not wait for the boundary, and its answer has the key "at_once"
scale    workers          this many workers on this node from now on, and none in the slots "without"
stop                      save, then end: as SIGTERM
kill                      end at once: as a second SIGTERM
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.events import RequestReceived

__all__ = [
    "RECORD",
    "VERBS",
    "ControlRecord",
    "decode_answer",
    "decode_request",
    "encode_answer",
    "encode_request",
    "peer_user",
    "user_name",
]

RECORD = "control.json"
"""Name of the record in a run directory, or in a node's directory of it."""
VERBS = ("status", "stacks", "restart", "scale", "stop", "kill")

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True)
class ControlRecord:
    """Where the agent of a node listens."""

    pid: int
    started: int
    """Clock ticks from the boot to the process's start; tells it from others that had its number."""
    address: str
    """Name of the abstract unix socket, without its leading NUL."""
    host: str

    @classmethod
    def of_this_process(cls, address: str) -> ControlRecord:
        """The record of an agent in this process that listens at `address`."""
        pid = os.getpid()
        return cls(pid, _start_of(pid), address, socket.gethostname())

    @classmethod
    def read(cls, path: Path) -> ControlRecord | None:
        """The record in a file; None if there is none, or it is broken."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            pid, started = int(record["pid"]), int(record["started"])
            return cls(pid, started, str(record["address"]), str(record["host"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file, such that no reader sees a part of it. Raises `OSError`."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        fresh.replace(path)

    @property
    def is_alive(self) -> bool:
        """True if the agent's process exists, on this host."""
        started = _start_of(self.pid)
        return bool(started) and started == self.started


def encode_request(verb: str, number: int | None = None, without: Collection[int] = ()) -> bytes:
    """The line that a client sends."""
    return json.dumps({"verb": verb, "number": number, "without": sorted(without)}).encode() + b"\n"


def decode_request(line: bytes, client: int) -> RequestReceived:
    """The request of a client, which is not trusted. Raises `ValueError` with the reason for a refusal."""
    try:
        request = json.loads(line)
        verb, number, without = request["verb"], request.get("number"), request.get("without", [])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError('expected one line like {"verb": "status"}') from None
    if verb not in VERBS:
        raise ValueError(
            f"unknown verb {verb!r}: expected one of {', '.join(VERBS)}; is this launch of another version?"
        )
    scales = verb == "scale"
    if not (_is_whole(number) and number) if scales else number is not None:
        raise ValueError(f"{verb}: expected {'a' if scales else 'no'} number of workers, found {number!r}")
    if not isinstance(without, list) or not all(map(_is_whole, without)) or (without and not scales):
        raise ValueError(f"{verb}: expected {'a list of' if scales else 'no'} slots, found {without!r}")
    return RequestReceived(verb, number, client, tuple(sorted(set(without))))


def encode_answer(answer: Mapping[str, Any], *, more: bool) -> bytes:
    """The line that the agent sends; `more` of them follow."""
    return json.dumps({"answer": answer, "more": more}).encode() + b"\n"


def decode_answer(line: bytes) -> tuple[dict[str, Any], bool]:
    """An answer, and whether more follow."""
    message = json.loads(line)
    return message["answer"], message["more"]


def peer_user(connection: socket.socket) -> int:
    """User ID of the process at the other end, as the kernel says."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])


def user_name(uid: int) -> str:
    """The name of a user; the number if it has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _start_of(pid: int) -> int:
    """Clock ticks from the boot to the start of a process; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0
