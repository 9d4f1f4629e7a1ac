"""An S3 server on loopback for scripts/bench/save --s3, with one bucket."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["BUCKET", "SERVERS", "serve"]

BUCKET = "bucket"
SERVERS = ("moto", "rclone")
"""moto keeps objects in memory; rclone as files, with which s3torchconnector cannot do."""

_BIN = Path(sys.executable).parent
_KEY, _SECRET = "bench-key", "bench-secret"
_START_SECONDS = 30.0
_POLL_SECONDS = 0.05


@contextmanager
def serve(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """Run it over `folder`; yields the environment that lets every client find it."""
    command, log = _command(kind, folder), folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        environment = {
            "AWS_ENDPOINT_URL": _endpoint(server, log),
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            # rclone answers a range with the checksum of the whole object, which botocore takes for wrong.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }
        _make_bucket(kind, folder, environment)
        yield environment
    finally:
        server.kill()
        server.wait()


def _command(kind: str, folder: Path) -> list[str]:
    if kind == "moto":
        return [str(_BIN / "moto_server"), "-H", "127.0.0.1", "-p", "0"]
    command = [str(_BIN / "rclone"), "serve", "s3", "--addr", "127.0.0.1:0", "--config", os.devnull]
    return [*command, "--auth-key", f"{_KEY},{_SECRET}", str(folder / "objects")]


def _make_bucket(kind: str, folder: Path, environment: dict[str, str]) -> None:
    if kind == "rclone":
        (folder / "objects" / BUCKET).mkdir(parents=True)
        return
    import s3fs

    filesystem = s3fs.S3FileSystem(key=_KEY, secret=_SECRET, endpoint_url=environment["AWS_ENDPOINT_URL"])
    filesystem.mkdir(BUCKET)


def _endpoint(server: subprocess.Popen[bytes], log: Path) -> str:
    """The address that it announces, on a port of its own choice."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text(errors="replace")):
            return found[0]
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"{server.args!r} did not start: {log.read_text(errors='replace')}")
