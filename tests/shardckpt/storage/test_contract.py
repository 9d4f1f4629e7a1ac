"""What every storage promises, on real ones."""

from __future__ import annotations

import itertools
import mmap
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shardckpt.errors import (
    CorruptError,
    StorageError,
)
from shardckpt.storage import Storage, open_storage
from tests.kit.faults import FaultyStorage, Killed
from tests.kit.servers import S3Server
from tests.shardckpt.storage.helpers import PART, noise

RACERS = 8


@pytest.fixture(params=["local", "memory", "moto", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    kind: str = request.param
    if kind == "local":
        return open_storage(tmp_path / "run")
    if kind == "memory":
        return open_storage(f"memory://{tmp_path.name}-{time.monotonic_ns()}")
    server: S3Server = request.getfixturevalue(f"{kind}_s3")
    return open_storage(server.url("contract"), server.options)


def test_is_a_storage(store: Storage) -> None:
    assert isinstance(store, Storage)
    assert open_storage(store) is store


def test_url_names_the_place_and_opens_it_again(store: Storage) -> None:
    below = store.at("a/b")
    assert below.url == f"{store.url}/a/b"
    assert store.at("").url == store.url


def test_write_and_read(store: Storage) -> None:
    store.write("folder/file", b"one")
    assert store.read("folder/file") == b"one"
    assert store.at("folder").read("file") == b"one"
    assert store.size("folder/file") == 3
    store.write("folder/file", memoryview(b"another"))
    assert store.read("folder/file") == b"another"
    store.write("folder/empty", b"")
    assert store.read("folder/empty") == b""
    assert store.size("folder/empty") == 0


def test_read_of_a_range_is_a_slice(store: Storage) -> None:
    data = b"0123456789"
    store.write("file", data)
    for start in (0, 3, 9, 10, 15):
        for stop in (None, 0, 3, 7, 10, 12, 20):
            assert store.read("file", start, stop) == data[start:stop], (start, stop)
    store.write("empty", b"")
    assert store.read("empty", 0, 5) == b""


def test_read_into(store: Storage) -> None:
    store.write("file", b"0123456789")
    buffer = bytearray(b"....")
    store.read_into("file", 3, memoryview(buffer))
    assert buffer == b"3456"
    store.read_into("file", 6, memoryview(buffer)[1:3])
    assert buffer == b"3676"
    store.read_into("file", 10, memoryview(bytearray()))


def test_a_truncated_file_is_corrupt(store: Storage) -> None:
    """The message says which file, where, how much was wanted, and how much there is."""
    store.write("folder/file", b"0123456789")
    for offset, found in ((7, 3), (10, 0), (50, 0)):
        with pytest.raises(CorruptError) as caught:
            store.read_into("folder/file", offset, memoryview(bytearray(5)))
        message = str(caught.value)
        assert f"{store.url}/folder/file is truncated" in message
        assert f"wanted 5 bytes at offset {offset}, found {found}" in message


def test_absent_files(store: Storage) -> None:
    store.write("folder/file", b"x")
    for path in ("none", "folder/none", "none/none", "folder"):
        asks: list[Callable[[str], object]] = [
            lambda path: store.read(path),
            lambda path: store.read(path, 1, 2),
            lambda path: store.size(path),
            lambda path: store.read_into(path, 0, memoryview(bytearray(1))),
        ]
        for ask in asks:
            with pytest.raises(FileNotFoundError) as caught:
                ask(path)
            assert f"{store.url}/{path}" in str(caught.value)
            assert not isinstance(caught.value, StorageError)


def test_create_leaves_what_is_there(store: Storage) -> None:
    store.create("folder/file", b"first")
    assert store.read("folder/file") == b"first"
    if store.exclusive():
        with pytest.raises(FileExistsError, match="folder/file"):
            store.create("folder/file", b"second")
        assert store.read("folder/file") == b"first"


def test_exclusive_leaves_nothing_behind(store: Storage, request: pytest.FixtureRequest) -> None:
    assert store.exclusive() is ("rclone" not in request.node.name)
    assert store.at("below").exclusive() is store.exclusive()
    assert store.list() == []


def test_one_of_many_racing_threads_creates(store: Storage) -> None:
    if not store.exclusive():
        pytest.skip("this store has no conditional puts, and exclusive() says so")
    start = threading.Barrier(RACERS)

    def race(number: int) -> bool:
        start.wait()
        try:
            store.create("claim", b"%d" % number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as threads:
        won = list(threads.map(race, range(RACERS)))
    assert won.count(True) == 1
    assert store.read("claim") == b"%d" % won.index(True)


def test_list(store: Storage) -> None:
    assert store.list() == []
    assert store.list("none") == []
    for path in ("b/file", "a", "b/deep/er/file", "c-1/x", "c/x"):
        store.write(path, b"x")
    assert store.list() == ["a", "b", "c", "c-1"]
    assert store.list("b") == store.at("b").list() == ["deep", "file"]
    assert store.list("a") == []  # a file
    assert store.sizes() == {"a": 1, "b/deep/er/file": 1, "b/file": 1, "c-1/x": 1, "c/x": 1}
    assert store.sizes("b") == store.at("b").sizes() == {"deep/er/file": 1, "file": 1}
    assert store.sizes("a") == store.sizes("none") == store.sizes("b/dee") == {}
    assert store.list("b/dee") == []  # the beginning of a name is no folder


def test_delete(store: Storage) -> None:
    store.write("folder/one", b"x")
    store.write("folder/two", b"x")
    store.delete("folder/one")
    store.delete("folder/one")
    store.delete("none/none")
    assert store.list("folder") == ["two"]


def test_delete_tree(store: Storage) -> None:
    for path in ("a/one", "a/b/two", "a/b/c/three", "a-not/four", "five"):
        store.write(path, b"x")
    store.delete_tree("a")
    store.delete_tree("a")
    assert store.list() == ["a-not", "five"]
    store.write("a/again", b"x")
    assert store.read("a/again") == b"x"


@pytest.mark.parametrize("name", ["ü 雪", "a b", "100%", "%20", "a+b", "q?versionId=1", "#", "[x]*"])
def test_names_are_taken_literally(store: Storage, name: str) -> None:
    path = f"f {name}/{name}"
    store.create(path, b"x")
    store.write_pack(f"{path}.pack", memoryview(b"yz"))
    assert store.read(path) == b"x"
    assert store.size(f"{path}.pack") == 2
    assert store.list() == [f"f {name}"]
    assert store.list(f"f {name}") == sorted([name, f"{name}.pack"])
    store.delete(path)
    store.delete_tree(f"f {name}")
    assert store.list(f"f {name}") == []


@pytest.mark.parametrize("path", ["/abs", "../x", "a/../../x", "a//b", "a/", ".", "./a", "a\0b"])
def test_paths_never_leave_the_folder(store: Storage, path: str) -> None:
    for ask in (store.read, store.size, store.at, store.list, store.delete, store.delete_tree):
        with pytest.raises(StorageError, match="a path below"):
            ask(path)
    with pytest.raises(StorageError, match="a path below"):
        store.write(path, b"")


@pytest.mark.parametrize("size", [0, 1, 5000, PART, PART + 1])
def test_packs(store: Storage, size: int) -> None:
    """Also of more than one part, and in place of a larger one."""
    data = noise(size)
    store.write("p/data.pack", b"z" * 6000)
    store.write_pack("p/data.pack", memoryview(data))
    assert store.size("p/data.pack") == size
    found = bytearray(size)
    store.read_into("p/data.pack", 0, memoryview(found))
    assert found == data
    middle = bytearray(min(size, 3000))
    store.read_into("p/data.pack", size - len(middle), memoryview(middle))
    assert middle == data[size - len(middle) :]
    assert store.list("p") == ["data.pack"]


def test_a_pack_may_be_any_contiguous_buffer(store: Storage) -> None:
    for shape in ((3, 1000), (1,), (), (0,), (3, 0)):
        array = np.full(shape, 7, dtype=np.float32)
        for put in (store.write_pack, store.write):
            put("pack", array.data)
            found = np.zeros_like(array)
            store.read_into("pack", 0, found.data)
            assert (found == array).all()


@pytest.mark.parametrize("size", [0, 5000, 2 * PART + 4097])
def test_before_each_block_of_a_pack(store: Storage, size: int) -> None:
    """It sees every byte once, in order, and what it changes is what is stored."""
    memory = mmap.mmap(-1, size + 4096)
    view = memoryview(memory)[:size]
    seen: list[tuple[int, int]] = []

    def before(start: int, stop: int) -> None:
        seen.append((start, stop))
        view[start:stop] = noise(size)[start:stop]

    store.write_pack("pack", view, before)
    ends = [0, *(stop for _, stop in seen)]
    assert seen == list(itertools.pairwise(ends))
    assert ends[-1] == size
    assert ends == sorted(set(ends))
    assert store.read("pack") == noise(size)


def test_what_before_raises_is_raised(store: Storage) -> None:
    def before(start: int, _stop: int) -> None:
        raise ValueError(f"at {start}")

    with pytest.raises(ValueError, match="at 0"):
        store.write_pack("pack", memoryview(bytes(2 * PART)), before)


@pytest.mark.parametrize("lengths", [[], [0], [5], [4095, 0, 2, PART], [PART] * 2, [1 << 20] * 17 + [3]])
def test_pieces(store: Storage, lengths: list[int]) -> None:
    """The memory of one piece is used again for the next."""
    content = noise(sum(lengths))
    memory = bytearray(max(lengths, default=0))

    def pieces() -> Iterator[memoryview]:
        start = 0
        for length in lengths:
            memory[:length] = content[start : start + length]
            yield memoryview(memory)[:length]
            memory[:] = bytes(len(memory))
            start += length

    store.write("folder/p", b"earlier")
    store.write_pieces("folder/p", len(content), pieces())
    assert store.read("folder/p") == content
    assert store.sizes("folder") == {"p": len(content)}


def test_what_pieces_raise_is_raised_and_there_is_no_whole_file(store: Storage) -> None:
    def pieces() -> Iterator[memoryview]:
        yield memoryview(bytes(PART + 1))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        store.write_pieces("p", 2 * PART, pieces())
    assert store.sizes().get("p", 0) < 2 * PART
    store.write_pieces("p", 1, iter([memoryview(b"x")]))  # and again
    assert store.read("p") == b"x"


def test_fresh(store: Storage) -> None:
    """The same folder, whichever was written last, and a folder below it too."""
    store.write("a/b", b"one")
    fresh = store.fresh()
    assert isinstance(fresh, Storage)
    assert fresh.url == store.url
    assert fresh.read("a/b") == store.at("a").fresh().read("b") == b"one"
    store.write("a/b", noise(PART + 5))
    buffer = bytearray(PART)
    fresh.read_into("a/b", 5, memoryview(buffer))
    assert buffer == noise(PART + 5)[5:]
    assert fresh.size("a/b") == PART + 5
    assert fresh.list() == ["a"]
    fresh.write("c", b"two")
    assert store.read("c") == b"two"


def test_several_threads(store: Storage) -> None:
    def work(number: int) -> bytes:
        below = store.at(f"rank-{number}")
        below.write_pack("data.pack", memoryview(noise(10_000 + number)))
        below.create("part.json", b"%d" % number)
        return below.read("part.json") + below.read("data.pack", 0, 4)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(work, range(8)))
    assert results == [b"%d" % n + noise(4) for n in range(8)]
    assert store.list() == [f"rank-{n}" for n in range(8)]


def test_travels_to_another_process(store: Storage) -> None:
    assert pickle.loads(pickle.dumps(store.at("x"))).url == store.at("x").url


def test_dies_and_records_through_the_fault_wrapper(store: Storage) -> None:
    faulty = FaultyStorage(store, fail_at=2)
    assert isinstance(faulty, Storage)
    faulty.at("a").write("one", b"1")
    for call in (
        lambda: faulty.create("two", b"2"),
        lambda: faulty.at("a").delete("one"),
        lambda: faulty.read("a/one"),
    ):
        with pytest.raises(Killed):
            call()
    assert faulty.calls == [("write", "a/one")]
    assert store.list() == ["a"]
