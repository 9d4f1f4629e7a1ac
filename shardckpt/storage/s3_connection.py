"""One connection to an S3 server, over a blocking socket."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult

from botocore.httpsession import get_cert_path  # type: ignore[import-untyped]

from shardckpt.storage.s3_body import Body

__all__ = ["KEPT_SECONDS", "Connection", "Tls", "read_into", "read_some"]

KEPT_SECONDS = 12.0
"""An idle connection is used again within this time."""

_PIECE = 1 << 20  # bytes of one call of the system; progress is reported at least as often


class Connection:
    """One connection to a server. Connects at once; blocks.

    Args:
        url: says where to.
        timeouts: seconds to wait for the connection, and for each of its bytes; None waits without end.
        tls: of `https`.
    """

    def __init__(self, url: SplitResult, timeouts: tuple[float | None, float | None], tls: Tls) -> None:
        self.origin = (url.scheme, url.netloc)
        self.idle_since = 0.0
        connect, read = timeouts
        host = url.hostname or ""
        if url.scheme == "https":
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, url.port, timeout=connect, context=tls.context()
            )
        else:
            self._http = http.client.HTTPConnection(host, url.port, timeout=connect)
        try:
            self._http.connect()
        except BaseException:
            self._http.close()
            raise
        self._socket: socket.socket = self._http.sock
        self._socket.settimeout(read)

    def exchange(
        self,
        method: str,
        target: str,
        headers: list[tuple[str, str]],
        body: bytes | bytearray | Body | None,
    ) -> http.client.HTTPResponse:
        """Send a request, and wait for the head of its answer."""
        connection = self._http
        connection.putrequest(method, target, skip_host=_has(headers, "host"))
        for name, value in headers:
            connection.putheader(name, value)
        if body is None and method in ("PUT", "POST") and not _has(headers, "content-length"):
            connection.putheader("Content-Length", "0")
        if isinstance(body, Body):
            connection.endheaders()
            self._send(body)
        else:
            connection.endheaders(body)
        self._hurry()
        response = connection.getresponse()
        self._hurry()
        return response

    def is_usable(self) -> bool:
        """False if the server has closed the idle connection, or soon will."""
        if time.monotonic() > self.idle_since + KEPT_SECONDS:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def break_off(self) -> None:
        """End a transfer that another thread is waiting for."""
        with contextlib.suppress(OSError):
            # That of the plain socket: an SSLSocket's own forgets its encryption, while the thread still uses it.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._http.close()

    def _send(self, body: Body) -> None:
        view, done = body.view, 0
        try:
            while done < len(view):
                done += self._socket.send(view[done : done + _PIECE])
                body.progress(done)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a server that refuses a request need not read it to its end: the answer says why

    def _hurry(self) -> None:
        """Acknowledge at once what comes: servers without TCP_NODELAY send an answer's body only then (Ceph)."""
        with contextlib.suppress(OSError):  # closed with an answer that has no body
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class Tls:
    """The settings of TLS, read when they are first needed.

    Args:
        verify: whether to check the server's certificate; a path names the certificates to trust.
        client_cert: a path, or those of a certificate and its key.
    """

    def __init__(self, verify: bool | str, client_cert: str | tuple[str, str] | None) -> None:
        self._verify = verify
        self._client_cert = client_cert
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = self._make()
            return self._context

    def _make(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=get_cert_path(self._verify) if self._verify else None)
        if not self._verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if isinstance(self._client_cert, str):
            context.load_cert_chain(self._client_cert)
        elif self._client_cert:
            context.load_cert_chain(*self._client_cert)
        return context


def read_some(response: http.client.HTTPResponse, size: int) -> bytes:
    data = response.read1(size)
    if not response.length and not response.chunked and response.length is not None:
        response.close()  # read1 itself notices the end one call later
    return data


def read_into(
    response: http.client.HTTPResponse, view: memoryview, progress: Callable[[int], object]
) -> int:
    done = 0
    while done < len(view):
        piece = view[done : done + _PIECE]
        if response.chunked or response.length is None or response.fp is None:
            data = read_some(response, len(piece))
            count = len(data)
            piece[:count] = data
        else:  # without a copy
            count = response.fp.readinto1(piece[: response.length])
            response.length -= count
            if not count or not response.length:
                response.close()
        if not count:
            break
        done += count
        progress(done)
    return done


def _has(headers: list[tuple[str, str]], wanted: str) -> bool:
    return any(name.lower() == wanted for name, _ in headers)
