"""What the tests of storages share: content, faults of requests, racing processes."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardckpt.storage import Storage, open_storage
from shardckpt.storage.s3 import open_s3
from shardckpt.storage.s3_settings import S3Settings
from tests.kit.servers import FaultyProxy, S3Server

PART = 16 << 20


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def noise(size: int) -> bytes:
    """Bytes of which no two blocks are alike, always the same."""
    block = bytes(range(256)) * 16
    pieces = [n.to_bytes(8, "little") + block[8:] for n in range(-(-size // 4096))]
    return b"".join(pieces)[:size]


def through(
    server: S3Server, proxy: FaultyProxy, settings: S3Settings | None = None, **config: Any
) -> Storage:
    """A storage behind the proxy, with these settings, and this configuration of botocore."""
    options = {**server.options, "endpoint_url": proxy.endpoint, "config_kwargs": config}
    return open_s3(server.url("proxied").removeprefix("s3://"), options, settings=settings)


def times(count: int, fault: str | int) -> Callable[[str, str], str | int | None]:
    """Spoil the first `count` requests."""
    left = itertools.count(count, -1)
    return lambda _method, _path: fault if next(left) > 0 else None


def once(method: str, fault: str | int, part: str = "") -> Callable[[str, str], str | int | None]:
    """Spoil the first request of this method whose path contains `part`."""
    lock = threading.Lock()
    left = [fault]

    def decide(asked: str, path: str) -> str | int | None:
        with lock:
            return left.pop() if asked == method and part in path and left else None

    return decide


def race_processes(url: str, options: dict[str, Any] | None) -> None:
    context = multiprocessing.get_context("spawn")
    racers = 4
    start, results = context.Barrier(racers), context.SimpleQueue()
    processes = [
        context.Process(target=_race, args=(url, options, n, start, results)) for n in range(racers)
    ]
    for process in processes:
        process.start()
    won = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    rounds = len(won[0])
    for number in range(rounds):
        winners = [n for n in won if won[n][number]]
        assert len(winners) == 1
        assert open_storage(url, options).read(f"claim-{number}") == b"%d" % winners[0]


def _race(url: str, options: dict[str, Any] | None, number: int, start: Any, results: Any) -> None:
    storage = open_storage(url, options)
    storage.list()  # the client is ready
    won = []
    for claim in range(5):
        start.wait(60)
        try:
            storage.create(f"claim-{claim}", b"%d" % number)
            won.append(True)
        except FileExistsError:
            won.append(False)
    results.put((number, won))
