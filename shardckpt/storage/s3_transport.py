"""HTTP for aiobotocore over blocking sockets, each in a thread while it transfers.

aiobotocore's own transport, aiohttp, moves every byte through the event loop: one thread of Python for all
requests, and a copy or two. Here a body goes from the caller's buffer to the socket, and from the socket into the
caller's buffer, while the interpreter's lock is released. `scripts/bench/s3_clients` measures both.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import queue
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from aiobotocore.awsrequest import AioAWSResponse  # type: ignore[import-untyped]
from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]
from botocore import exceptions as botocore  # type: ignore[import-untyped]
from botocore.httpsession import ProxyConfiguration  # type: ignore[import-untyped]

from shardckpt.storage.s3_body import Body
from shardckpt.storage.s3_connection import KEPT_SECONDS, Connection, Tls, read_into, read_some

__all__ = ["Answer", "ThreadSession"]

T = TypeVar("T")


class ThreadSession(AIOHTTPSession):  # type: ignore[misc]
    """The `http_session_cls` of an AioConfig. For use in one event loop.

    Takes the arguments of AIOHTTPSession, which sends what goes through a proxy, what has a body of unknown kind,
    and everything if `connector_args` has settings of aiohttp. Redirects are not followed: botocore does that.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        settings = options.get("connector_args") or {}
        self._is_customized = bool(set(settings) - {"keepalive_timeout"})
        self._proxies = ProxyConfiguration(
            proxies=options.get("proxies"), proxies_settings=options.get("proxies_config")
        )
        timeout = options.get("timeout")
        connect, read = timeout if isinstance(timeout, list | tuple) else (timeout, timeout)
        count = int(options.get("max_pool_connections") or 10)
        self._threads = _Threads()
        self._tls = Tls(options.get("verify", True), options.get("client_cert"))
        self._timeouts = connect, read
        self._places = asyncio.Semaphore(count)
        self._idle: dict[tuple[str, str], list[Connection]] = {}

    async def __aexit__(self, *args: object) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
        await super().__aexit__(*args)

    async def send(self, request: Any) -> Any:
        """Send a request of botocore, and return its answer. Raises what AIOHTTPSession raises."""
        body = request.body
        is_plain = body is None or isinstance(body, bytes | bytearray | Body)
        is_chunked = "Transfer-Encoding" in request.headers
        if self._is_customized or not is_plain or is_chunked or self._proxies.proxy_url_for(request.url):
            return await super().send(request)
        url = urlsplit(request.url)
        await self._places.acquire()
        lease = None
        try:
            connection = self._take_idle(url) or await self._connect(url, request.url)
            lease = _Lease(connection, self._give_back)
            response = await self._exchange(connection, url, request)
            answer = Answer(request.url, response, lease, self._run)
            headers = {name.lower(): value for name, value in response.getheaders()}
            result = AioAWSResponse(request.url, response.status, headers, answer)
            if not request.stream_output:
                await result.content
        except BaseException:
            if lease is None:
                self._places.release()
            else:
                lease.end(is_reusable=False)
            raise
        return result

    def _take_idle(self, url: SplitResult) -> Connection | None:
        connections = self._idle.get((url.scheme, url.netloc), [])
        while connections:
            connection = connections.pop()
            if connection.is_usable():
                return connection
            connection.close()
        return None

    def _give_back(self, connection: Connection, *, is_reusable: bool) -> None:
        self._places.release()
        if is_reusable and self._sessions is not None:
            connection.idle_since = time.monotonic()
            self._idle.setdefault(connection.origin, []).append(connection)
        else:
            connection.close()

    async def _connect(self, url: SplitResult, endpoint: str) -> Connection:
        # Not part of the exchange: a look-up of a name cannot be interrupted, and nobody has to wait for it.
        connecting = self._threads.submit(lambda: Connection(url, self._timeouts, self._tls))
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_result)
            raise
        except ssl.SSLError as error:
            raise botocore.SSLError(endpoint_url=endpoint, error=error) from error
        except TimeoutError as error:
            raise botocore.ConnectTimeoutError(endpoint_url=endpoint, error=error) from error
        except OSError as error:
            raise botocore.EndpointConnectionError(endpoint_url=endpoint, error=error) from error

    async def _exchange(
        self, connection: Connection, url: SplitResult, request: Any
    ) -> http.client.HTTPResponse:
        target = f"{url.path or '/'}?{url.query}" if url.query else url.path or "/"
        headers = [(name, _text(value)) for name, value in request.headers.items()]
        try:
            return await self._run(
                connection, lambda: connection.exchange(request.method, target, headers, request.body)
            )
        except TimeoutError as error:
            raise botocore.ReadTimeoutError(endpoint_url=request.url, error=error) from error
        except (OSError, http.client.HTTPException) as error:
            raise botocore.ConnectionClosedError(
                error=error, request=request, endpoint_url=request.url
            ) from error

    async def _run(self, connection: Connection, transfer: Callable[[], T]) -> T:
        """Run a transfer in a thread. When this returns or raises, the thread uses no buffer any more."""
        running = self._threads.submit(transfer)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            connection.break_off()
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            running.exception()  # is of no interest
            raise


class Answer:
    """The body of an answer, as aiobotocore's StreamingBody expects it of aiohttp, and with `read_into`."""

    def __init__(
        self,
        url: str,
        response: http.client.HTTPResponse,
        lease: _Lease,
        run: Callable[[Connection, Callable[[], Any]], Any],
    ) -> None:
        self.url = url
        self._response = response
        self._lease = lease
        self._run = run

    @property
    def content(self) -> Self:
        return self

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """Asked for by older releases of aiobotocore."""
        return [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in self._response.getheaders()
        ]

    async def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, as soon as there are some; all that is left for -1. b"" at the end."""
        read = self._response.read if size < 0 else partial(read_some, self._response, size)
        data: bytes = await self._transfer(read)
        return data

    async def read_into(self, view: memoryview, progress: Callable[[int], object]) -> int:
        """Fill a flat view of bytes, unless the body ends before. Returns how many bytes there were.

        Args:
            view: writable. Nothing writes to it any more once this has returned, raised or been cancelled.
            progress: called with the bytes read so far, from another thread.
        """
        done: int = await self._transfer(lambda: read_into(self._response, view, progress))
        return done

    def at_eof(self) -> bool:
        return self._response.isclosed()

    def close(self) -> None:
        self._lease.end(is_reusable=self._response.isclosed() and not self._response.will_close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._lease.abandon()

    async def _transfer(self, transfer: Callable[[], T]) -> T:
        if self._response.isclosed():  # the connection may be another request's
            return transfer()
        try:
            result: T = await self._run(self._lease.connection, transfer)
        except BaseException as error:
            self._lease.end(is_reusable=False)
            if isinstance(error, http.client.HTTPException):
                raise ConnectionError(f"the answer broke off: {error}") from error
            raise
        if self._response.isclosed():
            self.close()
        return result


class _Lease:
    """The use of a connection by one request. For use in the event loop, except `abandon`."""

    def __init__(self, connection: Connection, give_back: Callable[..., None]) -> None:
        self.connection = connection
        self._give_back: Callable[..., None] | None = give_back
        self._loop = asyncio.get_running_loop()

    def end(self, *, is_reusable: bool) -> None:
        """Give the connection back, once."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.connection, is_reusable=is_reusable)

    def abandon(self) -> None:
        """`end` of an answer that was dropped unread, from any thread."""
        if self._give_back is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(lambda: self.end(is_reusable=False))


class _Threads:
    """As many threads as there is work for. They end when idle, and do not keep the process from ending."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._free = 0

    def submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run a function in a thread, at once. The future, of the running loop, must not be cancelled."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                settle = partial(future.set_result, function())
            except BaseException as error:
                settle = partial(future.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle)

        with self._lock:
            is_free = self._free > 0
            self._free -= is_free
        self._waiting.put(run)
        if not is_free:
            threading.Thread(target=self._work, name="shardckpt-s3", daemon=True).start()
        return future

    def _work(self) -> None:
        run = self._waiting.get()
        while True:
            run()
            del run  # and the buffers that it refers to
            with self._lock:
                self._free += 1
            try:
                run = self._waiting.get(timeout=KEPT_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._free > 0:
                        self._free -= 1
                        return
                run = self._waiting.get()  # it was counted on just now


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _close_result(connecting: asyncio.Future[Connection]) -> None:
    if connecting.exception() is None:
        connecting.result().close()
