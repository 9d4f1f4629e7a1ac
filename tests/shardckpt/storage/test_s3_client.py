"""Requests to S3: what passes is waited out; what does not is an error that says so."""

from __future__ import annotations

import mmap
import socket
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import fsspec
import pytest
import torch

from shardckpt import load, save
from shardckpt.errors import (
    CorruptError,
    OutOfReachError,
    StorageError,
)
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.s3 import open_s3
from shardckpt.storage.s3_settings import S3Settings
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy
from tests.shardckpt.storage.helpers import PART, noise, once, through, times

SMALL_PART = 100_000


SMALL = S3Settings(part_bytes=SMALL_PART, range_bytes=SMALL_PART // 2, first_pause=0.001)


@pytest.fixture
def proxied(moto_s3: S3Server) -> Iterator[tuple[Storage, FaultyProxy]]:
    """A storage of small requests, which the test may spoil, and quick repetitions."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        yield through(moto_s3, proxy, SMALL), proxy


@pytest.mark.parametrize("fault", [500, 503, 429, "lose", "refuse"])
def test_every_call_survives_a_storm(proxied: tuple[Storage, FaultyProxy], fault: str | int) -> None:
    storage, proxy = proxied
    data = noise(2 * SMALL_PART + 5)

    def storm(lasts: int) -> None:
        proxy.faults = times(lasts, fault)

    storm(3)
    storage.write_pack("p/data.pack", memoryview(data))
    storm(3)
    storage.create("claim", b"mine")
    storm(3)
    assert storage.list() == ["claim", "p"]
    storm(3)
    assert storage.size("p/data.pack") == len(data)
    storm(7)  # of eight attempts the last succeeds
    assert storage.read("claim") == b"mine"
    storm(3)
    found = bytearray(len(data))
    storage.read_into("p/data.pack", 0, memoryview(found))
    assert found == data
    storm(3)
    storage.delete_tree("p")
    storm(3)
    storage.delete("claim")
    assert storage.list() == []


def test_an_outage_that_lasts_is_logged_once(moto_s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    """For all folders together; again when the server has answered in between."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = through(moto_s3, proxy, replace(SMALL, silence=0.0))
        for folder, warnings in ((storage, 1), (storage.at("below"), 2)):
            proxy.faults = times(3, 503)
            folder.write("x", b"x")
            assert caplog.text.count("the server answered 503") == warnings
            assert caplog.text.count("trying again for up to 1 s") == warnings


def test_a_refused_connection_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The endpoint, and the reason, in the warning and in the error."""
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        options = {"key": "k", "secret": "s", "endpoint_url": endpoint}
        storage = open_s3("bucket/run", options, settings=replace(SMALL, silence=0.0))
        with pytest.raises(
            StorageError, match=r"^s3://bucket/run: cannot reach .*after 8 attempts"
        ) as caught:
            storage.exclusive()
    assert type(caught.value) is OutOfReachError
    (record,) = [record for record in caplog.records if record.name == "shardckpt"]
    message = record.getMessage()
    assert message == f"cannot reach {endpoint} (connection refused), trying again for up to 1 s"


@pytest.mark.parametrize("retries", [{"total_max_attempts": 3}, {"max_attempts": 2}])
def test_a_storm_that_does_not_end_is_an_error(moto_s3: S3Server, retries: dict[str, int]) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = through(moto_s3, proxy, SMALL, retries=retries)
        proxy.faults = lambda _method, _path: 503
        with pytest.raises(StorageError, match=r"claim: the server answered 503.*after 3 attempts"):
            storage.read("claim")
        assert proxy.count("GET", "claim") == len(proxy.requests) == 3
        with pytest.raises(StorageError, match="503"):
            storage.write("claim", b"")
        assert proxy.count("PUT") == 3


def test_what_does_not_pass_is_not_tried_again(proxied: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = proxied
    for status in (400, 403, 501):
        proxy.requests.clear()
        proxy.faults = lambda _method, _path, status=status: status
        with pytest.raises(StorageError):
            storage.write("file", b"x")
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("fault", ["lose", "refuse", 503])
def test_one_part_of_an_upload_fails_once(proxied: tuple[Storage, FaultyProxy], fault: str | int) -> None:
    storage, proxy = proxied
    data = noise(3 * SMALL_PART)
    proxy.faults = once("PUT", fault, "partNumber=2")
    seen: list[tuple[int, int]] = []
    storage.write_pack("data.pack", memoryview(data), lambda *block: seen.append(block))
    assert proxy.count("PUT", "partNumber=2") == 2
    assert proxy.count("PUT") == 4
    assert seen == [(0, SMALL_PART), (SMALL_PART, 2 * SMALL_PART), (2 * SMALL_PART, 3 * SMALL_PART)]
    assert storage.read("data.pack") == data


@pytest.mark.parametrize("fault", ["cut", "reset", "slow"])
def test_an_answer_breaks_off_or_is_slow(proxied: tuple[Storage, FaultyProxy], fault: str) -> None:
    storage, proxy = proxied
    data = noise(SMALL_PART)
    storage.write("file", data)
    proxy.faults = once("GET", fault)
    assert storage.read("file") == data
    proxy.faults = once("GET", fault)
    found = bytearray(SMALL_PART - 1000)
    storage.read_into("file", 1000, memoryview(found))
    assert found == data[1000:]


def test_an_answer_that_always_breaks_off(moto_s3: S3Server) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = through(moto_s3, proxy, SMALL, retries={"total_max_attempts": 2})
        storage.write("file", noise(10_000))
        proxy.faults = lambda method, _path: "cut" if method == "GET" else None
        for ask in (
            lambda: storage.read("file"),
            lambda: storage.read_into("file", 0, memoryview(bytearray(10_000))),
        ):
            with pytest.raises(StorageError, match=r"file: the connection failed.*after 2 attempts"):
                ask()


def test_a_server_that_does_not_answer(moto_s3: S3Server) -> None:
    """Each attempt takes as long as the options say."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = through(moto_s3, proxy, SMALL, read_timeout=0.2, retries={"total_max_attempts": 2})
        storage.write("file", b"x")
        proxy.faults = once("GET", "ignore")
        assert storage.read("file") == b"x"
        proxy.faults = lambda _method, _path: "ignore"
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"file: the connection failed.*[Tt]imeout"):
            storage.read("file")
        assert 0.4 <= time.monotonic() - began < 10


def test_an_upload_that_fails_is_aborted(moto_s3: S3Server) -> None:
    """Nothing is left that nobody sees, and everybody pays for."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = through(moto_s3, proxy, SMALL, retries={"total_max_attempts": 2})
        proxy.faults = lambda method, path: 503 if method == "PUT" and "partNumber=3" in path else None
        with pytest.raises(StorageError, match=r"data\.pack.*503"):
            storage.write_pack("data.pack", memoryview(bytes(4 * SMALL_PART)))
    files = fsspec.filesystem("s3", **moto_s3.options)
    found = files.call_s3("list_multipart_uploads", Bucket=moto_s3.bucket)
    assert not [upload for upload in found.get("Uploads", []) if storage.url in f"s3://x/{upload['Key']}"]
    assert open_storage(storage.url, moto_s3.options).list() == []


def test_what_before_raises_ends_an_upload(proxied: tuple[Storage, FaultyProxy]) -> None:
    storage, proxy = proxied

    def before(start: int, _stop: int) -> None:
        if start:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        storage.write_pack("data.pack", memoryview(bytes(3 * SMALL_PART)), before)
    assert proxy.count("DELETE", "uploadId=") == 1
    assert storage.list() == []


def test_an_upload_copies_no_part(moto_s3: S3Server) -> None:
    """Parts go from the buffer to the connection: however large the pack, little memory is needed."""
    storage = open_storage(moto_s3.url(), moto_s3.options)
    storage.write("ready", b"")
    with mmap.mmap(-1, 5 * PART) as memory, memoryview(memory) as view:
        tracemalloc.start()
        try:
            storage.write_pack("data.pack", view)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert storage.size("data.pack") == 5 * PART
    assert peak < PART


def test_a_bit_flipped_on_the_way_is_found(moto_s3: S3Server) -> None:
    state = {"w": torch.arange(100_000)}
    url = moto_s3.url("flipped")
    save(url, state, storage_options=moto_s3.options)
    with faulty_proxy(moto_s3.endpoint) as proxy:
        options = {**moto_s3.options, "endpoint_url": proxy.endpoint}
        proxy.faults = lambda method, path: "flip" if method == "GET" and "data.pack" in path else None
        into = {"w": torch.zeros(100_000, dtype=torch.int64)}
        with pytest.raises(CorruptError, match=r"data\.pack"):
            load(url, into, storage_options=options)
        assert not into["w"].any()
