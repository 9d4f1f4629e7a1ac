"""Runs: when a Checkpointer saves, what it keeps, and from where it resumes."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import shardckpt
from launcher.progress import Progress, read_progress, report
from shardckpt.errors import (
    CheckpointExistsError,
    CorruptError,
    FormatError,
    NotACheckpointError,
    SaveError,
    StateError,
    StorageError,
    UnknownVersionError,
)
from shardckpt.format import records
from shardckpt.run.places import BAD, iter_places
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.protocol import Before
from tests.kit.faults import FailingOnce, FaultyStorage
from tests.kit.servers import S3Server
from tests.kit.worlds import Checkpoints, PeerGoneError, ThreadRanks, outcomes, run_processes, run_threads


def state_at(step: int) -> dict[str, Any]:
    return {"t": torch.full((100,), step), "step": step}


def restored(url: Any, **options: Any) -> int | None:
    """The step of the newest good checkpoint, loaded and checked."""
    state = state_at(-1)
    loaded = shardckpt.Checkpointer(url, **options).restore(state)
    if loaded is None:
        assert state["step"] == -1
        return None
    assert int(state["t"].unique()) == state["step"] == loaded.step
    return loaded.step


def committed(root: Storage) -> list[int]:
    return [place.order[1] for place in iter_places(root) if place.is_committed()]


def saved(url: Any, *steps: int, **options: Any) -> shardckpt.Checkpointer:
    """A new attempt that has saved these steps."""
    checkpointer = shardckpt.Checkpointer(url, **options)
    checkpointer.restore(state_at(-1))
    for step in steps:
        checkpointer.save(step, state_at(step))
    checkpointer.wait()
    return checkpointer


class SlowStorage(FaultyStorage):
    """Packs are written once `gate` is open."""

    gate = threading.Event()

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        assert self.gate.wait(60)
        super().write_pack(path, buffer, before)


@pytest.fixture
def slow(tmp_path: Path) -> SlowStorage:
    SlowStorage.gate = threading.Event()
    return SlowStorage(open_storage(tmp_path))


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


@pytest.fixture(params=["local", "file", "memory", "s3", "s3 without conditional puts"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A run's URL and storage_options, on every kind of storage."""
    if request.param.startswith("s3"):
        server: S3Server = request.getfixturevalue("moto_s3" if request.param == "s3" else "rclone_s3")
        return server.url("run"), {"storage_options": dict(server.options)}
    prefix = {"local": "", "file": "file://", "memory": "memory:/"}[request.param]
    return f"{prefix}{tmp_path}", {}


# -- when it saves


def test_saves_every_so_many_steps(tmp_path: Path) -> None:
    """`step` saves at the multiples of every_steps, not at 0, `close` the last step; the newest keep_last
    stay."""
    with shardckpt.Checkpointer(tmp_path, every_steps=3, keep_last=2) as checkpointer:
        assert checkpointer.restore(state_at(0)) is None
        for step in range(11):
            handle = checkpointer.step(step, state_at(step))
            assert (handle is not None) == (step in (3, 6, 9))
            checkpointer.wait()
        assert committed(open_storage(tmp_path)) == [9, 6]
    assert committed(open_storage(tmp_path)) == [10, 9]
    assert restored(tmp_path) == 10


def test_saves_only_when_told(tmp_path: Path) -> None:
    """Without every_steps, `step` only reports; `save` saves. Without keep_last, nothing is deleted."""
    with shardckpt.Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 5):
            assert checkpointer.step(step, state_at(step)) is None
            checkpointer.save(step, state_at(step))
    assert committed(open_storage(tmp_path)) == [4, 3, 2, 1]


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


def test_a_save_is_skipped_while_one_is_under_way(
    slow: SlowStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`step` does not wait for the save before: it logs that there is none, and training goes on."""
    checkpointer = shardckpt.Checkpointer(slow, every_steps=1)
    first = checkpointer.step(1, state_at(1))
    assert first is not None
    assert first.busy
    assert "under way" in repr(first)
    with caplog.at_level(logging.WARNING, "shardckpt"):
        assert checkpointer.step(2, state_at(2)) is None
        assert checkpointer.step(3, state_at(3)) is None
    assert "no checkpoint at step 2: step 1 is still being written" in caplog.text
    assert "step 3" not in caplog.text  # it is told once, until there is a save again
    slow.gate.set()
    checkpointer.wait()
    assert "committed" in repr(first)
    assert checkpointer.step(3, state_at(3)) is not None
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == [3, 1]


@pytest.mark.parametrize("size", [1, 2])
def test_a_last_step_that_was_skipped_is_saved_at_the_end(
    size: int, slow: SlowStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training that is faster than the storage does not lose its end: `close` saves it, with its metrics."""

    def train(ranks: ThreadRanks) -> None:
        with Checkpoints(slow, ranks, every_steps=20) as checkpointer:
            assert checkpointer.step(20, state_at(20)) is not None
            for step in (40, 60):
                assert checkpointer.step(step, state_at(step), {"loss": step / 2}) is None
            ranks.gather(b"")
            slow.gate.set()

    with caplog.at_level(logging.INFO, "shardckpt"):
        run_threads(size, train)
    assert caplog.messages.count("step 60 is saved at the end") == 1
    assert committed(open_storage(tmp_path)) == [60, 20]
    assert restored(tmp_path) == 60
    assert shardckpt.open(tmp_path).metrics == {"loss": 30.0}


def _step_on(checkpointer: shardckpt.Checkpointer) -> None:
    checkpointer.step(5, state_at(5))


def _save(checkpointer: shardckpt.Checkpointer) -> None:
    checkpointer.save(4, state_at(4))


def _restore(checkpointer: shardckpt.Checkpointer) -> None:
    checkpointer.restore(state_at(4))


@pytest.mark.parametrize(("then", "steps"), [(_step_on, [5, 2]), (_save, [4, 2]), (_restore, [2])])
def test_a_step_that_was_skipped_and_not_the_last_is_not_saved(
    then: Callable[[shardckpt.Checkpointer], None], steps: list[int], slow: SlowStorage, tmp_path: Path
) -> None:
    """Whatever comes after it, the state is not what it was."""
    checkpointer = shardckpt.Checkpointer(slow, every_steps=2)
    checkpointer.step(2, state_at(2))
    assert checkpointer.step(4, state_at(4)) is None
    slow.gate.set()
    then(checkpointer)
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == steps


def test_a_step_that_was_skipped_is_not_saved_after_an_error(slow: SlowStorage, tmp_path: Path) -> None:
    """Of one rank, perhaps, for which the others would not come. The save under way is waited for."""

    def train(ranks: ThreadRanks) -> None:
        checkpointer = Checkpoints(slow, ranks, every_steps=1)
        checkpointer.step(1, state_at(1))
        assert checkpointer.step(2, state_at(2)) is None
        ranks.gather(b"")
        slow.gate.set()
        try:
            if ranks.rank == 1:
                raise ZeroDivisionError
            checkpointer.step(3, state_at(3))
        finally:
            checkpointer.close()

    first, second = outcomes(2, train)
    assert isinstance(first, PeerGoneError)
    assert isinstance(second, ZeroDivisionError)
    assert committed(open_storage(tmp_path)) == [1]


def test_a_state_that_was_spoilt_before_the_end(slow: SlowStorage, tmp_path: Path) -> None:
    """What `save` would say, `close` says."""
    checkpointer = shardckpt.Checkpointer(slow, every_steps=1)
    checkpointer.step(1, state_at(1))
    state = state_at(2)
    assert checkpointer.step(2, state) is None
    state["t"] = print
    slow.gate.set()
    with pytest.raises(StateError, match="'t'"):
        checkpointer.close()
    assert restored(tmp_path) == 1


def test_save_waits_for_the_one_under_way(slow: SlowStorage, tmp_path: Path) -> None:
    """`save` is not skipped: it waits, and both become durable with their own content."""
    checkpointer = shardckpt.Checkpointer(slow)
    checkpointer.save(1, state_at(1))
    opener = threading.Thread(target=slow.gate.set)
    opener.start()
    checkpointer.save(2, state_at(2))
    opener.join()
    checkpointer.close()
    for place in iter_places(open_storage(tmp_path)):
        assert shardckpt.open(place.url).read("t")[0] == place.order[1]


def test_no_checkpoint_is_overwritten(tmp_path: Path) -> None:
    """An earlier step again is saved in a new attempt, which counts more; a single checkpoint stays as it is."""
    checkpointer = saved(tmp_path, 1, 2)
    checkpointer.save(1, state_at(5)).wait()
    checkpointer.save(2, state_at(6)).wait()
    checkpointer.close()
    for path, value in (("1/step-00000001", 1), ("1/step-00000002", 2), ("2/step-00000001", 5)):
        assert shardckpt.open(tmp_path / f"attempt-000{path}").read("t")[0] == value
    assert shardckpt.open(tmp_path).read("t")[0] == 6
    shardckpt.save(tmp_path / "one", state_at(1))
    with pytest.raises(CheckpointExistsError, match="has a checkpoint already"):
        shardckpt.save(tmp_path / "one", state_at(2))
    handle = shardckpt.save_async(tmp_path / "one", state_at(2))
    with pytest.raises(SaveError, match="has a checkpoint already") as error:
        handle.wait()
    assert isinstance(error.value.__cause__, CheckpointExistsError)
    assert shardckpt.open(tmp_path / "one").read("t")[0] == 1
    shardckpt.open(tmp_path / "one").verify()


def test_metrics(tmp_path: Path) -> None:
    """Metrics come back as floats, also those that JSON has not; what is no number is an error."""
    metrics = {"loss": 1.25, "nan": math.nan, "inf": -math.inf, "int": 3, "tensor": torch.tensor(0.5)}
    with shardckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_at(1), metrics)
        with pytest.raises(StateError, match="metrics must be numbers"):
            checkpointer.save(2, state_at(2), {"loss": "low"})  # type: ignore[dict-item]
    found = shardckpt.Checkpointer(tmp_path).restore(state_at(0)).metrics  # type: ignore[union-attr]
    assert math.isnan(found.pop("nan"))
    assert found == {"loss": 1.25, "inf": -math.inf, "int": 3.0, "tensor": 0.5}
    assert math.isnan(shardckpt.open(tmp_path).metrics["nan"])


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"keep_last": 0}, {"every_steps": 1.5}])
def test_arguments_are_checked(options: dict[str, Any], tmp_path: Path) -> None:
    """An argument that makes no sense is refused at once, and nothing is made."""
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a whole number"):
        shardckpt.Checkpointer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_launcher_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a URL, LAUNCH_CKPT_URL; without that, an error that says so."""
    monkeypatch.delenv("LAUNCH_CKPT_URL", raising=False)
    with pytest.raises(ValueError, match="LAUNCH_CKPT_URL"):
        shardckpt.Checkpointer()
    monkeypatch.setenv("LAUNCH_CKPT_URL", str(tmp_path))
    assert shardckpt.Checkpointer().url == str(tmp_path)
    assert shardckpt.Checkpointer(tmp_path / "other").url == str(tmp_path / "other")


def test_the_progress_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step writes over the one before, as docs/worker-contract.md has it."""
    path = tmp_path / "progress"
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(path))
    began = time.time()
    checkpointer = shardckpt.Checkpointer(tmp_path / "run")
    assert path.read_bytes()[:21] == b"-1 ".rjust(21)
    for step in (9, 10, 123456):
        before = time.time()
        checkpointer.step(step, {})
        content = path.read_bytes()
        line, facts = content[:42], json.loads(content[42:])
        assert line[:20] == str(step).rjust(20).encode()
        assert line[20:21] == b" "
        assert line[41:] == b"\n"
        assert before - 1e-5 <= float(line[21:41]) <= time.time() + 1e-5
        assert (len(content), content[-1:]) == (512, b"\n")
        assert facts.keys() == {"joined", "world", "first_step"}
        assert began <= facts["joined"] <= facts["first_step"] <= float(line[21:41]) + 1e-5
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(tmp_path / "no" / "folder"))
    shardckpt.Checkpointer(tmp_path / "run").step(1, {})  # training does not stop for it


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"loss": 0.5}, 0.5),
        ({"loss": torch.tensor(0.25)}, 0.25),
        ({"loss": math.nan}, math.nan),
        ({"loss": "low"}, None),
        ({"loss": torch.ones(3)}, None),
        (
            {"loss": torch.ones((), device="meta")},
            None,
        ),  # like any device's, which would have to be waited for
        ({"accuracy": 0.5}, None),
    ],
)
def test_what_else_is_told(
    metrics: Any, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss, if it is a number at hand; what was restored, and from where. Nothing of it gets lost."""
    saved(tmp_path / "run", 7).close()
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(tmp_path / "progress"))
    checkpointer = shardckpt.Checkpointer(tmp_path / "run")
    checkpointer.restore(state_at(-1))
    checkpointer.step(8, state_at(8), metrics)
    report(9)
    checkpointer.step(10, state_at(10))
    told = read_progress(tmp_path / "progress")
    assert told is not None
    assert (told.step, told.restored_step, told.restored_tier, told.drains) == (10, 7, "local", False)
    assert told.loss == pytest.approx(expected, nan_ok=True)
    assert told.joined is not None
    assert told.restored is not None
    assert told.first_step is not None
    assert told.joined <= told.restored <= told.first_step <= told.time + 1e-5
    assert (told.world, told.steps, told.is_over) == (1, False, False)
    checkpointer.close()
    told = read_progress(tmp_path / "progress")
    assert told is not None
    assert told.is_over
    shardckpt.Checkpointer(tmp_path / "run", every_steps=1).step(11, state_at(11))
    told = read_progress(tmp_path / "progress")
    assert told is not None
    assert (told.steps, told.is_over) == (True, False)


class Slow:
    """An object whose load_state_dict looks at what the launcher is told meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[Progress | None] = []

    def state_dict(self) -> dict[str, int]:
        return {"x": 1}

    def load_state_dict(self, _state: dict[str, int]) -> None:
        self.seen.append(read_progress(self.path))


def test_what_is_restored_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a restore that takes long is told from one that hangs, and where."""
    path = tmp_path / "progress"
    slow = Slow(path)
    shardckpt.save(tmp_path / "run" / "attempt-0001" / "step-00000001", {"slow": slow}, step=1)
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(path))
    checkpointer = shardckpt.Checkpointer(tmp_path / "run", every_steps=1)
    checkpointer.restore({"slow": slow})
    [seen] = slow.seen
    assert seen is not None
    assert seen.doing == "restore, load_state_dict of 'slow'"
    after = read_progress(path)
    assert after is not None
    assert (after.doing, after.steps) == (None, True)


def test_what_others_told_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may report by itself, too."""
    path = tmp_path / "progress"
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(path))
    report(1, loss=0.5)
    before = read_progress(path)
    checkpointer = shardckpt.Checkpointer(tmp_path / "run")
    checkpointer.step(2, {})
    after = read_progress(path)
    assert before is not None
    assert after is not None
    assert (after.step, after.loss, after.first_step) == (2, 0.5, before.first_step)
    checkpointer.step(3, {}, {"loss": 0.25})
    checkpointer.close()
    after = read_progress(path)
    assert after is not None
    assert (after.step, after.loss, after.first_step) == (3, 0.25, before.first_step)
    assert after.joined is not None


# -- what it keeps and from where it resumes


def test_resumes_on_any_storage(anywhere: tuple[str, dict[str, Any]]) -> None:
    """Save, restart, resume, on every kind of storage: attempts in order, the newest taken, old ones deleted."""
    url, options = anywhere
    assert restored(url, **options) is None
    saved(url, 1, 2, keep_last=2, **options).close()
    assert restored(url, **options) == 2
    saved(url, 3, keep_last=2, **options).close()
    assert restored(url, **options) == 3
    root = open_storage(url, options.get("storage_options"))
    assert committed(root) == [3, 2]
    attempts = root.list()
    assert len(attempts) == 5
    assert all(root.list(attempt) for attempt in attempts)
    checkpoint = shardckpt.open(url, **options)
    assert checkpoint.step == 3
    assert checkpoint.read("t").tolist() == [3] * 100
    assert checkpoint.zarr()["t"][0] == 3


def test_the_newest_is_of_the_newest_attempt(tmp_path: Path) -> None:
    """An attempt that went back to an earlier step counts more than the steps that were lost with it."""
    first = saved(tmp_path, 10, 20)
    second = saved(tmp_path, 15)
    assert restored(tmp_path) == 15
    # A process of the first attempt that is still alive does not disturb the second.
    first.save(30, state_at(30))
    first.close()
    assert restored(tmp_path) == 15
    second.close()


def test_what_a_zombie_prunes(tmp_path: Path) -> None:
    """The prune of an older attempt leaves everything that is newer alone."""
    zombie = saved(tmp_path, 1, keep_last=1)
    saved(tmp_path, 2, 3)
    zombie.save(50, state_at(50))
    zombie.close()
    assert committed(open_storage(tmp_path)) == [3, 2, 50]


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
    (attempt,) = storage.list()
    other = f"{attempt[:12]}-00000000/step-00000001"
    storage.write(f"{other}/rank-00000/part.json", b"{}")
    checkpointer.save(2, state_at(2))
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == [2]
    assert storage.list(other) == ["rank-00000"]


# -- whether all ranks write to one place


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


# -- failures in the background


def test_a_failed_save_is_raised_by_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A background failure is logged, raised once by wait or close, and does not hinder later saves."""
    storage = FailingOnce(open_storage(tmp_path), fail_at=2, error=StorageError("no more space"))
    checkpointer = shardckpt.Checkpointer(storage, every_steps=1)
    handle = checkpointer.step(1, state_at(1))
    assert handle is not None
    handle.join()
    assert handle.failed
    assert "failed" in repr(handle)
    assert "no more space" in caplog.text
    assert checkpointer.step(2, state_at(2)) is not None
    with pytest.raises(SaveError, match=r"step-00000001 failed: no more space"):
        checkpointer.wait()
    checkpointer.wait()
    assert checkpointer.step(3, state_at(3)) is not None
    checkpointer.close()
    with pytest.raises(SaveError, match="no more space"):
        handle.wait()
    assert committed(open_storage(tmp_path)) == [3, 2]


def test_close_raises_and_with_does_not_hide(tmp_path: Path) -> None:
    """`with` raises a failed save at its end; but an error of the training comes through as it is."""
    storage = FaultyStorage(open_storage(tmp_path), fail_at=2, error=StorageError("gone"))
    with pytest.raises(SaveError, match="gone"), shardckpt.Checkpointer(storage) as checkpointer:
        checkpointer.save(1, state_at(1))
    with pytest.raises(ZeroDivisionError), shardckpt.Checkpointer(storage) as checkpointer:
        raise ZeroDivisionError


def test_a_reason_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where each save fails for the same reason the log says so shortly; on a node's first rank only."""
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        attempt = tmp_path / f"attempt-{int(rank) + 1:04d}"
        checkpointer = shardckpt.Checkpointer(tmp_path, snapshots=0)
        checkpointer.restore(state_at(0))
        for step in (1, 2, 3):
            (attempt / f"step-{step:08d}").write_bytes(b"")  # a file in the way of its folder
            checkpointer.save(step, state_at(step)).join()
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told[1:] == ["step 2 is not saved (local): the same", "step 3 is not saved (local): the same"]
    assert told[0].startswith("step 1 is not saved (local): ")


@pytest.mark.parametrize("launcher", [False, True])
def test_close_is_silent_about_what_a_later_save_made_good(
    launcher: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two saves fails: `close` has nothing to tell, though `wait` has. Of the last one it does."""
    if launcher:  # which knows nothing of saves without its saver
        monkeypatch.setenv("LAUNCH_SAVER", "nobody")
    storage = FailingOnce(open_storage(tmp_path), fail_at=2, error=StorageError("no more space"))
    with shardckpt.Checkpointer(storage) as checkpointer:
        checkpointer.save(1, state_at(1)).join()
        checkpointer.save(2, state_at(2)).join()
    assert committed(open_storage(tmp_path)) == [2]
    storage = FailingOnce(open_storage(tmp_path), fail_at=2, error=StorageError("no more space"))
    checkpointer = shardckpt.Checkpointer(storage)
    checkpointer.save(1, state_at(1)).join()
    checkpointer.save(2, state_at(2)).join()
    with pytest.raises(SaveError, match="step-00000001 failed"):
        checkpointer.wait()
    checkpointer.close()
    storage = FaultyStorage(open_storage(tmp_path), fail_at=2, error=StorageError("gone"))
    checkpointer = shardckpt.Checkpointer(storage)
    checkpointer.save(1, state_at(1)).join()
    with pytest.raises(SaveError, match="step-00000001 failed"):
        checkpointer.close()


def test_one_ranks_failure_is_everyones(tmp_path: Path) -> None:
    """If one rank's part of a save fails, wait raises on all ranks, also when `save` has gone on since."""

    def run(ranks: ThreadRanks) -> None:
        inner = open_storage(tmp_path)
        storage = FailingOnce(inner, 1, StorageError("gone")) if ranks.rank == 1 else inner
        checkpointer = Checkpoints(storage, ranks)
        checkpointer.save(1, {"t": torch.ones(4), "own": shardckpt.PerRank(torch.ones(4))})
        checkpointer.save(2, {"t": torch.ones(4), "own": shardckpt.PerRank(torch.ones(4))})
        with pytest.raises(SaveError, match=r"step-00000001 failed: .*(gone|another rank failed)"):
            checkpointer.wait()
        checkpointer.wait()

    run_threads(3, run)
    assert committed(open_storage(tmp_path)) == [2]


@pytest.mark.parametrize("how", ["step", "save"])
def test_waiting_for_what_retention_has_deleted(how: str, tmp_path: Path) -> None:
    """A handle's `wait` returns on every rank once its save was durable, also when it is gone since."""

    def run(ranks: ThreadRanks) -> None:
        root = open_storage(tmp_path)
        checkpointer = Checkpoints(root, ranks, every_steps=1, keep_last=1, commit_timeout=1)
        handles = []
        for step in (1, 2, 3):
            tensor = {"t": torch.full((4,), step)}
            handle = getattr(checkpointer, how)(step, tensor)
            assert handle is not None
            handle.join()
            ranks.gather(b"")
            handles.append(handle)
        for handle in handles:
            handle.wait()

    run_threads(2, run)
    assert committed(open_storage(tmp_path)) == [3]


def test_parts_of_a_failed_save_do_not_count(tmp_path: Path) -> None:
    """The same step again after a failure: what a rank left of the first save is not taken for the second."""
    inner = open_storage(tmp_path)

    def run(ranks: ThreadRanks) -> None:
        def state(value: int) -> dict[str, Any]:
            return {"own": shardckpt.PerRank(torch.full((4,), value))}

        # The first save fails on rank 0 after its claim, the second on rank 1, whose first part is there.
        storage = FailingOnce(inner, 2 if ranks.rank == 0 else 3, StorageError("gone"))
        checkpointer = Checkpoints(storage, ranks)
        for value in (1, 2):
            with pytest.raises(SaveError, match="gone"):
                checkpointer.save(7, state(value)).wait()
        checkpointer.save(7, state(3)).wait()

    run_threads(2, run)
    checkpoint = shardckpt.open(tmp_path)
    checkpoint.verify()
    assert [checkpoint.read(f"own/rank-0000{rank}")[0] for rank in range(2)] == [3, 3]


def test_a_prune_that_fails_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint is durable all the same, and the next prune deletes what was left."""
    saved(tmp_path, 1)
    # claim, pack, part, refs, manifest; then the prune
    storage = FailingOnce(open_storage(tmp_path), fail_at=6, error=StorageError("read-only"))
    with shardckpt.Checkpointer(storage, keep_last=1) as checkpointer:
        checkpointer.save(2, state_at(2)).wait()
        assert "could not be deleted: read-only" in caplog.text
        assert committed(open_storage(tmp_path)) == [2, 1]
        checkpointer.save(3, state_at(3))
    assert committed(open_storage(tmp_path)) == [3]


# -- checkpoints that are not good


def break_pack(folder: Path, step: int) -> Path:
    """Flip a bit in the pack of a step; the checkpoint's folder."""
    (place,) = [place for place in iter_places(open_storage(folder)) if place.order[1] == step]
    pack = folder / place.path / "rank-00000" / "data.pack"
    content = bytearray(pack.read_bytes())
    content[17] ^= 4
    pack.write_bytes(content)
    return folder / place.path


def test_a_bad_checkpoint_is_marked_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that fails verification is reported and left in place, the one before is taken, and later
    restores and opens do not read it again."""
    saved(tmp_path, 1, 2, 3)
    bad = break_pack(tmp_path, 3)
    assert restored(tmp_path) == 2
    assert "'t'" in caplog.text
    assert "going on with the checkpoint before it" in caplog.text
    assert "checksum" in json.loads((bad / BAD).read_text())["error"]
    assert (bad / "rank-00000" / "data.pack").exists()
    assert shardckpt.open(tmp_path).step == 2
    assert shardckpt.load(tmp_path, state_at(0)).step == 2
    caplog.clear()
    assert restored(tmp_path) == 2
    assert "checksum" not in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": "shardckpt/1"}'])
def test_a_damaged_manifest_is_passed_over(damage: bytes, tmp_path: Path) -> None:
    """A manifest that is not valid is as bad as a pack that is not."""
    saved(tmp_path, 1, 2)
    manifest = next(tmp_path.glob("*/step-00000002/manifest.json"))
    manifest.write_bytes(damage)
    assert restored(tmp_path) == 1
    assert (manifest.parent / BAD).exists()


def test_a_newer_version_is_not_passed_over(tmp_path: Path) -> None:
    """A checkpoint that a newer library wrote is not bad: going back silently would lose work."""
    saved(tmp_path, 1, 2)
    manifest = next(tmp_path.glob("*/step-00000002/manifest.json"))
    document = records.open_sealed(manifest.read_bytes(), manifest.name)
    newer = document.replace(b"shardckpt/1", b"shardckpt/2", 1)
    manifest.write_bytes(records.encode(msgspec.Raw(newer)))
    with pytest.raises(UnknownVersionError, match="shardckpt/2"):
        restored(tmp_path)
    assert not (manifest.parent / BAD).exists()


def test_no_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    """If all are bad, training does not silently start from nothing: at once, and again later."""
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        break_pack(tmp_path, step)
    for _ in range(2):
        with pytest.raises(CorruptError):
            restored(tmp_path)
    with pytest.raises(CorruptError, match=r"every checkpoint of .* is marked as bad"):
        shardckpt.load(tmp_path, state_at(0))


def test_a_state_that_does_not_fit_is_no_reason_to_go_back(tmp_path: Path) -> None:
    """A mismatch is the caller's error: it is raised, and no checkpoint is marked."""
    saved(tmp_path, 1, 2)
    with pytest.raises(StateError):
        shardckpt.Checkpointer(tmp_path).restore({"t": torch.zeros(3), "step": 0})
    assert not list(tmp_path.rglob(BAD))


def test_bad_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """keep_last counts good checkpoints; bad ones go when as many good ones are newer."""
    saved(tmp_path, 1, 2, 3)
    break_pack(tmp_path, 3)
    assert restored(tmp_path) == 2
    checkpointer = saved(tmp_path, 4, keep_last=2)
    assert committed(open_storage(tmp_path)) == [4, 3, 2]
    checkpointer.save(5, state_at(5))
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == [5, 4]


def test_ranks_pass_over_the_same_checkpoint(tmp_path: Path) -> None:
    """A chunk that only one rank reads is bad: all ranks take the one before, and none changes in between."""

    def state(value: int) -> dict[str, Any]:
        return {"t": torch.full((10,), value), "own": shardckpt.PerRank(torch.full((10,), value))}

    def save(ranks: ThreadRanks) -> None:
        checkpointer = Checkpoints(open_storage(tmp_path), ranks)
        checkpointer.save(1, state(1))
        checkpointer.save(2, state(2))
        checkpointer.wait()

    run_threads(3, save)
    pack = next(tmp_path.glob("*/step-00000002/rank-00002/data.pack"))
    content = bytearray(pack.read_bytes())
    content[0] ^= 1
    pack.write_bytes(content)

    def restore(ranks: ThreadRanks) -> None:
        held = state(0)
        loaded = Checkpoints(open_storage(tmp_path), ranks).restore(held)
        assert loaded is not None
        assert loaded.step == 1
        assert held["t"].tolist() == held["own"].value.tolist() == [1] * 10

    run_threads(3, restore)


def test_ranks_that_find_different_errors_agree(tmp_path: Path) -> None:
    """One rank finds a corrupt chunk, another one cannot read at all: all raise the same, none goes on."""

    def state(ranks: ThreadRanks) -> dict[str, Any]:
        return {"own": shardckpt.PerRank(torch.full((10,), ranks.rank))}

    def save(ranks: ThreadRanks) -> None:
        checkpointer = Checkpoints(open_storage(tmp_path), ranks)
        checkpointer.save(1, state(ranks)).wait()

    run_threads(2, save)
    pack = next(tmp_path.glob("*/*/rank-00000/data.pack"))
    pack.write_bytes(bytes(len(pack.read_bytes())))

    class Unreadable(FaultyStorage):
        def read_into(self, path: str, *_: object) -> None:
            raise StorageError(f"{path} cannot be read")

    def restore(ranks: ThreadRanks) -> None:
        inner = open_storage(tmp_path)
        checkpointer = Checkpoints(Unreadable(inner) if ranks.rank else inner, ranks)
        with pytest.raises(CorruptError):
            checkpointer.restore(state(ranks))

    run_threads(2, restore)


# -- a real world of processes


def _resume_and_save(rank: int, folder: Path, expected: int | None) -> list[Any]:
    """One attempt of a job: restore, and a few steps, the last of them saved at the end."""
    state = {"t": torch.zeros(6), "own": shardckpt.PerRank({"rank": rank, "seen": []})}
    with shardckpt.Checkpointer(folder, every_steps=2, keep_last=2) as checkpointer:
        loaded = checkpointer.restore(state)
        assert (loaded.step if loaded else None) == expected
        step = loaded.step if loaded else 0
        for _ in range(5):
            step += 1
            state["t"] += 1
            state["own"].value["seen"].append(step)
            checkpointer.step(step, state, {"loss": float(rank)})
            checkpointer.wait()
    return [step, state["t"].tolist(), state["own"].value]


def test_a_job_of_processes(tmp_path: Path) -> None:
    """Restarted with other numbers of processes: the run goes on from its newest checkpoint each time."""
    results = run_processes(2, _resume_and_save, tmp_path, None)
    assert [result[0] for result in results] == [5, 5]
    results = run_processes(3, _resume_and_save, tmp_path, 5)
    for rank, (step, tensor, own) in enumerate(results):
        assert (step, tensor) == (10, [10.0] * 6)
        assert own == {"rank": rank, "seen": [*(range(1, 11) if rank < 2 else range(6, 11))]}
    ((step, tensor, _),) = run_processes(1, _resume_and_save, tmp_path, 10)
    assert (step, tensor) == (15, [15.0] * 6)
    assert committed(open_storage(tmp_path)) == [15, 14]
    assert shardckpt.open(tmp_path).metrics == {"loss": 0.0}


def test_an_invalid_manifest_is_named(tmp_path: Path) -> None:
    """Asked for by its own URL, a bad checkpoint is an error and nothing else is taken instead."""
    saved(tmp_path, 1, 2)
    manifest = next(tmp_path.glob("*/step-00000002/manifest.json"))
    manifest.write_bytes(b"[]")
    with pytest.raises(FormatError, match="step-00000002"):
        shardckpt.load(manifest.parent, state_at(0))


def test_a_step_that_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    """A last `save` needs no condition: it gives back the handle of what has just been saved."""
    checkpointer = shardckpt.Checkpointer(tmp_path, every_steps=5)
    handle = checkpointer.step(5, state_at(5))
    assert handle is not None
    assert checkpointer.save(5, state_at(5)) is handle
    checkpointer.wait()
    assert checkpointer.save(5, state_at(5)) is handle
    assert checkpointer.save(6, state_at(6)) is not handle
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == [6, 5]


# -- what must not be lost silently


def test_metrics_of_a_step_that_is_saved_already(tmp_path: Path) -> None:
    """A second save of a step is dropped only if it says nothing new, in its state and in its metrics."""
    state = state_at(5)
    with shardckpt.Checkpointer(tmp_path, every_steps=5) as checkpointer:
        first = checkpointer.step(5, state, {"loss": 0.5})
        assert first is not None
        assert checkpointer.save(5, state, {"loss": 0.5}) is first
        assert checkpointer.save(5, state) is first
        second = checkpointer.save(5, state, {"loss": 0.5, "accuracy": 0.9})
        assert second is not first
        state["t"][50] += 1  # in one element
        third = checkpointer.save(5, state, {"accuracy": 0.9})
        assert third is not second
        state["step"] = 6
        assert checkpointer.step(5, state) is not third
    found = {place.path: shardckpt.open(place.url) for place in iter_places(open_storage(tmp_path))}
    assert [(path, at.metrics) for path, at in sorted(found.items())] == [
        ("attempt-0001/step-00000005", {"loss": 0.5}),
        ("attempt-0002/step-00000005", {"loss": 0.5, "accuracy": 0.9}),
        ("attempt-0003/step-00000005", {"accuracy": 0.9}),
        ("attempt-0004/step-00000005", {}),
    ]
    assert shardckpt.open(tmp_path).read("t")[50] == 6


def test_without_a_cadence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`step` does not save, which is told once; the end of the block saves the last step."""
    with shardckpt.Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 5):
            assert checkpointer.step(step, state_at(step), {"loss": step}) is None
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "step 1 is not saved, nor are those after it: every_steps is not given, so that only `save` saves, and "
        "`close` the last step"
    ]
    assert restored(tmp_path) == 4
    assert shardckpt.open(tmp_path).metrics == {"loss": 4.0}


def test_a_script_that_ends_with_sys_exit(tmp_path: Path) -> None:
    """Without an error, that is an end like any other; with one, ranks may not agree on it."""
    for code, steps in ((0, [3]), (None, [3]), (1, []), ("wrong", [])):
        folder = tmp_path / f"run-{code}"
        with pytest.raises(SystemExit), shardckpt.Checkpointer(folder, every_steps=2) as checkpointer:
            checkpointer.step(3, state_at(3))
            raise SystemExit(code)
        assert committed(open_storage(folder)) == steps


def test_nobody_closes_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is lost then is told."""
    checkpointer = shardckpt.Checkpointer(tmp_path, every_steps=10)
    checkpointer.step(7, state_at(7))
    del checkpointer
    gc.collect()
    assert (
        f"step 7 is not saved in {tmp_path}: training has ended without Checkpointer.close" in caplog.text
    )


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


@pytest.mark.parametrize("end", ["", "/"])
def test_the_url_of_a_checkpoint(end: str, tmp_path: Path) -> None:
    """Nothing is written into it: the run is named."""
    saved(tmp_path, 1).close()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"is a checkpoint in a run, and not the run: give {tmp_path},"):
        shardckpt.Checkpointer(f"{tmp_path}/attempt-0001/step-00000001{end}")
    with pytest.raises(NotACheckpointError, match=rf"is an attempt of a run.* the run is {tmp_path}$"):
        shardckpt.Checkpointer(f"{tmp_path}/attempt-0001{end}").restore(state_at(0))
    handle = shardckpt.Checkpointer(f"{tmp_path}/attempt-0001{end}").save(2, state_at(2))
    with pytest.raises(SaveError, match="is an attempt of a run"):
        handle.wait()
    assert sorted(tmp_path.rglob("*")) == before
    shardckpt.save(tmp_path / "alone", state_at(1))
    with pytest.raises(NotACheckpointError, match="is a checkpoint, and not a run"):
        shardckpt.Checkpointer(tmp_path / "alone").restore(state_at(0))
