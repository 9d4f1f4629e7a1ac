"""HTTP over blocking sockets: TLS, connections that are used again or broken off, checksums of uploads."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import ipaddress
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shardckpt.errors import OutOfReachError, StorageError
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.s3 import open_s3
from shardckpt.storage.s3_settings import S3Settings
from shardckpt.storage.work import Interruption
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy
from tests.shardckpt.storage.helpers import noise, through

PART = 100_000
SMALL = S3Settings(part_bytes=PART, range_bytes=PART // 2, first_pause=0.001)
ONCE = {"retries": {"total_max_attempts": 1}}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate for 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture
def secure(
    moto_s3: S3Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Storage, FaultyProxy]]:
    """A storage over https."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with faulty_proxy(moto_s3.endpoint, certificate) as proxy:
        yield through(moto_s3, proxy, SMALL), proxy


def test_https(secure: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = secure
    data = noise(3 * PART + 5)
    storage.write_pack("data.pack", memoryview(data))
    storage.create("claim", b"mine")
    found = bytearray(len(data))
    storage.read_into("data.pack", 0, memoryview(found))
    assert found == data
    assert storage.read("claim") == b"mine"
    assert storage.list() == ["claim", "data.pack"]
    assert proxy.count("PUT", "partNumber=") == 4


def test_a_certificate_that_is_not_trusted(moto_s3: S3Server, certificate: Path) -> None:
    with faulty_proxy(moto_s3.endpoint, certificate) as proxy:
        with pytest.raises(StorageError, match=r"(?i)certificate.verify.failed"):
            through(moto_s3, proxy, SMALL, **ONCE).list()
        assert proxy.requests == []
        options = {**moto_s3.options, "endpoint_url": proxy.endpoint, "client_kwargs": {"verify": False}}
        open_storage(moto_s3.url("unverified"), options).write("file", b"x")


def _of_puts(proxy: FaultyProxy) -> list[dict[str, str]]:
    return [
        headers
        for (method, _), headers in zip(proxy.requests, proxy.headers, strict=True)
        if method == "PUT"
    ]


def _crc32(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def test_the_signature_is_the_checksum_over_http(moto_s3: S3Server) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        through(moto_s3, proxy).write("file", b"content")
        (headers,) = _of_puts(proxy)
    assert headers["x-amz-content-sha256"] == hashlib.sha256(b"content").hexdigest()
    assert "x-amz-checksum-crc32" not in headers


def test_a_crc_is_the_checksum_of_what_is_not_signed(moto_s3: S3Server) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = through(moto_s3, proxy, SMALL, s3={"payload_signing_enabled": False})
        data = noise(2 * PART)
        storage.write_pack("data.pack", memoryview(data))
        puts = _of_puts(proxy)
    assert {headers["x-amz-content-sha256"] for headers in puts} == {"UNSIGNED-PAYLOAD"}
    expected = {_crc32(data[:PART]), _crc32(data[PART:])}
    assert {headers["x-amz-checksum-crc32"] for headers in puts} == expected


def test_over_https_as_well(secure: tuple[Storage, FaultyProxy]) -> None:
    """The content is sent as it is, which also servers can read that do not know botocore's coding."""
    storage, proxy = secure
    storage.write("file", b"content")
    (headers,) = _of_puts(proxy)
    assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert headers["x-amz-checksum-crc32"] == _crc32(b"content")
    assert "content-encoding" not in headers
    assert headers["content-length"] == "7"


def test_checksums_that_are_not_wanted(
    secure: tuple[Storage, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, proxy = secure
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    storage.fresh().write("file", b"content")
    (headers,) = _of_puts(proxy)
    assert not [name for name in headers if "checksum" in name]


def test_a_proxy_on_the_way(moto_s3: S3Server) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        options = {**moto_s3.options, "config_kwargs": {"proxies": {"http": proxy.endpoint}}}
        storage = open_s3(moto_s3.url("via").removeprefix("s3://"), options, settings=SMALL)
        storage.write_pack("data.pack", memoryview(noise(2 * PART)))
        found = bytearray(2 * PART)
        storage.read_into("data.pack", 0, memoryview(found))
        assert found == noise(2 * PART)
        assert {path.partition("/")[0] for _, path in proxy.requests} == {"http:"}


def test_answers_that_are_not_read_give_their_connections_back(moto_s3: S3Server) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = through(moto_s3, proxy, SMALL, max_pool_connections=2)
        proxy.faults = lambda _method, _path: "page"
        for _ in range(5):
            with pytest.raises(StorageError, match="no S3 server"):
                storage.read("file")
        proxy.faults = lambda _method, _path: None
        storage.write("file", b"x")


@dataclass
class RawServer:
    """Answers requests by a function of the test, each connection in a thread of its own.

    `answer` gets the connection, and the head of a request, whose body was not read; it returns whether the
    connection stays open.
    """

    answer: Callable[[socket.socket, bytes], bool]
    endpoint: str = ""
    connections: list[socket.socket] = field(default_factory=list)

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    piece = connection.recv(1)
                    if not piece:
                        return
                    head += piece
                if not self.answer(connection, head):
                    return


@contextlib.contextmanager
def _raw_server(answer: Callable[[socket.socket, bytes], bool]) -> Iterator[RawServer]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = RawServer(answer, f"http://127.0.0.1:{listening.getsockname()[1]}")

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listening.accept()[0]
                    server.connections.append(connection)
                    threading.Thread(target=server.serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in server.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _open(server: RawServer, **config: Any) -> Storage:
    options = {"key": "k", "secret": "s", "endpoint_url": server.endpoint, "config_kwargs": config}
    return open_s3("bucket/run", options, settings=SMALL)


def _partial(content: bytes) -> bytes:
    head = f"HTTP/1.1 206 Partial Content\r\nETag: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def test_a_connection_is_used_again_until_the_server_closes_it() -> None:
    closes = threading.Event()

    def answer(connection: socket.socket, _head: bytes) -> bool:
        connection.sendall(_partial(b"ten bytes!"))
        return not closes.is_set()

    with _raw_server(answer) as server:
        storage = _open(server, **ONCE)
        for _ in range(5):
            assert storage.read("file", 0, 10) == b"ten bytes!"
        assert len(server.connections) == 1
        closes.set()
        storage.read("file", 0, 10)  # the server says nothing of what it does now
        while server.connections[0].fileno() >= 0:
            pass
        assert storage.read("file", 0, 10) == b"ten bytes!"
        assert len(server.connections) == 2


def test_a_server_that_refuses_a_body_before_it_has_come() -> None:
    def answer(connection: socket.socket, _head: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return False

    with (
        _raw_server(answer) as server,
        pytest.raises(OutOfReachError, match=r"the server answered 503|reset"),
    ):
        _open(server, **ONCE).write("file", bytes(PART))


def test_nothing_is_read_into_a_buffer_after_an_interrupt() -> None:
    first, rest = bytes([1]) * 10_000, bytes([2]) * 40_000
    came, go_on, sent = threading.Event(), threading.Event(), threading.Event()

    def answer(connection: socket.socket, _head: bytes) -> bool:
        connection.sendall(_partial(first + rest)[: -len(rest)])
        came.set()
        go_on.wait()
        with contextlib.suppress(OSError):
            connection.sendall(rest)
        sent.set()
        return False

    with _raw_server(answer) as server:
        storage = _open(server)
        buffer = bytearray(50_000)
        interruption = Interruption()
        errors: list[BaseException] = []

        def read() -> None:
            try:
                with interruption.joined():
                    storage.read_into("file", 0, memoryview(buffer))
            except StorageError as error:
                errors.append(error)

        reading = threading.Thread(target=read)
        reading.start()
        came.wait()
        interruption.set()
        reading.join()
        assert [str(error) for error in errors] == ["the call was interrupted"]
        buffer[:] = bytes([3]) * len(buffer)
        go_on.set()
        sent.wait()
        assert set(buffer) == {3}
