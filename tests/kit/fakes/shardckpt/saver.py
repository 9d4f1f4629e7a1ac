"""A saver that holds nothing, but keeps to the contract, and says what workers have it say.

Orders are JSON lines: events to tell the agent `now` and `then` (at the drain), a named pipe to read `before`
it ends, the exit `code` (negative: a signal). One order at most of each kind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    if "BROKEN_SAVER" in os.environ:
        sys.exit("this saver is broken")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    assert [sys.argv[1], sys.argv[3]] == ["--listen", "--control"]
    listener = socket.socket(fileno=int(sys.argv[2]))
    control = socket.socket(fileno=int(sys.argv[4]))
    about = {
        "descriptors": [fd for fd in range(100) if Path(f"/proc/self/fd/{fd}").exists()],
        "given": [0, 1, 2, listener.fileno(), control.fileno()],
        "leads its session": os.getsid(0) == os.getpid(),
        "stdin": str(Path("/proc/self/fd/0").readlink()),
        "blocked": sorted(map(int, blocked)),
    }
    print(json.dumps(about), flush=True)
    order: dict[str, Any] = {}
    while control not in (ready := select.select([listener, control], [], [])[0]):
        assert ready == [listener]
        connection, _ = listener.accept()
        with connection:
            order |= json.loads(connection.makefile().readline())
            tell(control, order.pop("now", []))
            connection.sendall(f"{os.getpid()}\n".encode())
    assert control.recv(1) == b""
    tell(control, order.get("then", []))
    if "before" in order:
        Path(order["before"]).read_text()
    tell(control, [{"event": "drained"}])
    code = order.get("code", 0)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def tell(control: socket.socket, events: list[dict[str, Any]]) -> None:
    try:
        control.sendall(b"".join(json.dumps(event).encode() + b"\n" for event in events))
    except BrokenPipeError:
        pass  # the agent is gone


if __name__ == "__main__":
    main()
