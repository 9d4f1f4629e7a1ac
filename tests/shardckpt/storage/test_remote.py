"""Storages behind fsspec."""

from __future__ import annotations

import gc
import mmap
import tracemalloc
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from shardckpt.storage import Storage, open_storage
from tests.shardckpt.storage.helpers import PART


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


@pytest.fixture
def sink() -> Storage:
    fsspec.register_implementation("sink", _Sink, clobber=True)
    _Sink.written.clear()
    return open_storage("sink://run")


def test_packs_stream(sink: Storage) -> None:
    """However large a pack is, little memory is needed for it."""
    size = 8 * PART
    with mmap.mmap(-1, size) as memory, memoryview(memory) as view:
        sink.write_pack("ready", view[: PART + 1])
        seen: list[tuple[int, int]] = []
        tracemalloc.start()
        try:
            sink.write_pack("pack", view, lambda *block: seen.append(block))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert _Sink.written["run/pack"] == size
    assert seen == [(start, start + PART) for start in range(0, size, PART)]
    assert peak < 4 * PART


def test_a_pack_that_fails_half_way_is_not_completed(sink: Storage) -> None:
    def before(start: int, _stop: int) -> None:
        if start:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        sink.write_pack("pack", memoryview(bytes(3 * PART)), before)
    gc.collect()
    assert _Sink.written == {}
