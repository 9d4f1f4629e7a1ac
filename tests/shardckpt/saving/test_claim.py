"""Attempts: a folder for each, in a place that all ranks see."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import shardckpt
from shardckpt.errors import (
    SaveError,
    StorageError,
)
from shardckpt.format.manifest import part_path
from shardckpt.run.places import attempts_in, iter_places
from shardckpt.storage import Storage, open_storage
from tests.kit.faults import FaultyStorage
from tests.kit.runs import committed, restored, saved, state_at
from tests.kit.servers import S3Server
from tests.kit.worlds import Checkpoints, ThreadRanks, outcomes, run_threads


class Overwriting:
    """A storage without conditional puts: `create` overwrites, and says so."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def at(self, path: str) -> Overwriting:
        return Overwriting(self._inner.at(path))

    def create(self, path: str, data: bytes) -> None:
        self._inner.write(path, data)

    def exclusive(self) -> bool:
        return False


@pytest.mark.parametrize("kind", ["conditional", "overwriting"])
def test_attempts_never_share_a_folder(kind: str, tmp_path: Path) -> None:
    """Any number of jobs that start at once on one run get a folder each, whatever the storage can do."""
    root = open_storage(tmp_path)
    storage = root if kind == "conditional" else Overwriting(root)
    barrier = threading.Barrier(8, timeout=60)
    urls: list[str] = []

    def start(number: int) -> None:
        checkpointer = shardckpt.Checkpointer(storage)
        barrier.wait()
        checkpointer.restore(state_at(-1))
        urls.append(checkpointer.save(number, state_at(number)).url)
        checkpointer.close()

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({Path(url).parent for url in urls}) == 8
    for place in iter_places(root):
        assert shardckpt.open(place.url).read("t")[0] == place.order[1]


def test_attempts_without_conditional_puts_are_apart(rclone_s3: S3Server) -> None:
    """Where a put cannot be conditional, attempts of one number have different names."""
    root = open_storage(rclone_s3.url("race"), rclone_s3.options)
    names = {saved(root, 1).save(2, state_at(2)).url.split("/")[-2] for _ in range(2)}
    assert {name.split("-")[1] for name in names} == {"0001", "0002"}
    assert all(len(name.split("-")) == 3 for name in names)


def test_the_newest_of_two_attempts_of_one_number(tmp_path: Path) -> None:
    """Two writers with one number do not delete each other's unfinished saves."""
    storage = Overwriting(open_storage(tmp_path))
    checkpointer = saved(storage, 1, keep_last=1)
    (attempt,) = attempts_in(storage.list())
    other = f"{attempt[:12]}-00000000/step-00000001"
    storage.write(f"{other}/{part_path('x', 0)}", b"{}")
    checkpointer.save(2, state_at(2))
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == [2]
    assert storage.list(other) == ["parts-x"]


class _Late(FaultyStorage):
    """Shows what others have made after three looks only."""

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = super().read(path, start, stop)
        if [call for call, _ in self.calls].count("read") <= 3:
            raise FileNotFoundError(path)
        return data


@pytest.mark.parametrize("other", ["empty", "of an earlier job"])
def test_a_folder_that_is_another_one_on_each_node(other: str, tmp_path: Path) -> None:
    """Nothing would ever be committed: all ranks raise the same, which says who does not see what."""
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "a", tmp_path / "b"]
    if other != "empty":
        saved(folders[1], 1)

    def train(ranks: ThreadRanks) -> None:
        Checkpoints(folders[ranks.rank], ranks, url_timeout=1.0).restore(state_at(0))

    errors = outcomes(4, train)
    assert all(type(error) is StorageError for error in errors), errors
    (message,) = set(map(str, errors))
    host = re.escape(socket.gethostname())
    found = "there is none" if other == "empty" else "there is the one of another job"
    assert re.match(
        rf"not all ranks see the same run: rank 0 on {host} has made {folders[0]}/attempt-0001, "
        rf"but rank 1 on {host} does not see it: "
        rf"{folders[1]}/attempt-0001/attempt.json: {found} \(2 of 4 ranks do not\)\. A run needs .*--ckpt",
        message,
    )
    assert all(error.__cause__ is None for error in errors)


def test_a_folder_that_is_another_one_on_each_node_without_restore(tmp_path: Path) -> None:
    """A step asks no storage, so the save's handle tells."""

    def train(ranks: ThreadRanks) -> str:
        folder = tmp_path / "ab"[ranks.rank]
        checkpointer = Checkpoints(folder, ranks, every_steps=1, commit_timeout=0.3)
        handle = checkpointer.step(1, state_at(1))
        assert handle is not None
        with pytest.raises(SaveError) as error:
            handle.wait()
        return str(error.value)

    first, second = run_threads(2, train)
    assert "rank 1 of 2 did not finish writing" in first
    assert "its claim is not to be seen here for 0.3 s. A run needs a URL that all nodes share" in second


def test_a_folder_that_is_out_of_reach_on_one_node(tmp_path: Path) -> None:
    """Its own reason is told, at once."""

    class Unreadable(FaultyStorage):
        def read(self, path: str, *_: object) -> bytes:
            raise StorageError(f"{path} cannot be read")

    def train(ranks: ThreadRanks) -> None:
        root = open_storage(tmp_path)
        Checkpoints(Unreadable(root) if ranks.rank == 2 else root, ranks).restore(state_at(0))

    errors = outcomes(3, train)
    assert all("rank 2 on " in str(error) for error in errors), errors
    assert all(
        "does not see it: attempt-0001/attempt.json cannot be read (1 of 3" in str(e) for e in errors
    )


@pytest.mark.parametrize(("kind", "looks"), [(FaultyStorage, 1), (_Late, 4)])
def test_a_folder_that_shows_late(kind: type[FaultyStorage], looks: int, tmp_path: Path) -> None:
    """As network file systems may have it. Where all is well, every other rank looks once."""
    roots = [kind(open_storage(tmp_path)) for _ in range(2)]

    def train(ranks: ThreadRanks) -> None:
        with Checkpoints(roots[ranks.rank], ranks) as checkpointer:
            checkpointer.restore(state_at(0))  # by which the others look only once it is claimed
            checkpointer.save(1, state_at(1))

    found = [root.calls for root in roots]
    run_threads(2, train)
    claim = ("read", "attempt-0001/attempt.json")
    assert [calls.count(claim) for calls in found] == [0, looks]
    assert restored(tmp_path) == 1


def test_two_of_a_process_in_one_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the newest attempt is resumed, so that the other's saves are lost to it: that is told, once."""
    with shardckpt.Checkpointer(tmp_path) as first, shardckpt.Checkpointer(tmp_path) as second:
        first.save(1, state_at(1)).wait()  # its attempt has its place in the run, before the other's
        second.save(2, state_at(2)).wait()
        assert not caplog.records
        first.save(3, state_at(3))
        first.save(4, state_at(4))
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [3]
    assert "Use one Checkpointer for a run" in caplog.text
    assert restored(tmp_path) == 2


def test_a_second_restore_begins_anew(tmp_path: Path) -> None:
    """After a rollback, the steps that were done again are the ones to resume from."""
    with shardckpt.Checkpointer(tmp_path, every_steps=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.step(step, state_at(step))
            checkpointer.wait()
        shutil.rmtree(tmp_path / "attempt-0001/step-00000003")  # which has diverged
        assert checkpointer.restore(state_at(0)).step == 2  # type: ignore[union-attr]
        checkpointer.step(3, state_at(33))
    assert shardckpt.open(tmp_path).read("t")[0] == 33
    assert len(list(tmp_path.glob("attempt-*"))) == 2
