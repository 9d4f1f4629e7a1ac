"""What every storage promises, on real ones; and what each does when things go wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import mmap
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardckpt import load, save
from shardckpt.errors import (
    CorruptError,
    CredentialsError,
    InvalidUrlError,
    OutOfReachError,
    StorageError,
    StorageFullError,
)
from shardckpt.loading.parallel import in_parallel
from shardckpt.storage import LocalStorage, Storage, open_storage
from shardckpt.storage.limits import Limits, Patience
from tests.kit.faults import FaultyStorage, HookedStorage, Killed
from tests.kit.mounts import Mount, remount_read_only
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy

PART = 16 << 20
SMALL_PART = 100_000
RACERS = 8
MOUNTED = [pytest.param(kind, marks=pytest.mark.mounts) for kind in ("tmpfs", "ramfs")]


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


class TestContract:
    def test_is_a_storage(self, store: Storage) -> None:
        assert isinstance(store, Storage)
        assert open_storage(store) is store

    def test_url_names_the_place_and_opens_it_again(self, store: Storage) -> None:
        below = store.at("a/b")
        assert below.url == f"{store.url}/a/b"
        assert store.at("").url == store.url

    def test_write_and_read(self, store: Storage) -> None:
        store.write("folder/file", b"one")
        assert store.read("folder/file") == b"one"
        assert store.at("folder").read("file") == b"one"
        assert store.size("folder/file") == 3
        store.write("folder/file", memoryview(b"another"))
        assert store.read("folder/file") == b"another"
        store.write("folder/empty", b"")
        assert store.read("folder/empty") == b""
        assert store.size("folder/empty") == 0

    def test_read_of_a_range_is_a_slice(self, store: Storage) -> None:
        data = b"0123456789"
        store.write("file", data)
        for start in (0, 3, 9, 10, 15):
            for stop in (None, 0, 3, 7, 10, 12, 20):
                assert store.read("file", start, stop) == data[start:stop], (start, stop)
        store.write("empty", b"")
        assert store.read("empty", 0, 5) == b""

    def test_read_into(self, store: Storage) -> None:
        store.write("file", b"0123456789")
        buffer = bytearray(b"....")
        store.read_into("file", 3, memoryview(buffer))
        assert buffer == b"3456"
        store.read_into("file", 6, memoryview(buffer)[1:3])
        assert buffer == b"3676"
        store.read_into("file", 10, memoryview(bytearray()))

    def test_a_truncated_file_is_corrupt(self, store: Storage) -> None:
        """The message says which file, where, how much was wanted, and how much there is."""
        store.write("folder/file", b"0123456789")
        for offset, found in ((7, 3), (10, 0), (50, 0)):
            with pytest.raises(CorruptError) as caught:
                store.read_into("folder/file", offset, memoryview(bytearray(5)))
            message = str(caught.value)
            assert f"{store.url}/folder/file is truncated" in message
            assert f"wanted 5 bytes at offset {offset}, found {found}" in message

    def test_absent_files(self, store: Storage) -> None:
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

    def test_create_leaves_what_is_there(self, store: Storage) -> None:
        store.create("folder/file", b"first")
        assert store.read("folder/file") == b"first"
        if store.exclusive():
            with pytest.raises(FileExistsError, match="folder/file"):
                store.create("folder/file", b"second")
            assert store.read("folder/file") == b"first"

    def test_exclusive_is_told_and_leaves_nothing_behind(
        self, store: Storage, request: pytest.FixtureRequest
    ) -> None:
        assert store.exclusive() is ("rclone" not in request.node.name)
        assert store.at("below").exclusive() is store.exclusive()
        assert store.list() == []

    def test_one_of_many_racing_threads_creates(self, store: Storage) -> None:
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

    def test_list(self, store: Storage) -> None:
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

    def test_delete(self, store: Storage) -> None:
        store.write("folder/one", b"x")
        store.write("folder/two", b"x")
        store.delete("folder/one")
        store.delete("folder/one")
        store.delete("none/none")
        assert store.list("folder") == ["two"]

    def test_delete_tree(self, store: Storage) -> None:
        for path in ("a/one", "a/b/two", "a/b/c/three", "a-not/four", "five"):
            store.write(path, b"x")
        store.delete_tree("a")
        store.delete_tree("a")
        assert store.list() == ["a-not", "five"]
        store.write("a/again", b"x")
        assert store.read("a/again") == b"x"

    @pytest.mark.parametrize("name", ["ü 雪", "a b", "100%", "%20", "a+b", "q?versionId=1", "#", "[x]*"])
    def test_names_are_taken_literally(self, store: Storage, name: str) -> None:
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
    def test_paths_never_leave_the_folder(self, store: Storage, path: str) -> None:
        for ask in (store.read, store.size, store.at, store.list, store.delete, store.delete_tree):
            with pytest.raises(StorageError, match="a path below"):
                ask(path)
        with pytest.raises(StorageError, match="a path below"):
            store.write(path, b"")

    @pytest.mark.parametrize("size", [0, 1, 5000, PART, PART + 1])
    def test_packs(self, store: Storage, size: int) -> None:
        """Also of more than one part, and in place of a larger one."""
        data = _noise(size)
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

    def test_a_pack_may_be_any_contiguous_buffer(self, store: Storage) -> None:
        for shape in ((3, 1000), (1,), (), (0,), (3, 0)):
            array = np.full(shape, 7, dtype=np.float32)
            for put in (store.write_pack, store.write):
                put("pack", array.data)
                found = np.zeros_like(array)
                store.read_into("pack", 0, found.data)
                assert (found == array).all()

    @pytest.mark.parametrize("size", [0, 5000, 2 * PART + 4097])
    def test_before_each_block_of_a_pack(self, store: Storage, size: int) -> None:
        """It sees every byte once, in order, and what it changes is what is stored."""
        memory = mmap.mmap(-1, size + 4096)
        view = memoryview(memory)[:size]
        told: list[tuple[int, int]] = []

        def before(start: int, stop: int) -> None:
            told.append((start, stop))
            view[start:stop] = _noise(size)[start:stop]

        store.write_pack("pack", view, before)
        ends = [0, *(stop for _, stop in told)]
        assert told == list(itertools.pairwise(ends))
        assert ends[-1] == size
        assert ends == sorted(set(ends))
        assert store.read("pack") == _noise(size)

    def test_what_before_raises_is_raised(self, store: Storage) -> None:
        def before(start: int, _stop: int) -> None:
            raise ValueError(f"at {start}")

        with pytest.raises(ValueError, match="at 0"):
            store.write_pack("pack", memoryview(bytes(2 * PART)), before)

    @pytest.mark.parametrize(
        "lengths", [[], [0], [5], [4095, 0, 2, PART], [PART] * 2, [1 << 20] * 17 + [3]]
    )
    def test_pieces(self, store: Storage, lengths: list[int]) -> None:
        """The memory of one piece is used again for the next."""
        content = _noise(sum(lengths))
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

    def test_what_pieces_raise_is_raised_and_there_is_no_whole_file(self, store: Storage) -> None:
        def pieces() -> Iterator[memoryview]:
            yield memoryview(bytes(PART + 1))
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            store.write_pieces("p", 2 * PART, pieces())
        assert store.sizes().get("p", 0) < 2 * PART
        store.write_pieces("p", 1, iter([memoryview(b"x")]))  # and again
        assert store.read("p") == b"x"

    def test_fresh(self, store: Storage) -> None:
        """The same folder, whichever was written last, and a folder below it too."""
        store.write("a/b", b"one")
        fresh = store.fresh()
        assert isinstance(fresh, Storage)
        assert fresh.url == store.url
        assert fresh.read("a/b") == store.at("a").fresh().read("b") == b"one"
        store.write("a/b", _noise(PART + 5))
        buffer = bytearray(PART)
        fresh.read_into("a/b", 5, memoryview(buffer))
        assert buffer == _noise(PART + 5)[5:]
        assert fresh.size("a/b") == PART + 5
        assert fresh.list() == ["a"]
        fresh.write("c", b"two")
        assert store.read("c") == b"two"

    def test_several_threads(self, store: Storage) -> None:
        def work(number: int) -> bytes:
            below = store.at(f"rank-{number}")
            below.write_pack("data.pack", memoryview(_noise(10_000 + number)))
            below.create("part.json", b"%d" % number)
            return below.read("part.json") + below.read("data.pack", 0, 4)

        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(work, range(8)))
        assert results == [b"%d" % n + _noise(4) for n in range(8)]
        assert store.list() == [f"rank-{n}" for n in range(8)]

    def test_travels_to_another_process(self, store: Storage) -> None:
        assert pickle.loads(pickle.dumps(store.at("x"))).url == store.at("x").url

    def test_dies_and_records_through_the_fault_wrapper(self, store: Storage) -> None:
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


class TestOpening:
    def test_local_spellings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        for url in ("~/run", "run", "./x/../run", tmp_path / "run", f"file://{tmp_path}/run/"):
            storage = open_storage(url)
            assert isinstance(storage, LocalStorage)
            assert storage.url == str(tmp_path / "run")

    def test_s3_spellings(self) -> None:
        for url in ("s3://bucket/a/b", "s3://bucket/a/b/", "s3a://bucket/a/b"):
            assert open_storage(url).url == "s3://bucket/a/b"
        assert open_storage("s3://bucket").url == open_storage("s3://bucket/").url == "s3://bucket"

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("", "empty"),
            ("s3://", "bucket is missing"),
            ("s3://bucket/a/../b", "a path below"),
            ("s4://bucket/run", r"unknown protocol 's4'; did you mean s3://[?]$"),
            ("fiel:///data/run", r"unknown protocol 'fiel'; did you mean file://[?]$"),
            ("s_3://bucket/run", r"unknown protocol 's_3'; did you mean s3://[?]$"),
            ("file://", "file:// names no folder"),
            ("xyzzy://bucket/run", r"unknown protocol 'xyzzy'; object stores are s3://, gs:// and az://$"),
            ("gs://bucket/run", "a package is missing: .*gcsfs"),
            ("simplecache::s3://bucket/run", "chained"),
        ],
    )
    def test_a_wrong_url_says_what_is_wrong(self, url: str, said: str) -> None:
        with pytest.raises(StorageError, match=said) as caught:
            open_storage(url)
        assert url in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "path"),
        [
            ("file://localhost/data/run", "/data/run"),
            ("FILE:///data/run/", "/data/run"),
            ("file:////data/run", "/data/run"),
            ("local:///data/run", "/data/run"),
            ("file:///data/a%20b?c#d", "/data/a%20b?c#d"),
            ("//data/run", "/data/run"),
            ("/data//run///", "/data/run"),
            ("/data/my run ", "/data/my run "),
            ("/data/run?x=1#2", "/data/run?x=1#2"),
        ],
    )
    def test_local_urls(self, url: str, path: str) -> None:
        """Nothing is decoded, and no host but this one is meant."""
        storage = open_storage(url)
        assert isinstance(storage, LocalStorage)
        assert storage.url == path

    @pytest.mark.parametrize("url", ["S3://bucket/run", "S3A://bucket/run/", "s3://bucket//run//"])
    def test_protocols_in_capitals(self, url: str) -> None:
        assert open_storage(url).url == "s3://bucket/run"

    def test_what_a_key_may_have_in_it(self) -> None:
        for name in ("run#3", "a?b", "my run", "100%", "r\u00fcn"):
            assert open_storage(f"s3://bucket/{name}").url == f"s3://bucket/{name}"

    def test_a_host_in_the_url(self) -> None:
        """Those who open such URLs go by the host, the user and the port in it."""
        seen: list[dict[str, Any]] = []

        class Hosted(MemoryFileSystem):  # type: ignore[misc]
            protocol = "hosted"

            def __init__(self, **options: Any) -> None:
                super().__init__()
                seen.append(options)

            @staticmethod
            def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
                return {"host": path.split("/")[2]}

        fsspec.register_implementation("hosted", Hosted, clobber=True)
        storage = open_storage("hosted://server:22/data/run/", {"timeout": 3})
        assert storage.url == storage.fresh().url == "hosted://server:22/data/run"
        assert seen == [{"host": "server:22", "timeout": 3}] * 2

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("file://host/data/run", r"the machine 'host': did you mean file:///host/data/run\?"),
            ("file://data/run", r"did you mean file:///data/run\?"),
            ("s3:///bucket/run", r"did you mean s3://bucket/run\?"),
            ("gs:///bucket/run", r"did you mean gs://bucket/run\?"),
            ("az://", r"the bucket is missing"),
            (" s3://bucket/run", r"white space.*did you mean s3://bucket/run\?"),
            ("s3://bucket/run\n", r"white space.*did you mean s3://bucket/run\?"),
            ("s3://my bucket/run", r"white space in 'my bucket'"),
            ("S3:/bucket", r"did you mean s3://bucket\?"),
            ("FILE:/data", r"did you mean file:///data\?"),
            ("gs://bucket/run?generation=1", r"no meaning"),
            ("az://box/run#1", r"no meaning"),
            ("https://host/run?sig=1", r"no meaning"),
            ("~nobody-of-this-name/run", r"home"),
            ("a\0b", r"null"),
            ("   ", "empty"),
        ],
    )
    def test_what_is_refused_and_what_is_meant(self, url: str, said: str) -> None:
        with pytest.raises(StorageError, match=said):
            open_storage(url)

    @pytest.mark.parametrize("url", ["s3://key:secret@bucket/run", "sftp://user:secret@host/run"])
    def test_a_password_is_not_repeated(self, url: str) -> None:
        with pytest.raises(StorageError, match="must not have a password") as caught:
            open_storage(url)
        assert "secret" not in str(caught.value)

    def test_a_path_object_that_was_a_url(self) -> None:
        with pytest.raises(StorageError, match=r"did you mean s3://bucket/run\?"):
            open_storage(Path("s3://bucket/run"))

    @pytest.mark.parametrize(
        ("url", "meant"),
        [
            ("s3:/b/run", "s3://b/run"),
            ("s3:b", "s3://b"),
            ("gs:/b", "gs://b"),
            ("file:/d/x", "file:///d/x"),
            ("file:d/x", "d/x"),
        ],
    )
    def test_a_url_that_lacks_a_slash_is_no_folder(self, url: str, meant: str) -> None:
        with pytest.raises(InvalidUrlError, match=f"^{url}: did you mean {meant}[?]"):
            open_storage(url)

    def test_names_with_a_colon(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("run:1", "lr:/x", "./s3:/x", "a/s3:/x", "C:/run", "s3x:/y", "17:30:05"):
            assert open_storage(name).url == str((tmp_path / name).absolute())

    @pytest.mark.parametrize("thing", [None, 3, b"s3://bucket/run", ["run"]])
    def test_what_is_no_url(self, thing: Any) -> None:
        with pytest.raises(
            TypeError, match=rf"is neither a URL nor a path: it is a {type(thing).__name__}"
        ):
            open_storage(thing)

    def test_a_storage_of_the_users_own_that_lacks_methods(self) -> None:
        class Mine(HookedStorage):
            write_pieces = property()  # type: ignore[assignment]

        with pytest.raises(TypeError, match=r"the Mine is no Storage: it lacks write_pieces \("):
            open_storage(Mine(open_storage("memory://mine"), lambda *_: None))

    def test_options_for_a_local_path_are_a_forgotten_protocol(self) -> None:
        with pytest.raises(StorageError, match="is 's3://' missing before it"):
            open_storage("bucket/run", {"key": "k"})

    def test_local_storage_imports_no_client(self) -> None:
        """Opening and using a local folder is fast: neither fsspec nor s3fs is imported."""
        program = (
            "import sys; from shardckpt.storage import open_storage;"
            "open_storage('/nowhere').list();"
            "print([m for m in ('fsspec', 's3fs', 'botocore', 'asyncio') if m in sys.modules])"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        assert found.stdout.strip() == b"[]"


class TestLocal:
    def test_only_whole_files_are_ever_there(self, tmp_path: Path) -> None:
        """What a writer that died half-way left is not listed, and does not hinder the next."""
        storage = open_storage(tmp_path)
        storage.write("a", b"x")
        (tmp_path / ".shardckpt-0123").write_bytes(b"half")
        assert storage.list() == ["a"]
        storage.write("a", b"y")
        storage.create("b", b"z")
        assert _names(tmp_path) == [".shardckpt-0123", "a", "b"]

    def test_a_reader_of_the_earlier_pack_is_not_disturbed(self, tmp_path: Path) -> None:
        storage = open_storage(tmp_path)
        storage.write_pack("pack", memoryview(b"old" * 5000))
        with (tmp_path / "pack").open("rb") as file:
            storage.write_pack("pack", memoryview(b"new"))
            assert file.read() == b"old" * 5000
        assert storage.read("pack") == b"new"

    def test_links_are_removed_and_not_followed(self, tmp_path: Path) -> None:
        storage = open_storage(tmp_path / "run")
        storage.write("a/x", b"x")
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "precious").write_bytes(b"x")
        (tmp_path / "run/a/link").symlink_to(outside)
        storage.delete_tree("a")
        assert storage.list() == []
        assert _names(outside) == ["precious"]

    def test_a_file_where_a_folder_is_needed(self, tmp_path: Path) -> None:
        storage = open_storage(tmp_path)
        storage.write("a", b"x")
        for put in (storage.write, storage.create):
            with pytest.raises(StorageError, match=r"a is in the way"):
                put("a/b", b"")
        storage.write("folder/x", b"x")
        with pytest.raises(StorageError, match="folder"):
            storage.write("folder", b"")

    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        blocks=st.integers(0, 3),
        rest=st.sampled_from([0, 1, 63, 4095]) | st.integers(0, 4095),
        misaligned=st.sampled_from([0, 1, 64, 4095]),
    )
    @pytest.mark.parametrize("where", ["disk", *MOUNTED])
    def test_packs_of_odd_sizes_and_addresses(
        self, folder: Path, blocks: int, rest: int, misaligned: int
    ) -> None:
        """Past the page cache on a disk, and on ramfs, which has no such way and no reservation."""
        size = blocks * 4096 + rest
        memory = mmap.mmap(-1, 1 << 16)
        view = memoryview(memory)[misaligned : misaligned + size]
        view[:] = _noise(size)
        open_storage(folder).write_pack("pack", view)
        assert (folder / "pack").read_bytes() == view

    @pytest.mark.parametrize("misaligned", [0, 1])
    @pytest.mark.parametrize("where", ["disk", MOUNTED[1]])
    def test_packs_of_many_chunks(self, folder: Path, misaligned: int) -> None:
        size = 3 * PART + 4097
        memory = mmap.mmap(-1, size + 1)
        memory[misaligned : misaligned + size] = _noise(size)
        view = memoryview(memory)[misaligned : misaligned + size]
        open_storage(folder).write_pack("pack", view)
        with (folder / "pack").open("rb") as file:
            assert file.read() == view

    def test_packs_do_not_fill_the_page_cache(self, tmp_path: Path) -> None:
        probe = tmp_path / "probe"
        try:
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
        except OSError as error:
            pytest.skip(f"this file system has no O_DIRECT: {error}")
        open_storage(tmp_path).write_pack("pack", memoryview(bytes(PART)))
        with (tmp_path / "pack").open("rb") as file, pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(4096)], PART - 4096, os.RWF_NOWAIT)

    def test_one_of_many_racing_processes_creates(self, tmp_path: Path) -> None:
        _race_processes(str(tmp_path / "run"), None)

    def test_a_full_disk_is_found_before_anything_is_written(self, small_disk: Path) -> None:
        storage = open_storage(small_disk)
        size = 8 << 20
        with pytest.raises(StorageFullError) as caught:
            storage.write_pack("p/pack", memoryview(bytes(size)))
        message = str(caught.value)
        assert f"{small_disk}/p/pack" in message
        assert f"wanted {size} bytes" in message
        free = os.statvfs(small_disk)
        assert f"{free.f_bavail * free.f_frsize} are free" in message
        assert caught.value.errno == errno.ENOSPC
        assert _names(small_disk / "p") == []

    def test_a_full_disk_leaves_no_half_files_and_the_earlier_one(self, small_disk: Path) -> None:
        storage = open_storage(small_disk)
        storage.write("file", b"earlier")
        for put in (storage.write, storage.create):
            with pytest.raises(StorageFullError):
                put("file", bytes(8 << 20))
        assert _names(small_disk) == ["file"]
        assert storage.read("file") == b"earlier"

    def test_a_read_only_disk(self, small_disk: Path) -> None:
        storage = open_storage(small_disk)
        storage.write("file", b"x")
        storage.write("folder/other", b"x")
        remount_read_only(small_disk, options="size=4m")
        for call in _mutations(storage):
            with pytest.raises(StorageError, match=r"read-only.*Choose another") as caught:
                call()
            assert str(small_disk) in str(caught.value)
        assert storage.read("file") == b"x"

    def test_no_permission(self, tmp_path: Path, unprivileged: Callable[[], Any]) -> None:
        storage = open_storage(tmp_path / "run")
        storage.write("file", b"x")
        storage.write("folder/other", b"x")
        for folder in ("run/folder", "run"):  # its owner may write into what is in it, but for this
            (tmp_path / folder).chmod(0o500)
        with unprivileged():
            for call in _mutations(storage):
                with pytest.raises(CredentialsError, match="permissions") as caught:
                    call()
                assert str(tmp_path) in str(caught.value)


class _Sink(AbstractFileSystem):  # type: ignore[misc]
    """Keeps nothing of what is written to it but the number of bytes."""

    protocol = "sink"
    written: ClassVar[dict[str, int]] = {}

    def _open(self, path: str, mode: str = "rb", block_size: int = 0, **_: Any) -> Any:
        return _SinkFile(self, path, mode, block_size)

    def rm_file(self, path: str) -> None:
        self.written.pop(path, None)


class _SinkFile(AbstractBufferedFile):  # type: ignore[misc]
    def _initiate_upload(self) -> None:
        self.size = 0

    def _upload_chunk(self, final: bool = False) -> bool:
        self.size += self.buffer.tell()
        if final and self.autocommit:
            _Sink.written[self.path] = self.size
        return True


class TestFsspec:
    @pytest.fixture
    def sink(self) -> Storage:
        fsspec.register_implementation("sink", _Sink, clobber=True)
        _Sink.written.clear()
        return open_storage("sink://run")

    def test_packs_stream(self, sink: Storage) -> None:
        """However large a pack is, little memory is needed for it."""
        size = 8 * PART
        with mmap.mmap(-1, size) as memory, memoryview(memory) as view:
            sink.write_pack("ready", view[: PART + 1])
            told: list[tuple[int, int]] = []
            tracemalloc.start()
            try:
                sink.write_pack("pack", view, lambda *block: told.append(block))
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert _Sink.written["run/pack"] == size
        assert told == [(start, start + PART) for start in range(0, size, PART)]
        assert peak < 4 * PART

    def test_a_pack_that_fails_half_way_is_not_completed(self, sink: Storage) -> None:
        def before(start: int, _stop: int) -> None:
            if start:
                raise ValueError("enough")

        with pytest.raises(ValueError, match="enough"):
            sink.write_pack("pack", memoryview(bytes(3 * PART)), before)
        gc.collect()
        assert _Sink.written == {}


class TestS3:
    def test_one_of_many_racing_processes_creates(self, moto_s3: S3Server) -> None:
        _race_processes(moto_s3.url("race"), dict(moto_s3.options))

    @pytest.mark.parametrize("kind", ["moto", "rclone"])
    def test_a_missing_bucket_is_named(self, request: pytest.FixtureRequest, kind: str) -> None:
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

    def test_an_unreachable_endpoint_is_found_soon(self) -> None:
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

    def test_no_credentials(self, moto_s3: S3Server) -> None:
        storage = open_storage("s3://bucket/run", {"endpoint_url": moto_s3.endpoint})
        with pytest.raises(CredentialsError, match=r"AWS_ACCESS_KEY_ID.*AWS_PROFILE") as caught:
            storage.list()
        assert "s3://bucket/run" in str(caught.value)

    def test_wrong_credentials(self, rclone_s3: S3Server) -> None:
        storage = open_storage(rclone_s3.url(), {**rclone_s3.options, "secret": "wrong"})
        for call in (lambda: storage.list(), lambda: storage.write("file", b"")):
            with pytest.raises(CredentialsError, match="refused"):
                call()

    def test_credentials_from_the_environment(
        self, rclone_s3: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", rclone_s3.options["key"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", rclone_s3.options["secret"])
        monkeypatch.setenv("AWS_ENDPOINT_URL", rclone_s3.endpoint)
        storage = open_storage(rclone_s3.url())
        storage.write("file", b"x")
        assert storage.list() == ["file"]

    def test_another_process_finds_what_this_one_changed(self, moto_s3: S3Server) -> None:
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

    def test_more_objects_than_a_page(self, moto_s3: S3Server) -> None:
        storage = open_storage(moto_s3.url(), moto_s3.options)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda n: storage.write(f"a/{n:04}", b""), range(1001)))
        assert len(storage.list("a")) == 1001
        storage.delete_tree("a")
        assert storage.list("a") == []

    def test_a_lost_answer_is_not_taken_for_a_lost_race(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        """The put succeeded, its answer was lost, and its repetition was refused."""
        storage, proxy = proxied
        proxy.faults = _once("PUT", "lose")
        storage.create("claim", b"mine")
        assert storage.read("claim") == b"mine"
        assert [method for method, _ in proxy.requests].count("PUT") > 1
        proxy.faults = _once("PUT", "lose")
        with pytest.raises(FileExistsError):
            storage.create("claim", b"mine")  # equal content is not the same writer

    def test_a_race_of_unknown_outcome_is_neither_won_nor_lost(
        self, proxied: tuple[Storage, FaultyProxy]
    ) -> None:
        storage, proxy = proxied
        lose_put = _once("PUT", "lose")
        proxy.faults = lambda method, path: 403 if method == "HEAD" else lose_put(method, path)
        with pytest.raises(StorageError):
            storage.create("claim", b"mine")

    @pytest.mark.parametrize("status", [409, 500, 503])
    def test_passing_trouble_is_waited_out(self, proxied: tuple[Storage, FaultyProxy], status: int) -> None:
        storage, proxy = proxied
        proxy.faults = _once("PUT", status)
        storage.create("claim", b"mine")
        assert storage.read("claim") == b"mine"

    def test_a_bare_412_means_that_it_is_there(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        """Some stores send the status without the code."""
        storage, proxy = proxied
        proxy.faults = lambda method, _path: 412 if method == "PUT" else None
        with pytest.raises(FileExistsError):
            storage.create("claim", b"mine")

    def test_a_broken_read_is_repeated(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = proxied
        data = _noise(100_000)
        storage.write("file", data)
        proxy.faults = _once("GET", "cut")
        assert storage.read("file") == data
        proxy.faults = _once("GET", "cut")
        found = bytearray(50_000)
        storage.read_into("file", 1000, memoryview(found))
        assert found == data[1000:51_000]

    def test_a_failed_upload_leaves_nothing(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = proxied
        proxy.faults = lambda method, path: 403 if method == "PUT" and "partNumber=2" in path else None
        with pytest.raises(CredentialsError, match=r"data\.pack"):
            storage.write_pack("data.pack", memoryview(bytes(2 * PART)))
        assert proxy.requests[-1][0] == "DELETE"
        assert "uploadId" in proxy.requests[-1][1]
        assert storage.list() == []

    def test_a_server_that_is_none_of_s3(self, proxied: tuple[Storage, FaultyProxy]) -> None:
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

    def test_answers_whose_length_is_not_told(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = proxied
        content = _noise(5000)
        storage.write("a", content)
        proxy.faults = lambda method, _path: "chunked" if method == "GET" else None
        assert storage.read("a") == content
        assert storage.read("a", 4000, 6000) == content[4000:]
        buffer = bytearray(2000)
        storage.read_into("a", 10, memoryview(buffer))
        assert buffer == content[10:2010]
        with pytest.raises(CorruptError, match="truncated"):
            storage.read_into("a", 4000, memoryview(buffer))

    def test_a_lost_answer_at_the_end_of_an_upload(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = proxied
        proxy.faults = _once("POST", "lose", "uploadId=")
        storage.write_pack("data.pack", memoryview(bytes(PART + 1)))
        assert storage.size("data.pack") == PART + 1


class TestTrouble:
    """What passes is waited out; what does not is an error that says so, and leaves nothing."""

    @pytest.fixture(autouse=True)
    def _small_and_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shardckpt.storage.s3._PART", SMALL_PART)
        monkeypatch.setattr("shardckpt.storage.s3._RANGE", SMALL_PART // 2)
        monkeypatch.setattr("shardckpt.storage.s3_client._FIRST_PAUSE", 0.001)

    @pytest.mark.parametrize("fault", [500, 503, 429, "lose", "refuse"])
    def test_every_call_survives_a_storm(
        self, proxied: tuple[Storage, FaultyProxy], fault: str | int
    ) -> None:
        storage, proxy = proxied
        data = _noise(2 * SMALL_PART + 5)

        def storm(lasts: int) -> None:
            proxy.faults = _times(lasts, fault)

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

    def test_an_outage_that_lasts_is_told_once(
        self,
        proxied: tuple[Storage, FaultyProxy],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Of all folders; again when the server has answered in between."""
        monkeypatch.setattr("shardckpt.storage.s3_client._SILENCE", 0.0)
        storage, proxy = proxied
        for folder, warnings in ((storage, 1), (storage.at("below"), 2)):
            proxy.faults = _times(3, 503)
            folder.write("x", b"x")
            assert caplog.text.count("the server answered 503") == warnings
            assert caplog.text.count("trying again for up to 1 s") == warnings

    def test_where_nobody_listens_that_is_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("shardckpt.storage.s3_client._SILENCE", 0.0)
        with socket.socket() as held:  # bound and not listening: connections are refused
            held.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
            storage = open_storage("s3://bucket/run", {"key": "k", "secret": "s", "endpoint_url": endpoint})
            with pytest.raises(
                StorageError, match=r"^s3://bucket/run: cannot reach .*after 8 attempts"
            ) as caught:
                storage.exclusive()
        assert type(caught.value) is OutOfReachError
        (record,) = [record for record in caplog.records if record.name == "shardckpt"]
        said = record.getMessage()
        assert said == f"cannot reach {endpoint} (connection refused), trying again for up to 1 s"

    @pytest.mark.parametrize("retries", [{"total_max_attempts": 3}, {"max_attempts": 2}])
    def test_a_storm_that_does_not_end_is_an_error(
        self, moto_s3: S3Server, retries: dict[str, int]
    ) -> None:
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = _through(moto_s3, proxy, retries=retries)
            proxy.faults = lambda _method, _path: 503
            with pytest.raises(StorageError, match=r"claim: the server answered 503.*after 3 attempts"):
                storage.read("claim")
            assert proxy.count("GET", "claim") == len(proxy.requests) == 3
            with pytest.raises(StorageError, match="503"):
                storage.write("claim", b"")
            assert proxy.count("PUT") == 3

    def test_what_does_not_pass_is_not_tried_again(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = proxied
        for status in (400, 403, 501):
            proxy.requests.clear()
            proxy.faults = lambda _method, _path, status=status: status
            with pytest.raises(StorageError):
                storage.write("file", b"x")
            assert len(proxy.requests) == 1

    @pytest.mark.parametrize("fault", ["lose", "refuse", 503])
    def test_one_part_of_an_upload_fails_once(
        self, proxied: tuple[Storage, FaultyProxy], fault: str | int
    ) -> None:
        storage, proxy = proxied
        data = _noise(3 * SMALL_PART)
        proxy.faults = _once("PUT", fault, "partNumber=2")
        told: list[tuple[int, int]] = []
        storage.write_pack("data.pack", memoryview(data), lambda *block: told.append(block))
        assert proxy.count("PUT", "partNumber=2") == 2
        assert proxy.count("PUT") == 4
        assert told == [(0, SMALL_PART), (SMALL_PART, 2 * SMALL_PART), (2 * SMALL_PART, 3 * SMALL_PART)]
        assert storage.read("data.pack") == data

    @pytest.mark.parametrize("fault", ["cut", "reset", "slow"])
    def test_an_answer_breaks_off_or_is_slow(
        self, proxied: tuple[Storage, FaultyProxy], fault: str
    ) -> None:
        storage, proxy = proxied
        data = _noise(SMALL_PART)
        storage.write("file", data)
        proxy.faults = _once("GET", fault)
        assert storage.read("file") == data
        proxy.faults = _once("GET", fault)
        found = bytearray(SMALL_PART - 1000)
        storage.read_into("file", 1000, memoryview(found))
        assert found == data[1000:]

    def test_an_answer_that_always_breaks_off(self, moto_s3: S3Server) -> None:
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = _through(moto_s3, proxy, retries={"total_max_attempts": 2})
            storage.write("file", _noise(10_000))
            proxy.faults = lambda method, _path: "cut" if method == "GET" else None
            for ask in (
                lambda: storage.read("file"),
                lambda: storage.read_into("file", 0, memoryview(bytearray(10_000))),
            ):
                with pytest.raises(StorageError, match=r"file: the connection failed.*after 2 attempts"):
                    ask()

    def test_a_server_that_does_not_answer(self, moto_s3: S3Server) -> None:
        """Each attempt takes as long as the options say."""
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = _through(moto_s3, proxy, read_timeout=0.2, retries={"total_max_attempts": 2})
            storage.write("file", b"x")
            proxy.faults = _once("GET", "ignore")
            assert storage.read("file") == b"x"
            proxy.faults = lambda _method, _path: "ignore"
            began = time.monotonic()
            with pytest.raises(StorageError, match=r"file: the connection failed.*[Tt]imeout"):
                storage.read("file")
            assert 0.4 <= time.monotonic() - began < 10

    def test_an_upload_that_fails_is_aborted(self, moto_s3: S3Server) -> None:
        """Nothing is left that nobody sees, and everybody pays for."""
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = _through(moto_s3, proxy, retries={"total_max_attempts": 2})
            proxy.faults = lambda method, path: 503 if method == "PUT" and "partNumber=3" in path else None
            with pytest.raises(StorageError, match=r"data\.pack.*503"):
                storage.write_pack("data.pack", memoryview(bytes(4 * SMALL_PART)))
        files = fsspec.filesystem("s3", **moto_s3.options)
        found = files.call_s3("list_multipart_uploads", Bucket=moto_s3.bucket)
        assert not [
            upload for upload in found.get("Uploads", []) if storage.url in f"s3://x/{upload['Key']}"
        ]
        assert open_storage(storage.url, moto_s3.options).list() == []

    def test_what_before_raises_ends_an_upload(self, proxied: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = proxied

        def before(start: int, _stop: int) -> None:
            if start:
                raise ValueError("enough")

        with pytest.raises(ValueError, match="enough"):
            storage.write_pack("data.pack", memoryview(bytes(3 * SMALL_PART)), before)
        assert proxy.count("DELETE", "uploadId=") == 1
        assert storage.list() == []

    def test_an_upload_copies_no_part(self, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Parts go from the buffer to the connection: however large the pack, little memory is needed."""
        storage = open_storage(moto_s3.url(), moto_s3.options)
        storage.write("ready", b"")
        monkeypatch.setattr("shardckpt.storage.s3._PART", PART)
        with mmap.mmap(-1, 5 * PART) as memory, memoryview(memory) as view:
            tracemalloc.start()
            try:
                storage.write_pack("data.pack", view)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert storage.size("data.pack") == 5 * PART
        assert peak < PART

    def test_a_bit_flipped_on_the_way_is_found(self, moto_s3: S3Server) -> None:
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


class TestLimits:
    """A transfer that hardly moves is given up, and tried again; one that is slow and goes on is not."""

    @pytest.mark.parametrize("fault", ["trickle", "ignore"])
    def test_an_answer_that_trickles_is_given_up(self, moto_s3: S3Server, fault: str) -> None:
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = _limited(moto_s3, proxy, transfer_deadline=0.5)
            open_storage(storage.url, moto_s3.options).write("file", _noise(200_000))
            proxy.faults = lambda method, _path: fault if method == "GET" else None
            for ask in (
                lambda: storage.read("file"),
                lambda: storage.read_into("file", 0, memoryview(bytearray(200_000))),
            ):
                with pytest.raises(
                    OutOfReachError, match=r"file: .*Gave up after \d attempts? in .*0\.5 s"
                ):
                    ask()

    @pytest.mark.parametrize("fault", ["trickle up", "ignore"])
    @pytest.mark.parametrize("size", [200_000, PART + 1])
    def test_an_upload_that_trickles_is_given_up_and_aborted(
        self, moto_s3: S3Server, fault: str, size: int
    ) -> None:
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = _limited(moto_s3, proxy, transfer_deadline=2)
            proxy.faults = lambda method, _path: fault if method == "PUT" else None
            with pytest.raises(OutOfReachError, match="pack"):
                storage.write_pack("pack", memoryview(_noise(size)))
            assert (proxy.count("DELETE", "uploadId") == 1) is (size > PART)
        assert open_storage(storage.url, moto_s3.options).list() == []

    def test_another_connection_is_tried_before(self, moto_s3: S3Server) -> None:
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = _limited(moto_s3, proxy, transfer_deadline=2)
            storage.write("file", _noise(200_000))
            proxy.faults = _once("GET", "trickle")
            assert storage.read("file") == _noise(200_000)
            proxy.faults = _once("PUT", "trickle up")
            storage.write("other", _noise(200_000))

    def test_a_slow_link_that_goes_on_is_no_fault(self, moto_s3: S3Server) -> None:
        """It takes twice the deadline, at more than the least rate."""
        with faulty_proxy(moto_s3.endpoint) as proxy:
            proxy.pause = 0.2
            storage = _limited(moto_s3, proxy, transfer_deadline=1, transfer_least_rate=1000)
            storage.write("file", _noise(100_000))
            proxy.faults = lambda _method, _path: "slow"
            found = bytearray(100_000)
            storage.read_into("file", 0, memoryview(found))
            assert found == _noise(100_000)
            assert proxy.count("GET") == 1

    def test_patience_is_kept_by_progress_alone(self) -> None:
        now = [0.0]
        patience = Patience(10, 100, lambda: now[0])
        assert patience.end == 10
        now[0] = 5
        patience.reach(100)  # a second's worth
        assert patience.end == 11
        patience.reach(50)  # of a later attempt
        assert patience.end == 11
        patience.reach(100_000)
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
        self,
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
    def test_a_limit_that_is_none_is_refused(self, value: object) -> None:
        for url in ("s3://bucket/run", "memory://run"):
            with pytest.raises(StorageError, match="transfer_deadline must be a number of seconds above 0"):
                open_storage(url, {"transfer_deadline": value})

    def test_a_file_system_that_hangs_is_given_up(self) -> None:
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

    def test_threads_that_wait_are_interrupted_together(self, moto_s3: S3Server) -> None:
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


class TestRenewedCredentials:
    """What a process that runs for weeks meets: keys that expire, and others where they came from."""

    @pytest.fixture
    def put_keys(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Writes ~/.aws/credentials with this access key, as whatever renews them does."""
        file = tmp_path / "credentials"
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

        def put(key: str) -> None:
            file.write_text(
                f"[default]\naws_access_key_id={key}\naws_secret_access_key=s\naws_session_token=t-{key}\n"
            )

        put("one")
        return put

    @pytest.fixture
    def opened(
        self,
        moto_s3: S3Server,
        put_keys: Callable[[str], None],  # noqa: ARG002, there are keys
    ) -> Iterator[tuple[Storage, FaultyProxy]]:
        """A storage that has worked with the first keys."""
        with faulty_proxy(moto_s3.endpoint) as proxy:
            storage = open_storage(moto_s3.url(), {"endpoint_url": proxy.endpoint})
            storage.write_pack("pack", memoryview(_noise(PART + 1)))
            yield storage, proxy

    def test_every_call_goes_on_with_renewed_ones(
        self, opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
    ) -> None:
        storage, proxy = opened
        calls: list[Callable[[], object]] = [
            lambda: storage.write_pack("other", memoryview(_noise(3 * PART))),
            lambda: storage.write("small", b"x"),
            lambda: storage.create("claim", b"x"),
            lambda: storage.read("pack"),
            lambda: storage.read_into("pack", 0, memoryview(bytearray(PART))),
            lambda: storage.size("pack"),
            lambda: storage.list(),
            lambda: storage.delete_tree("none"),
            lambda: storage.delete("small"),
        ]
        for number, call in enumerate(calls):
            proxy.expired.add(proxy.keys[-1])
            put_keys(f"key{number}")
            call()
            assert proxy.keys[-1] == f"key{number}"

    def test_in_the_middle_of_an_upload(
        self, opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
    ) -> None:
        storage, proxy = opened

        def before(start: int, _stop: int) -> None:
            if start == PART:
                proxy.expired.add("one")
                put_keys("two")

        storage.write_pack("other", memoryview(_noise(4 * PART)), before)
        assert storage.read("other") == _noise(4 * PART)
        assert {"one", "two"} <= set(proxy.keys)

    def test_of_a_storage_that_others_use_too(
        self, opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
    ) -> None:
        """s3fs hands out one client for equal options; a copy of a storage goes on as well."""
        storage, proxy = opened
        twin, copied = (
            open_storage(storage.url, {"endpoint_url": proxy.endpoint}),
            pickle.loads(pickle.dumps(storage)),
        )
        proxy.expired.add("one")
        put_keys("two")
        for one in (storage, twin, copied, storage.at("below")):
            one.list()
        assert proxy.keys[-1] == "two"

    def test_that_come_later_are_waited_for(
        self,
        opened: tuple[Storage, FaultyProxy],
        put_keys: Callable[[str], None],
        tmp_path: Path,
    ) -> None:
        """Also where the file is being written when it is looked at."""
        storage, proxy = opened
        asked = itertools.count()

        def renew(_method: str, _path: str) -> None:
            number = next(asked)
            if number == 0:
                proxy.expired.add("one")
            if number == 1:
                (tmp_path / "credentials").write_text("[default]\naws_access_key_id=two\n")
            if number == 2:
                put_keys("two")

        proxy.faults = renew
        assert storage.list() == ["pack"]
        assert proxy.keys[-1] == "two"

    def test_that_never_come_are_an_error(self, opened: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = opened
        once = open_storage(
            storage.url,
            {"endpoint_url": proxy.endpoint, "transfer_deadline": 1},
        )
        proxy.expired.add("one")
        with pytest.raises(
            CredentialsError, match=r"ExpiredToken.*Gave up after \d+ attempts in [01] s.*credentials"
        ) as caught:
            once.size("pack")
        assert type(caught.value) is CredentialsError

    def test_that_come_right_after_a_request_has_failed(
        self, opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
    ) -> None:
        """The next request finds them at its first look, however little time has passed."""
        storage, proxy = opened
        once = open_storage(storage.url, {"endpoint_url": proxy.endpoint, "transfer_deadline": 0.1})
        proxy.expired.add("one")
        with pytest.raises(CredentialsError):
            once.size("pack")
        put_keys("two")
        proxy.requests.clear()
        once = open_storage(storage.url, {"endpoint_url": proxy.endpoint})
        assert once.size("pack") == PART + 1
        assert [path.endswith("/pack") for _, path in proxy.requests].count(True) == 2

    def test_a_permission_that_lacks_is_told_at_once(self, opened: tuple[Storage, FaultyProxy]) -> None:
        storage, proxy = opened
        proxy.faults = lambda _method, _path: "denied"
        proxy.requests.clear()
        with pytest.raises(CredentialsError, match="AccessDenied"):
            storage.list()
        assert len(proxy.requests) == 1

    def test_what_the_options_hold_is_not_looked_up(
        self, opened: tuple[Storage, FaultyProxy], put_keys: Callable[[str], None]
    ) -> None:
        storage, proxy = opened
        options = {"endpoint_url": proxy.endpoint, "key": "mine", "secret": "s"}
        mine = open_storage(storage.url, options)
        proxy.expired.add("mine")
        put_keys("two")
        with pytest.raises(CredentialsError, match=r"storage_options.*not looked up again"):
            mine.list()
        assert proxy.keys[-1] == "mine"

    @pytest.mark.parametrize("failing", ["exit 1", "echo; exit 0", "echo no keys; exit 0"])
    def test_of_a_program_that_fails_at_first(
        self, moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        """A credential_process is asked again."""
        config, ready = tmp_path / "config", tmp_path / "ready"
        keys = '{"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s"}'
        script = tmp_path / "keys.sh"
        script.write_text(f"test -e {ready} || {{ touch {ready}; {failing}; }}\necho '{keys}'\n")
        config.write_text(f"[profile p]\ncredential_process = sh {script}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        storage = open_storage(moto_s3.url(), {"endpoint_url": moto_s3.endpoint, "profile": "p"})
        storage.write("file", b"x")
        assert storage.list() == ["file"]


@pytest.fixture
def proxied(moto_s3: S3Server) -> Iterator[tuple[Storage, FaultyProxy]]:
    """A storage whose requests the test may spoil."""
    with faulty_proxy(moto_s3.endpoint) as proxy:
        yield _through(moto_s3, proxy), proxy


@pytest.fixture
def folder(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder on a file system of the kind `where`."""
    folder = tmp_path / where
    folder.mkdir()
    if where != "disk":
        request.getfixturevalue("mounts")(where, folder)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path, mounts: Mount) -> Path:
    """A file system with 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts("tmpfs", folder, "size=4m")
    return folder


@pytest.fixture
def unprivileged() -> Callable[[], Any]:
    """A context in which file permissions are enforced, as they are not for root."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(before)

    return context


def _mutations(storage: Storage) -> list[Callable[[], None]]:
    return [
        lambda: storage.write("file", b"y"),
        lambda: storage.create("new", b"y"),
        lambda: storage.write_pack("pack", memoryview(b"y")),
        lambda: storage.write("folder/file", b"y"),
        lambda: storage.delete("file"),
        lambda: storage.delete_tree("folder"),
    ]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _noise(size: int) -> bytes:
    """Bytes of which no two blocks are alike, always the same."""
    block = bytes(range(256)) * 16
    pieces = [n.to_bytes(8, "little") + block[8:] for n in range(-(-size // 4096))]
    return b"".join(pieces)[:size]


def _through(server: S3Server, proxy: FaultyProxy, **config: Any) -> Storage:
    """A storage behind the proxy, with this configuration of the client."""
    options = {**server.options, "endpoint_url": proxy.endpoint, "config_kwargs": config}
    return open_storage(server.url("proxied"), options)


def _limited(server: S3Server, proxy: FaultyProxy, **limits: float) -> Storage:
    """A storage behind the proxy, with these limits."""
    return open_storage(server.url("limited"), {**server.options, "endpoint_url": proxy.endpoint, **limits})


def _times(count: int, fault: str | int) -> Callable[[str, str], str | int | None]:
    """Spoil the first `count` requests."""
    left = itertools.count(count, -1)
    return lambda _method, _path: fault if next(left) > 0 else None


def _once(method: str, fault: str | int, part: str = "") -> Callable[[str, str], str | int | None]:
    """Spoil the first request of this method whose path contains `part`."""
    lock = threading.Lock()
    left = [fault]

    def decide(asked: str, path: str) -> str | int | None:
        with lock:
            return left.pop() if asked == method and part in path and left else None

    return decide


def _race_processes(url: str, options: dict[str, Any] | None) -> None:
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
