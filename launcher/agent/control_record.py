"""The file in a run directory that says where the agent listens."""

from __future__ import annotations

import json
import os
import pwd
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RECORD", "is_alive", "read_record", "user_name", "write_record"]


RECORD = "control.json"


def write_record(path: Path, address: str) -> None:
    """Write it such that no reader ever sees a part of it."""
    pid = os.getpid()
    content = {"pid": pid, "started": _start_of(pid), "address": address, "host": socket.gethostname()}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(content) + "\n", encoding="utf-8")
    fresh.replace(path)


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {
            "pid": int(record["pid"]),
            "started": int(record["started"]),
            "address": str(record["address"]),
            "host": str(record["host"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_alive(record: Mapping[str, Any]) -> bool:
    started = _start_of(record["pid"])
    return bool(started) and started == record["started"]


def _start_of(pid: int) -> int:
    """What tells a process from others that had its number before; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0
