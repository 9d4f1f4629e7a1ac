"""S3 servers on loopback, as child processes that end with whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import http.server
import os
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FaultyProxy", "S3Server", "faulty_proxy", "moto", "rclone"]

_BIN = Path(sys.executable).parent
_START_SECONDS = 30.0
_KEY, _SECRET = "test-key", "test-secret"


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket."""

    endpoint: str
    bucket: str
    options: Mapping[str, Any] = field(repr=False)

    def url(self, prefix: str = "") -> str:
        """A URL in the bucket where nobody else is."""
        return f"s3://{self.bucket}/{prefix or 'test'}-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def moto() -> Iterator[S3Server]:
    """moto: strict about conditional puts, lax about signatures and sizes; keeps everything in memory."""
    command = [str(_BIN / "moto_server"), "-H", "127.0.0.1", "-p", "0"]
    # It derives the second from the first, and would put every object in a file.
    settings = {"S3_UPLOAD_PART_MIN_SIZE": "1", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(16 << 20)}
    with _started(command, r"http://127\.0\.0\.1:(\d+)", **settings) as port:
        server = _server(port)
        _make_bucket(server)
        yield server


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[S3Server]:
    """rclone over `folder`: checks signatures, ignores conditional puts."""
    command = [str(_BIN / "rclone"), "serve", "s3", "--addr", "127.0.0.1:0"]
    command += ["--auth-key", f"{_KEY},{_SECRET}", "--config", os.devnull, str(folder)]
    with _started(command, r"http://127\.0\.0\.1:(\d+)") as port:
        server = _server(port)
        (folder / server.bucket).mkdir()
        yield server


def _server(port: int) -> S3Server:
    endpoint = f"http://127.0.0.1:{port}"
    options = {"key": _KEY, "secret": _SECRET, "endpoint_url": endpoint}
    return S3Server(endpoint, "bucket", options)


def _make_bucket(server: S3Server) -> None:
    import fsspec

    fsspec.filesystem("s3", **server.options).mkdir(server.bucket)


@contextlib.contextmanager
def _started(command: list[str], announcement: str, **environment: str) -> Iterator[int]:
    """Run a server on a port of its own choice; yields the port that it announces."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        preexec_fn=_die_with_parent,
    )
    try:
        assert child.stdout is not None
        port = _wait_announced(child, child.stdout.fileno(), announcement)
        drain = threading.Thread(target=child.stdout.read, daemon=True)  # it logs every request
        drain.start()
        yield port
        child.kill()
        drain.join()
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def _wait_announced(child: subprocess.Popen[bytes], fd: int, announcement: str) -> int:
    said = b""
    deadline = time.monotonic() + _START_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        piece = os.read(fd, 4096)
        said += piece
        if found := re.search(announcement.encode(), said):
            return int(found[1])
        if not piece:
            break
    raise RuntimeError(f"{child.args!r} did not start: {said.decode(errors='replace')}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


_PAGE = b"<html><body>Log in</body></html>"
_REFUSALS = {"expired": (400, "ExpiredToken"), "denied": (403, "AccessDenied")}


@dataclass
class FaultyProxy:
    """A server in front of another one that spoils chosen requests.

    `faults` is consulted for every request with its method and path; it returns what to do with it:

    - None: pass it on.
    - A number: answer with that status at once.
    - "lose": pass it on, and hang up instead of answering.
    - "cut": hang up in the middle of the answer's body.
    - "reset": break the connection (RST) in the middle of the answer's body.
    - "refuse": break the connection (RST) in the middle of the request's body, which is not passed on.
    - "flip": change one bit in the middle of the answer's body.
    - "expired", "denied": answer as S3 does to credentials that have expired, or that do not permit it.
    - "trickle", "trickle up": have a byte of the answer's, or the request's, body through now and then, until the
      proxy ends.
    - "slow": send the answer's body in ten pieces, with pauses of `pause` seconds.
    - "ignore": never answer, until the proxy ends.
    - "page": answer with status 200 and a web page, as a server that is none of S3's.
    - "chunked": do not tell the length of the answer's body before, but send it in chunks.

    `requests` records (method, path) of all, `keys` the access key of each, `headers` its headers.
    """

    endpoint: str = ""
    faults: Callable[[str, str], str | int | None] = lambda _method, _path: None
    pause: float = 0.02
    requests: list[tuple[str, str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    expired: set[str] = field(default_factory=set)
    """Access keys whose credentials have expired."""

    def count(self, method: str, part: str = "") -> int:
        """How many requests of this method came whose path contains `part`."""
        return sum(m == method and part in path for m, path in self.requests)


@contextlib.contextmanager
def faulty_proxy(upstream: str, certificate: Path | None = None) -> Iterator[FaultyProxy]:
    """A FaultyProxy in front of `upstream`, an http:// endpoint.

    Args:
        upstream: the server that it passes requests on to.
        certificate: a file with a certificate and its key has the proxy speak https.
    """
    proxy = FaultyProxy()
    host = upstream.removeprefix("http://")
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            self.close_connection = True
            with contextlib.suppress(ConnectionError):  # the client may have given up
                self.handle_request()

        def handle_request(self) -> None:
            proxy.requests.append((self.command, self.path))
            proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
            key = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
            proxy.keys.append(key[1] if key else "")
            fault = proxy.faults(self.command, self.path)
            if proxy.keys[-1] in proxy.expired:
                fault = "expired"
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "refuse":
                self.rfile.read(length // 2)
                self.break_off()
                return
            if fault == "trickle up":
                while length and not over.wait(0.05):
                    length -= len(self.rfile.read(1))
                return
            body = self.rfile.read(length)
            if fault in _REFUSALS:
                self.refuse(*_REFUSALS[fault])
                return
            if fault == "ignore":
                over.wait()
                return
            if fault == "page":
                self.answer(200, _PAGE)
                return
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()
                return
            answer, content = self.pass_on(body)
            if fault == "lose":
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() in ("connection", "transfer-encoding", "server", "date"):
                    continue
                if name.lower() != "content-length" or fault != "chunked":
                    self.send_header(name, value)
            if fault == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
                content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if content else b"0\r\n\r\n"
            self.send_header("Connection", "close")
            self.end_headers()
            self.send_body(content, fault)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"<Error><Code>%s</Code><Message>refused</Message></Error>" % code.encode())

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def pass_on(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
            connection = http.client.HTTPConnection(host)
            headers = {name: self.headers[name] for name in self.headers if name != "Expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer, content

        def send_body(self, content: bytes, fault: str | None) -> None:
            middle = len(content) // 2
            if fault in ("cut", "reset"):
                content = content[:middle]
            elif fault == "flip" and content:
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            pieces = {"slow": -(-len(content) // 10), "trickle": 1}
            size = pieces.get(fault or "", len(content))
            for start in range(0, len(content), size or 1):
                self.wfile.write(content[start : start + size])
                if fault in pieces:
                    over.wait(proxy.pause)
            if fault == "reset":
                self.break_off()

        def break_off(self) -> None:
            linger = struct.pack("ii", 1, 0)  # none: closing sends a RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            # Not the server's own way, which says goodbye first.
            os.close(self.connection.detach())

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The handshake is left to the request's own thread, by its first read.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        proxy.endpoint = proxy.endpoint.replace("http:", "https:")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield proxy
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
