"""A transfer that hardly moves is given up and tried again; one that is slow but moves is not."""

from __future__ import annotations

import threading
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardckpt.errors import (
    OutOfReachError,
    StorageError,
)
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.limits import Limits, Patience
from shardckpt.storage.parallel import in_parallel
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy
from tests.shardckpt.storage.helpers import PART, noise, once


@pytest.mark.parametrize("fault", ["trickle", "ignore"])
def test_an_answer_that_trickles_is_given_up(moto_s3: S3Server, fault: str) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = _limited(moto_s3, proxy, transfer_deadline=0.5)
        open_storage(storage.url, moto_s3.options).write("file", noise(200_000))
        proxy.faults = lambda method, _path: fault if method == "GET" else None
        for ask in (
            lambda: storage.read("file"),
            lambda: storage.read_into("file", 0, memoryview(bytearray(200_000))),
        ):
            with pytest.raises(OutOfReachError, match=r"file: .*Gave up after \d attempts? in .*0\.5 s"):
                ask()


@pytest.mark.parametrize("fault", ["trickle up", "ignore"])
@pytest.mark.parametrize("size", [200_000, PART + 1])
def test_an_upload_that_trickles_is_given_up_and_aborted(moto_s3: S3Server, fault: str, size: int) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = _limited(moto_s3, proxy, transfer_deadline=2)
        proxy.faults = lambda method, _path: fault if method == "PUT" else None
        with pytest.raises(OutOfReachError, match="pack"):
            storage.write_pack("pack", memoryview(noise(size)))
        assert (proxy.count("DELETE", "uploadId") == 1) is (size > PART)
    assert open_storage(storage.url, moto_s3.options).list() == []


def test_another_connection_is_tried_before(moto_s3: S3Server) -> None:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = _limited(moto_s3, proxy, transfer_deadline=4)
        storage.write("file", noise(200_000))
        proxy.faults = once("GET", "trickle")
        assert storage.read("file") == noise(200_000)
        proxy.faults = once("PUT", "trickle up")
        storage.write("other", noise(200_000))


def test_a_slow_link_that_goes_on_is_no_fault(moto_s3: S3Server) -> None:
    """It takes longer than the deadline, at more than the least rate."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        proxy.pause = 0.3
        storage = _limited(moto_s3, proxy, transfer_deadline=2, transfer_least_rate=1000)
        storage.write("file", noise(100_000))
        proxy.faults = lambda _method, _path: "slow"
        found = bytearray(100_000)
        storage.read_into("file", 0, memoryview(found))
        assert found == noise(100_000)
        assert proxy.count("GET") == 1


def test_patience_is_kept_by_progress_alone() -> None:
    now = [0.0]
    patience = Patience(10, 100, lambda: now[0])
    assert patience.end == 10
    now[0] = 5
    patience.extend(100)  # a second's worth
    assert patience.end == 11
    patience.extend(50)  # of a later attempt
    assert patience.end == 11
    patience.extend(100_000)
    assert patience.end == 15  # never more than the deadline from now


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, (60, 8192)),
        ({"transfer_deadline": 5}, {"SHARDCKPT_TRANSFER_DEADLINE": "7"}, (5, 8192)),
        ({}, {"SHARDCKPT_TRANSFER_DEADLINE": "7", "SHARDCKPT_TRANSFER_LEAST_RATE": "10"}, (7, 10)),
    ],
)
def test_where_limits_come_from(
    options: dict[str, Any],
    environment: dict[str, str],
    expected: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    limits = Limits.of(options)
    assert (limits.deadline, limits.least_rate) == expected


@pytest.mark.parametrize("value", [0, -1, "soon", float("nan"), [1]])
def test_a_limit_that_is_none_is_refused(value: object) -> None:
    for url in ("s3://bucket/run", "memory://run"):
        with pytest.raises(StorageError, match="transfer_deadline must be a number of seconds above 0"):
            open_storage(url, {"transfer_deadline": value})


def test_a_file_system_that_hangs_is_given_up() -> None:
    """Also of those that only have calls which block."""
    release = threading.Event()

    class Hanging(MemoryFileSystem):  # type: ignore[misc]
        protocol = "hanging"

        def cat_file(self, *_args: Any, **_options: Any) -> bytes:
            release.wait()
            return b""

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    storage = open_storage("hanging://run", {"transfer_deadline": 0.2, "transfer_least_rate": 1e9})
    try:
        with pytest.raises(OutOfReachError, match=r"cannot read hanging://run/file: .*in time"):
            storage.read("file")
    finally:
        release.set()


def test_threads_that_wait_are_interrupted_together(moto_s3: S3Server) -> None:
    """What one of them has met with ends the wait of all: nobody sits out a dead server's time-outs."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        storage = _limited(moto_s3, proxy, transfer_deadline=3600)
        storage.write("file", b"x")
        asked = threading.Semaphore(0)

        def faults(_method: str, _path: str) -> str:
            asked.release()
            return "ignore"

        proxy.faults = faults

        def work(number: int) -> bytes:
            if number:
                return storage.read("file")
            for _ in range(2):
                asked.acquire()
            raise ValueError("enough")

        with pytest.raises(ValueError, match="enough"):
            in_parallel(work, [1, 2, 0], threads=3)


def _limited(server: S3Server, proxy: FaultyProxy, **limits: float) -> Storage:
    """A storage behind the proxy, with these limits."""
    return open_storage(server.url("limited"), {**server.options, "endpoint_url": proxy.endpoint, **limits})
