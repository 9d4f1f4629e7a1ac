"""What the tests of commands share: calling them, and spoiling a checkpoint."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardckpt.format import records

COMMANDS = ("ls", "info", "verify", "merge", "reshard", "copy", "refs")

Call = Callable[..., tuple[int, str, str]]


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def change(path: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file; its checksum, if it has one, is made right again."""
    document = json.loads(path.read_bytes())
    is_record = document.pop("crc32c", None) is not None
    edit(document)
    path.write_bytes(records.encode(document) if is_record else json.dumps(document).encode())


def rest(command: str, folder: Path) -> list[object]:
    """The arguments of a command behind the checkpoint; its output is below `folder`."""
    return {
        "merge": [folder / "out.pt"],
        "reshard": [folder / "out", "--world-size", 2],
        "copy": [folder / "out"],
    }.get(command, [])


def on_terminal(*arguments: str, columns: int = 100) -> str:
    """What a command prints on a terminal."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    environment.pop("NO_COLOR", None)
    child = subprocess.Popen(
        [sys.executable, "-m", "shardckpt", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 30)[0]:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert child.wait(30) == 0
    return shown.decode()
