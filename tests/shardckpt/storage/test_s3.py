"""Objects in S3: lost answers, races, uploads, credentials."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardckpt.errors import (
    CorruptError,
    CredentialsError,
    StorageError,
)
from shardckpt.storage import Storage, open_storage
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy
from tests.shardckpt.storage.helpers import PART, noise, once, race_processes, through


def test_one_of_many_racing_processes_creates(moto_s3: S3Server) -> None:
    race_processes(moto_s3.url("race"), dict(moto_s3.options))


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_a_missing_bucket_is_named(request: pytest.FixtureRequest, kind: str) -> None:
    server: S3Server = request.getfixturevalue(f"{kind}_s3")
    storage = open_storage("s3://no-such-bucket/run", server.options)
    calls: list[Callable[[], object]] = [
        lambda: storage.read("file"),
        lambda: storage.size("file"),
        lambda: storage.list(),
        lambda: storage.write("file", b""),
        lambda: storage.create("file", b""),
        lambda: storage.write_pack("file", memoryview(bytes(PART + 1))),
        lambda: storage.exclusive(),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"s3://no-such-bucket.*no such bucket"):
            call()


def test_an_unreachable_endpoint_is_found_soon() -> None:
    with socket.socket() as held:  # bound, but not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        retries = {"retries": {"total_max_attempts": 4}}
        options = {"key": "k", "secret": "s", "endpoint_url": endpoint, "config_kwargs": retries}
        storage = open_storage("s3://bucket/run", options)
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot reach .* \(connection refused\)") as caught:
            storage.list()
        assert time.monotonic() - began < 10
    assert "s3://bucket/run" in str(caught.value)
    assert endpoint in str(caught.value)


def test_no_credentials(moto_s3: S3Server) -> None:
    storage = open_storage("s3://bucket/run", {"endpoint_url": moto_s3.endpoint})
    with pytest.raises(CredentialsError, match=r"AWS_ACCESS_KEY_ID.*AWS_PROFILE") as caught:
        storage.list()
    assert "s3://bucket/run" in str(caught.value)


def test_wrong_credentials(rclone_s3: S3Server) -> None:
    storage = open_storage(rclone_s3.url(), {**rclone_s3.options, "secret": "wrong"})
    for call in (lambda: storage.list(), lambda: storage.write("file", b"")):
        with pytest.raises(CredentialsError, match="refused"):
            call()


def test_credentials_from_the_environment(rclone_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", rclone_s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", rclone_s3.options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", rclone_s3.endpoint)
    storage = open_storage(rclone_s3.url())
    storage.write("file", b"x")
    assert storage.list() == ["file"]


def test_another_process_finds_what_this_one_changed(moto_s3: S3Server) -> None:
    """No listing is remembered."""
    url = moto_s3.url()
    one, two = open_storage(url, moto_s3.options), open_storage(url, moto_s3.options)
    assert one.list() == two.list() == []
    one.write("a/file", b"x")
    assert two.list() == ["a"]
    two.delete_tree("a")
    assert one.list() == []
    with pytest.raises(FileNotFoundError):
        one.size("a/file")


def test_more_objects_than_a_page(moto_s3: S3Server) -> None:
    storage = open_storage(moto_s3.url(), moto_s3.options)
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda n: storage.write(f"a/{n:04}", b""), range(1001)))
    assert len(storage.list("a")) == 1001
    storage.delete_tree("a")
    assert storage.list("a") == []


def test_a_lost_answer_is_not_taken_for_a_lost_race(proxied: tuple[Storage, FaultyProxy]) -> None:
    """The put succeeded, its answer was lost, and its repetition was refused."""
    storage, proxy = proxied
    proxy.faults = once("PUT", "lose")
    storage.create("claim", b"mine")
    assert storage.read("claim") == b"mine"
    assert [method for method, _ in proxy.requests].count("PUT") > 1
    proxy.faults = once("PUT", "lose")
    with pytest.raises(FileExistsError):
        storage.create("claim", b"mine")  # equal content is not the same writer


def test_a_race_of_unknown_outcome_is_neither_won_nor_lost(proxied: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = proxied
    lose_put = once("PUT", "lose")
    proxy.faults = lambda method, path: 403 if method == "HEAD" else lose_put(method, path)
    with pytest.raises(StorageError):
        storage.create("claim", b"mine")


@pytest.mark.parametrize("status", [409, 500, 503])
def test_passing_trouble_is_waited_out(proxied: tuple[Storage, FaultyProxy], status: int) -> None:
    storage, proxy = proxied
    proxy.faults = once("PUT", status)
    storage.create("claim", b"mine")
    assert storage.read("claim") == b"mine"


def test_a_bare_412_means_that_it_is_there(proxied: tuple[Storage, FaultyProxy]) -> None:
    """Some stores send the status without the code."""
    storage, proxy = proxied
    proxy.faults = lambda method, _path: 412 if method == "PUT" else None
    with pytest.raises(FileExistsError):
        storage.create("claim", b"mine")


def test_a_broken_read_is_repeated(proxied: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = proxied
    data = noise(100_000)
    storage.write("file", data)
    proxy.faults = once("GET", "cut")
    assert storage.read("file") == data
    proxy.faults = once("GET", "cut")
    found = bytearray(50_000)
    storage.read_into("file", 1000, memoryview(found))
    assert found == data[1000:51_000]


def test_a_failed_upload_leaves_nothing(proxied: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = proxied
    proxy.faults = lambda method, path: 403 if method == "PUT" and "partNumber=2" in path else None
    with pytest.raises(CredentialsError, match=r"data\.pack"):
        storage.write_pack("data.pack", memoryview(bytes(2 * PART)))
    assert proxy.requests[-1][0] == "DELETE"
    assert "uploadId" in proxy.requests[-1][1]
    assert storage.list() == []


def test_a_server_that_is_none_of_s3(proxied: tuple[Storage, FaultyProxy]) -> None:
    """An empty run, or a write that has succeeded, must not be what a login page is taken for."""
    storage, proxy = proxied
    proxy.faults = lambda _method, _path: "page"
    for call in (
        lambda: storage.list(),
        lambda: storage.sizes(),
        lambda: storage.read("a"),
        lambda: storage.read_into("a", 0, memoryview(bytearray(10))),
        lambda: storage.write("a", b"x"),
        lambda: storage.create("a", b"x"),
        lambda: storage.write_pack("a", memoryview(bytes(PART + 1))),
        lambda: storage.delete_tree(""),
    ):
        with pytest.raises(StorageError, match=r"what answers is no S3 server.* Check endpoint_url"):
            call()


def test_answers_without_a_length(proxied: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = proxied
    content = noise(5000)
    storage.write("a", content)
    proxy.faults = lambda method, _path: "chunked" if method == "GET" else None
    assert storage.read("a") == content
    assert storage.read("a", 4000, 6000) == content[4000:]
    buffer = bytearray(2000)
    storage.read_into("a", 10, memoryview(buffer))
    assert buffer == content[10:2010]
    with pytest.raises(CorruptError, match="truncated"):
        storage.read_into("a", 4000, memoryview(buffer))


def test_a_lost_answer_at_the_end_of_an_upload(proxied: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = proxied
    proxy.faults = once("POST", "lose", "uploadId=")
    storage.write_pack("data.pack", memoryview(bytes(PART + 1)))
    assert storage.size("data.pack") == PART + 1


@pytest.fixture
def proxied(moto_s3: S3Server) -> Iterator[tuple[Storage, FaultyProxy]]:
    """A storage whose requests the test may spoil."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        yield through(moto_s3, proxy), proxy
