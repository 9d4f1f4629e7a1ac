"""How many requests object storage is sent: they are paid for, and each takes its time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import shardckpt
from shardckpt.loading.listing import list_checkpoints
from shardckpt.ranks.world import Alone
from shardckpt.run.index import INDEX
from shardckpt.storage import Storage, open_storage
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy
from tests.kit.worlds import Checkpoints
from tests.shardckpt.run.helpers import state_at

pytestmark = pytest.mark.usefixtures("no_saver")

LISTING = "list-type=2"


@pytest.fixture
def proxy(moto_s3: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(moto_s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def root(moto_s3: S3Server, proxy: FaultyProxy) -> Storage:
    storage = open_storage(moto_s3.url(), {**moto_s3.options, "endpoint_url": proxy.endpoint})
    storage.list()
    proxy.requests.clear()
    return storage


def sent(proxy: FaultyProxy) -> list[str]:
    """The requests since the last call: method, and what of a checkpoint they are about."""
    found = []
    for method, path in proxy.requests:
        name = path.partition("?")[0].rpartition("/")[2]
        found.append(f"{method} {'a listing' if LISTING in path else name}")
    proxy.requests.clear()
    return found


def test_a_save(root: Storage, proxy: FaultyProxy) -> None:
    shardckpt.save(root, state_at(1))
    assert sent(proxy) == [
        *["GET manifest.json"]
        * 2,  # is there a checkpoint? Before anything is copied, and before it is written
        "PUT data.pack",
        "PUT rank-00000.json",
        "HEAD data.pack",
        "PUT refs.json",
        "PUT manifest.json",
    ]


def test_a_save_into_a_run(root: Storage, proxy: FaultyProxy) -> None:
    checkpointer = Checkpoints(root, Alone(), keep_last=2)
    for step in (1, 2):
        checkpointer.save(step, state_at(step)).wait()
    sent(proxy)
    checkpointer.save(3, state_at(3)).wait()
    assert sent(proxy) == [
        "GET manifest.json",
        "PUT data.pack",
        "PUT rank-00000.json",
        "GET a listing",  # are the packs there?
        "PUT refs.json",
        "PUT manifest.json",
        *["GET a listing"] * 5,  # the run, its attempt, and three steps, of which two stay
        "DELETE manifest.json",
        "GET a listing",
        "POST bucket",
        "PUT index.json",
    ]
    checkpointer.close()


def test_a_restore(root: Storage, proxy: FaultyProxy) -> None:
    with Checkpoints(root, Alone()) as checkpointer:
        checkpointer.save(1, state_at(1)).wait()
    sent(proxy)
    checkpointer = Checkpoints(root, Alone())
    assert checkpointer.restore(state_at(0)) is not None
    assert sent(proxy) == [
        "GET a listing",  # the attempts
        "GET attempt.json",
        "GET lease.json",  # is its job at work?
        "PUT attempt.json",
        *["GET a listing"] * 4,  # the run, both attempts, and the step
        "GET manifest.json",
        "HEAD data.pack",
        "GET data.pack",
    ]
    checkpointer.close()


def test_a_list(root: Storage, proxy: FaultyProxy) -> None:
    """However many checkpoints there are: a listing has a thousand files, and an index all heads."""
    checkpointer = Checkpoints(root, Alone())
    for step in range(1, 13):
        checkpointer.save(step, state_at(step)).wait()
    sent(proxy)
    assert len(list_checkpoints(root)) == 12
    assert sorted(sent(proxy)) == [
        *["GET a listing"] * 4,  # the run, its attempt, its newest step, all its steps
        f"GET {INDEX}",
    ]
    checkpointer.close()


def test_a_list_without_an_index(root: Storage, proxy: FaultyProxy) -> None:
    """It reads the manifests, once."""
    with Checkpoints(root, Alone()) as checkpointer:
        for step in range(1, 13):
            checkpointer.save(step, state_at(step)).wait()
    root.delete(f"attempt-0001/{INDEX}")
    for requests in (4 + 1 + 12 + 1, 4 + 1):
        sent(proxy)
        assert len(list_checkpoints(root)) == 12
        assert len(sent(proxy)) == requests
