"""Data that is wrong is read again; only what is wrong twice is corrupt."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shardckpt import Checkpointer, load, save
from shardckpt.errors import CorruptError, FormatError
from shardckpt.interop.copy import copy
from shardckpt.interop.export import merge
from shardckpt.interop.reshard import reshard
from shardckpt.loading.checkpoint import open_checkpoint
from shardckpt.loading.verify import verify_checkpoint
from shardckpt.run.places import Place, read_manifest
from shardckpt.storage import LocalStorage, Storage
from tests.kit.faults import MisreadStorage
from tests.kit.servers import S3Server, faulty_proxy

SIZE = 300_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, of which several chunks are read in one request."""
    folder = tmp_path_factory.mktemp("made") / "checkpoint"
    save(folder, _state())
    return folder


def _state() -> dict[str, torch.Tensor]:
    return {name: torch.arange(SIZE) + number for number, name in enumerate("abc")}


def _check_loaded(storage: Storage) -> None:
    into = {name: torch.zeros(SIZE, dtype=torch.int64) for name in "abc"}
    load(storage, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in _state().items())


def _check_verified(storage: Storage) -> None:
    place = Place(storage)
    report = verify_checkpoint(place, read_manifest(place), lambda _done, _total: None)
    assert not report.problems


def _check_read(storage: Storage) -> None:
    assert np.array_equal(open_checkpoint(storage).read("b"), _state()["b"].numpy())


def _check_copied(storage: Storage, out: Path) -> None:
    copy(storage, out)
    _check_loaded(LocalStorage(str(out)))


def _check_resharded(storage: Storage, out: Path) -> None:
    reshard(storage, out, 2)
    _check_loaded(LocalStorage(str(out)))


def _check_merged(storage: Storage, out: Path) -> None:
    out.mkdir()
    merge(storage, out / "all.pt")
    merged = torch.load(out / "all.pt", weights_only=True)
    assert all(torch.equal(merged[name], tensor) for name, tensor in _state().items())


USES: dict[str, Callable[[Storage, Path], None]] = {
    "load": lambda storage, _: _check_loaded(storage),
    "verify": lambda storage, _: _check_verified(storage),
    "read": lambda storage, _: _check_read(storage),
    "copy": _check_copied,
    "reshard": _check_resharded,
    "merge": _check_merged,
}


@pytest.mark.parametrize("name", ["data.pack", "manifest.json"])
@pytest.mark.parametrize("use", USES)
def test_a_bit_that_is_wrong_once_does_no_harm(
    use: str, name: str, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In every use; it is logged, since something is wrong with the machine or the network."""
    storage = MisreadStorage(LocalStorage(str(made)), name)
    USES[use](storage, tmp_path / "out")
    assert storage.is_done
    assert caplog.text.count("read again it is right") == 1


@pytest.mark.parametrize("use", USES)
def test_a_bit_that_is_always_wrong_is_an_error(use: str, made: Path, tmp_path: Path) -> None:
    storage = MisreadStorage(LocalStorage(str(made)), "data.pack", times=1000)
    with pytest.raises((CorruptError, AssertionError), match=r"corrupt|problems"):
        USES[use](storage, tmp_path / "out")


def test_a_manifest_that_is_always_wrong_is_an_error(made: Path) -> None:
    storage = MisreadStorage(LocalStorage(str(made)), "manifest.json", times=2)
    with pytest.raises((FormatError, CorruptError)):
        open_checkpoint(storage)
    assert storage.is_done


def test_restore_marks_bad_only_what_is_wrong_twice(tmp_path: Path) -> None:
    """A bit that flips once on its way does not cost a checkpoint; the disk's own does."""
    root = LocalStorage(str(tmp_path / "run"))
    with Checkpointer(root) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": torch.full((1000,), step)}).wait()
    for times, newest in ((1, 2), (2, 1)):
        state = {"w": torch.zeros(1000, dtype=torch.int64)}
        with Checkpointer(MisreadStorage(root, "data.pack", times)) as checkpointer:
            loaded = checkpointer.restore(state)
        assert loaded is not None
        assert loaded.step == newest == state["w"][0]
    marked = list((tmp_path / "run").rglob("bad.json"))
    assert [path.parent.name for path in marked] == ["step-00000002"]


def test_a_mapped_file_that_is_cached_wrongly(made: Path, tmp_path: Path) -> None:
    """What is mapped comes of the page cache; the disk itself has it right."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(made, spoilt)
    pack = next(spoilt.rglob("data.pack"))
    data = bytearray(pack.read_bytes())
    data[SIZE] ^= 1
    pack.write_bytes(data)

    class Cached(LocalStorage):
        """Its files are as the cache has them; read past it, as they are."""

        def fresh(self) -> LocalStorage:
            return LocalStorage(str(made))

    _check_loaded(Cached(str(spoilt)))
    _check_read(Cached(str(spoilt)))


def test_over_another_connection(moto_s3: S3Server) -> None:
    url = moto_s3.url("misread")
    save(url, _state(), storage_options=moto_s3.options)
    with faulty_proxy(moto_s3.endpoint) as proxy:
        options = {**moto_s3.options, "endpoint_url": proxy.endpoint}
        spoilt = iter(["flip"])
        proxy.faults = lambda method, path: (
            next(spoilt, None) if "data.pack" in path and method == "GET" else None
        )
        into = {name: torch.zeros(SIZE, dtype=torch.int64) for name in "abc"}
        load(url, into, storage_options=options)
        assert all(torch.equal(into[name], tensor) for name, tensor in _state().items())
        assert next(spoilt, None) is None
        requests = proxy.count("GET", "data.pack")
        load(url, into, storage_options=options)
        assert proxy.count("GET", "data.pack") - requests < requests  # what is right is read once


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 1), (4095, 2), (100_001, 50_000), (0, 123_457), (123_456, 10)]
)
def test_past_the_page_cache(offset: int, nbytes: int, tmp_path: Path) -> None:
    """At any offset and length, also of what has only just been written."""
    data = os.urandom(123_457)
    (tmp_path / "file").write_bytes(data)
    storage = LocalStorage(str(tmp_path)).fresh()
    assert storage.read("file", offset, offset + nbytes) == data[offset : offset + nbytes]
    if offset + nbytes <= len(data):
        found = bytearray(nbytes)
        storage.read_into("file", offset, memoryview(found))
        assert found == data[offset : offset + nbytes]
        return
    with pytest.raises(CorruptError, match="is truncated"):
        storage.read_into("file", offset, memoryview(bytearray(nbytes)))
