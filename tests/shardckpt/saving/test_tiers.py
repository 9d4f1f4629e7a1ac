"""Tiers: which save goes where, what is waited for, what a restore takes, and what happens when one fails.

The saver runs in a thread of the test, with storages that wait or fail as the test wants.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiobotocore.session
import pytest
import torch

import shardckpt
from shardckpt.checkpointer import Checkpointer
from shardckpt.errors import CheckpointError, SaveError, StorageError, StorageFullError
from shardckpt.loading.load import Loaded
from shardckpt.run.places import BAD, iter_places
from shardckpt.run.save_info import SaveInfo
from shardckpt.saving.backend import Save
from shardckpt.storage import Storage, open_storage
from tests.kit.faults import FailingOnce, HookedStorage, SaverThread, saver_thread
from tests.kit.mounts import Mount, remount_read_only
from tests.kit.servers import S3Server, faulty_proxy
from tests.kit.trainers import crash, saver_of, wait_ready
from tests.kit.worlds import Checkpoints, ThreadRanks, outcomes

LIMIT = 30.0
"""Seconds within which everything that is not held up by a test is over."""


class Tiers:
    """Two folders, or a folder and what else is given, as a saver in this process sees them.

    hooks: what to call before each call of a tier's storage, by the tier's name.
    """

    def __init__(self, local: str, remote: str) -> None:
        self.local = local
        self.remote = remote
        self.hooks: dict[str, Callable[[str, str], object]] = {}

    def open(self, url: str, options: dict[str, Any] | None) -> Storage:
        """The opener of the saver."""
        name = "local" if url == self.local else "remote"
        return HookedStorage(
            open_storage(url, options), lambda method, path: self._hook(name, method, path)
        )

    def _hook(self, name: str, method: str, path: str) -> None:
        if (hook := self.hooks.get(name)) is not None:
            hook(method, path)

    def checkpointer(self, **options: Any) -> Checkpointer:
        return Checkpointer(
            self.remote, local=self.local, **{"snapshots": 2, "commit_timeout": LIMIT, **options}
        )

    @contextmanager
    def held_up(self, name: str) -> Iterator[Callable[[], None]]:
        """Packs of this tier wait, until what is given is called, or the block is left."""
        opened = threading.Event()
        self.hooks[name] = lambda method, _path: method != "write_pack" or opened.wait(LIMIT)
        try:
            yield opened.set
        finally:
            opened.set()

    @contextmanager
    def failing(self, name: str, error: OSError, method: str = "write_pack") -> Iterator[None]:
        """These calls of this tier fail."""

        def fail(called: str, _path: str) -> None:
            if called == method:
                raise error

        self.hooks[name] = fail
        try:
            yield
        finally:
            del self.hooks[name]


@pytest.fixture
def tiers(tmp_path: Path) -> Tiers:
    """Two folders, called local and remote."""
    return Tiers(str(tmp_path / "local"), str(tmp_path / "remote"))


@pytest.fixture
def saver(tiers: Tiers) -> Iterator[None]:
    """A saver that has `tiers`."""
    with saver_thread(tiers.open):
        yield


@pytest.fixture(params=[0, 2], ids=["own thread", "saver"])
def anyone(request: pytest.FixtureRequest, tiers: Tiers) -> Iterator[dict[str, int]]:
    """Saves are written by the trainers, or by a saver: the argument for it."""
    with saver_thread(tiers.open):
        yield {"snapshots": request.param}


def state_at(step: int) -> dict[str, Any]:
    return {"weight": torch.full((3000,), float(step)), "step": step}


def committed(url: str) -> list[int]:
    return [place.order[1] for place in iter_places(open_storage(url)) if place.is_committed()]


def restored(checkpointer: Checkpointer) -> Loaded:
    """What the checkpointer restores, checked."""
    state = state_at(0)
    loaded = checkpointer.restore(state)
    assert loaded is not None
    assert torch.equal(state["weight"], state_at(loaded.step)["weight"])
    assert state["step"] == loaded.step
    return loaded


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, state_at(step)).wait()


def damage(folder: str, step: int) -> None:
    """Change a byte in the middle of a checkpoint's pack."""
    (pack,) = Path(folder).glob(f"attempt-*/step-{step:08d}/rank-00000/data.pack")
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)


# -- which save goes where


@pytest.mark.usefixtures("saver")
def test_which_save_goes_where(tiers: Tiers) -> None:
    checkpointer = tiers.checkpointer(every_steps=2, local_every_steps=4, url_every_steps=12)
    went = {}
    for step in range(1, 25):
        handle = checkpointer.step(step, state_at(step))
        if handle is not None:
            handle.wait()
            went[step] = handle.tiers
    checkpointer.close()
    assert went == {
        step: (
            "memory",
            *(["local"] if step % 4 == 0 else []),
            *(["remote"] if step % 12 == 0 else []),
        )
        for step in range(2, 25, 2)
    }
    assert committed(tiers.local) == [24, 20, 16, 12, 8, 4]
    assert committed(tiers.remote) == [24, 12]


def test_save_goes_everywhere(tiers: Tiers, anyone: dict[str, int]) -> None:
    """What a script asks for goes to all tiers, whatever the cadence; also where the step was saved in some."""
    checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=5, **anyone)
    handle = checkpointer.step(3, state_at(3))
    assert handle is not None
    assert (handle.tiers, handle.url.startswith(tiers.local)) == (("memory", "local"), True)
    handle.wait()
    handle = checkpointer.save(4, state_at(4))
    assert (handle.tiers, handle.url.startswith(tiers.remote)) == (("memory", "local", "remote"), True)
    checkpointer.close()
    assert (committed(tiers.local), committed(tiers.remote)) == ([4, 3], [4])


def test_a_last_save_of_a_step_that_is_in_some_tiers(tiers: Tiers, anyone: dict[str, int]) -> None:
    checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=5, **anyone)
    checkpointer.step(3, state_at(3))
    checkpointer.save(3, state_at(3)).wait()
    checkpointer.close()
    assert (committed(tiers.local), committed(tiers.remote)) == ([3], [3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps must be a whole number"),
        ({"every_steps": 2.0}, "every_steps must be a whole number"),
        ({"every_steps": 4, "url_every_steps": 6}, "url_every_steps must be a multiple of every_steps"),
        ({"every_steps": 4, "local_every_steps": 2}, "local_every_steps must be a multiple of every_steps"),
        ({"url_every_steps": 2}, "url_every_steps must be a multiple of every_steps, which is None"),
        ({"every_steps": 1, "local": None, "local_every_steps": 2}, "local_every_steps needs local"),
        ({"snapshots": 3}, "snapshots must be 0, 1 or 2"),
        ({"snapshots": True}, "snapshots must be 0, 1 or 2"),
        ({"keep_last": 0}, "keep_last must be a whole number"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path / "run", **{"local": tmp_path / "local", **options})
    assert list(tmp_path.iterdir()) == []


def test_one_folder_cannot_be_two_tiers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="local and url are the same"):
        Checkpointer(tmp_path / "run", local=f"{tmp_path}/run/")


def test_each_tier_keeps_its_own_last(tiers: Tiers, anyone: dict[str, int]) -> None:
    checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=3, keep_last=2, **anyone)
    for step in range(1, 11):
        handle = checkpointer.step(step, state_at(step))
        assert handle is not None
        handle.wait()
    checkpointer.close()
    assert (committed(tiers.local), committed(tiers.remote)) == ([10, 9], [9, 6])


def test_local_is_for_one_node(tiers: Tiers) -> None:
    def work(ranks: ThreadRanks) -> None:
        ranks.node = f"node-{ranks.rank}"
        Checkpoints(tiers.remote, ranks, local=tiers.local, snapshots=0).restore(state_at(0))

    for error in outcomes(2, work):
        assert isinstance(error, ValueError)
        assert "is for a job on one node, and this one is on 2" in str(error)
    assert not Path(tiers.remote).exists()


def test_options_that_only_this_process_can_have(
    moto_s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saves are then written by the trainers, to both tiers, and that is said."""
    options = {**moto_s3.options, "session": aiobotocore.session.get_session()}
    url = moto_s3.url()
    checkpointer = Checkpointer(url, local=tmp_path, storage_options=options, snapshots=2)
    assert "storage_options cannot be told to the saver" in caplog.text
    save(checkpointer, 1)
    checkpointer.close()
    assert committed(str(tmp_path)) == [1]
    assert shardckpt.load(url, state_at(0), storage_options=moto_s3.options).step == 1


def test_a_save_whose_credentials_have_expired_is_made_with_others(
    moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which were written by whatever renews them: later saves find them, and the last one is tried again."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def renew(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key=s\n")

    renew("one")
    url = moto_s3.url()
    stale: set[str] = set()
    with faulty_proxy(moto_s3.endpoint) as proxy, saver_thread() as saver:
        proxy.faults = lambda method, _path: (
            "expired" if method == "PUT" and proxy.keys[-1] in stale else None
        )
        options = {"endpoint_url": proxy.endpoint, "transfer_deadline": 3}
        checkpointer = Checkpointer(url, storage_options=options, snapshots=2)
        save(checkpointer, 1)
        stale.add("one")
        with pytest.raises(SaveError, match="ExpiredToken"):
            save(checkpointer, 2)
        renew("two")
        save(checkpointer, 3)
        stale.add("two")
        with pytest.raises(SaveError, match="ExpiredToken"):
            save(checkpointer, 4)
        renew("three")
        with contextlib.suppress(SaveError):  # of step 4, as far as this process has heard
            checkpointer.close()
        assert saver.drain() == 0
    assert shardckpt.load(url, state_at(0), storage_options=moto_s3.options).step == 4


# -- waiting


@pytest.mark.usefixtures("saver")
def test_wait_waits_for_a_tier(tiers: Tiers) -> None:
    checkpointer = tiers.checkpointer()
    with tiers.held_up("remote") as go_on, ThreadPoolExecutor(1) as pool:
        handle = checkpointer.save(1, state_at(1))
        handle.wait("memory")
        handle.wait("local")
        assert committed(tiers.local) == [1]
        everything = pool.submit(handle.wait)
        assert handle.busy
        assert not everything.done()
        assert committed(tiers.remote) == []
        go_on()
        handle.wait("remote")
        assert committed(tiers.remote) == [1]
        everything.result(LIMIT)
        assert not handle.busy
    checkpointer.close()


@pytest.mark.usefixtures("saver")
def test_the_tiers_do_not_wait_for_each_other(tiers: Tiers) -> None:
    checkpointer = tiers.checkpointer()
    with tiers.held_up("local") as go_on:
        handle = checkpointer.save(1, state_at(1))
        handle.wait("remote")
        assert (committed(tiers.local), committed(tiers.remote)) == ([], [1])
        go_on()
        handle.wait()
        assert committed(tiers.local) == [1]
    checkpointer.close()


def test_wait_for_what_the_save_does_not_go_to(tiers: Tiers, anyone: dict[str, int]) -> None:
    checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=2, **anyone)
    handle = checkpointer.step(1, state_at(1))
    assert handle is not None
    for tier in ("remote", "disk", ""):
        with pytest.raises(ValueError, match=f"goes to memory, local, and not to '{tier}'"):
            handle.wait(tier)
    checkpointer.close()


@pytest.mark.usefixtures("saver")
def test_a_slow_remote_does_not_hold_up_local(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    """While the remote is at work on one save, others become durable in local, as long as memory lasts."""
    checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=4)
    with tiers.held_up("remote"):
        for step in range(4, 8):
            handle = checkpointer.step(step, state_at(step))
            assert handle is not None, f"step {step} was skipped"
            handle.wait("local")
            wait_ready(checkpointer)
        assert committed(tiers.local) == [7, 6, 5, 4]
        assert committed(tiers.remote) == []
        assert checkpointer.step(8, state_at(8)) is not None  # waits behind the other in the remote
        assert checkpointer.step(9, state_at(9)) is None
        assert "no checkpoint at step 9: steps 4 and 8 are still being written" in caplog.text
    checkpointer.close()  # which makes step 9 good
    assert (committed(tiers.local), committed(tiers.remote)) == ([9, 8, 7, 6, 5, 4], [9, 8, 4])


# -- restoring


def test_the_newest_and_of_equals_the_nearest(tiers: Tiers) -> None:
    with saver_thread(tiers.open):
        checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=2, local_every_steps=1)
        save(checkpointer, 1, 2)
        loaded = restored(tiers.checkpointer())
        assert (loaded.tier, loaded.step, loaded.attempt) == ("memory", 2, 1)
        assert loaded.url == f"{tiers.remote}/attempt-0001/step-00000002"
        assert loaded.nbytes >= 12000
        assert 0 < loaded.seconds < LIMIT
        checkpointer.close()
    shutil.rmtree(f"{tiers.local}/attempt-0001/step-00000002")
    with saver_thread(tiers.open):
        loaded = restored(tiers.checkpointer())
        assert (loaded.tier, loaded.step, loaded.attempt) == ("remote", 2, 1)
        assert loaded.url == f"{tiers.remote}/attempt-0001/step-00000002"
        checkpointer = tiers.checkpointer()
        assert restored(checkpointer).tier == "remote"
        save(checkpointer, 1)  # of a newer attempt, so newer than step 2 of the first
        checkpointer.close()
    with saver_thread(tiers.open):
        loaded = restored(tiers.checkpointer())
        assert (loaded.tier, loaded.step, loaded.attempt) == ("local", 1, 4)
        assert loaded.url == f"{tiers.local}/attempt-0004/step-00000001"
        assert loaded.nbytes >= 12000


@pytest.mark.usefixtures("saver")
def test_a_bad_local_one_is_no_reason_to_go_back(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    """The same checkpoint in the remote tier is taken, and the bad one is marked where it is."""
    checkpointer = tiers.checkpointer(snapshots=0)
    save(checkpointer, 1, 2)
    checkpointer.close()
    damage(tiers.local, 2)
    loaded = restored(tiers.checkpointer())
    assert (loaded.tier, loaded.step) == ("remote", 2)
    assert "going on with" in caplog.text
    step = "attempt-0001/step-00000002"
    assert Path(tiers.local, step, BAD).exists()
    assert not Path(tiers.remote, step, BAD).exists()
    damage(tiers.remote, 2)
    loaded = restored(tiers.checkpointer())
    assert (loaded.tier, loaded.step) == ("local", 1)
    assert Path(tiers.remote, step, BAD).exists()


def test_only_bad_ones(tiers: Tiers) -> None:
    checkpointer = tiers.checkpointer(snapshots=0)
    save(checkpointer, 1)
    checkpointer.close()
    damage(tiers.local, 1)
    damage(tiers.remote, 1)
    for _ in range(2):  # when it is found out, and when it is known
        with pytest.raises(CheckpointError):
            tiers.checkpointer(snapshots=0).restore(state_at(0))


def test_a_bad_tier_beside_one_without_checkpoints(tiers: Tiers) -> None:
    """Bad ones in one tier, which is no new run, whatever the other tier has."""
    checkpointer = tiers.checkpointer(snapshots=0, every_steps=1, url_every_steps=2)
    checkpointer.step(1, state_at(1))
    checkpointer.close()
    damage(tiers.local, 1)
    for _ in range(2):
        with pytest.raises(CheckpointError):
            tiers.checkpointer(snapshots=0).restore(state_at(0))


@pytest.mark.parametrize("method", ["list", "size", "read", "read_into"])
def test_a_local_tier_that_cannot_be_read(
    method: str, tiers: Tiers, caplog: pytest.LogCaptureFixture
) -> None:
    """The remote one has the same."""
    checkpointer = tiers.checkpointer(snapshots=0)
    save(checkpointer, 1)
    checkpointer.close()

    def hook(called: str, _path: str) -> None:
        if called == method:
            raise StorageError("the disk is gone")

    checkpointer = Checkpointer(
        tiers.remote,
        local=HookedStorage(open_storage(tiers.local), hook),  # type: ignore[arg-type]
        snapshots=0,
    )
    loaded = restored(checkpointer)
    assert (loaded.tier, loaded.step) == ("remote", 1)
    assert "the disk is gone" in caplog.text
    assert not list(Path(tiers.local).rglob(BAD))


def test_a_remote_tier_that_cannot_be_read(tiers: Tiers) -> None:
    """It may have something newer than local, so nothing is restored behind its back."""
    checkpointer = tiers.checkpointer(snapshots=0)
    save(checkpointer, 1)
    checkpointer.close()

    def hook(called: str, path: str) -> None:
        if called == "list" and path:  # when the attempt is claimed
            raise StorageError("the network is gone")

    remote = HookedStorage(open_storage(tiers.remote), hook)
    checkpointer = Checkpointer(remote, local=tiers.local, snapshots=0)
    with pytest.raises(StorageError, match="the network is gone"):
        checkpointer.restore(state_at(0))


# -- memory


def test_what_is_in_memory_only(tiers: Tiers) -> None:
    """It outlives the trainers, is restored from, and is persisted when nobody will come for it any more."""
    with saver_thread(tiers.open) as saver:
        checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=100, local_every_steps=100)
        for step in (1, 2, 3):
            handle = checkpointer.step(step, state_at(step))
            assert handle is not None
            assert (handle.tiers, handle.url) == (("memory",), "memory")
            handle.wait("memory")
            handle.wait()
            wait_ready(checkpointer)
        assert (committed(tiers.local), committed(tiers.remote)) == ([], [])
        crash(checkpointer)
        loaded = restored(tiers.checkpointer())
        assert (loaded.tier, loaded.step) == ("memory", 3)
        assert saver.drain() == 0
    assert (committed(tiers.local), committed(tiers.remote)) == ([3], [3])


def test_the_last_one_is_persisted_at_the_end(tiers: Tiers) -> None:
    with saver_thread(tiers.open) as saver:
        with tiers.checkpointer(every_steps=1, url_every_steps=4, local_every_steps=2) as checkpointer:
            for step in (1, 2, 3, 4, 5):
                handle = checkpointer.step(step, state_at(step))
                assert handle is not None
                handle.wait()
                wait_ready(checkpointer)
        assert saver.drain() == 0
    assert (committed(tiers.local), committed(tiers.remote)) == ([5, 4, 2], [5, 4])


@pytest.mark.parametrize("says_goodbye", [True, False])
@pytest.mark.parametrize("snapshots", [1, 2])
def test_a_snapshot_that_is_then_saved_is_persisted_once(
    snapshots: int, says_goodbye: bool, tiers: Tiers
) -> None:
    """A last save at the end of training, of a step that went to memory only: nothing is left to persist."""
    with saver_thread(tiers.open) as saver:
        options = {"every_steps": 1, "url_every_steps": 100, "local_every_steps": 100}
        checkpointer = tiers.checkpointer(snapshots=snapshots, **options)
        for step in (1, 2):
            handle = checkpointer.step(step, state_at(step))
            assert handle is not None
            assert handle.tiers == ("memory",)
            handle.wait()
            save(checkpointer, step)
        if says_goodbye:
            checkpointer.close()
        else:
            crash(checkpointer)
        assert saver.drain() == 0
    assert (committed(tiers.local), committed(tiers.remote)) == ([2, 1], [2, 1])


def test_a_snapshot_whose_second_save_never_came_is_persisted(tiers: Tiers) -> None:
    with saver_thread(tiers.open) as saver:
        checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=100, local_every_steps=100)
        handle = checkpointer.step(1, state_at(1))
        assert handle is not None
        handle.wait()
        # In the copy of another save of the step the trainer dies.
        saver_of(checkpointer).begin(
            Save(SaveInfo("another", "attempt-0001/step-00000001", 1, 1, 1), 0, 1, [], {}, None)
        )
        crash(checkpointer)
        assert saver.drain() == 0
    assert (committed(tiers.local), committed(tiers.remote)) == ([1], [1])


def test_no_memory_to_keep_saves_in(tiers: Tiers) -> None:
    """Without a saver, a save that goes to no durable tier would be for nothing."""
    checkpointer = tiers.checkpointer(every_steps=1, url_every_steps=4, local_every_steps=2, snapshots=0)
    handles = {step: checkpointer.step(step, state_at(step)) for step in (1, 2)}
    assert handles[1] is None
    assert handles[2] is not None
    checkpointer.close()
    assert committed(tiers.local) == [2]


def test_a_saver_that_is_gone_leaves_no_memory_to_keep_saves_in(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_SAVER", "nobody-listens-here")
    with tiers.checkpointer(every_steps=1, url_every_steps=4, local_every_steps=2) as checkpointer:
        handle = checkpointer.step(2, state_at(2))  # in which the ranks see that there is none
        assert handle is not None
        handle.wait()
        assert checkpointer.step(3, state_at(3)) is None
        assert committed(tiers.local) == [2]
    assert committed(tiers.local) == [3, 2]


# -- faults

FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


@pytest.mark.usefixtures("saver")
@pytest.mark.parametrize("tier", ["local", "remote"])
@pytest.mark.parametrize("error", [FULL, BROKEN, READ_ONLY], ids=["full", "broken", "read-only"])
@pytest.mark.parametrize("method", ["write_pack", "write", "create", "read", "sizes"])
def test_one_tier_fails(
    method: str, error: OSError, tier: str, tiers: Tiers, caplog: pytest.LogCaptureFixture
) -> None:
    """The save is durable in the other, `wait` tells where it is not, and the next one is whole again."""
    other = "remote" if tier == "local" else "local"
    checkpointer = tiers.checkpointer(keep_last=2)
    save(checkpointer, 1)
    with tiers.failing(tier, error, method):
        handle = checkpointer.save(2, state_at(2))
        handle.wait("memory")
        handle.wait(other)
        url = f"{getattr(tiers, tier)}/attempt-0001/step-00000002"
        for wait in (lambda: handle.wait(tier), handle.wait, checkpointer.wait):
            with pytest.raises(SaveError, match=f"saving {url} failed: .*{error.strerror}"):
                wait()
        assert f"saving {url} failed" in caplog.text
    assert (committed(getattr(tiers, tier)), committed(getattr(tiers, other))) == ([1], [2, 1])
    save(checkpointer, 3)
    checkpointer.close()
    assert (committed(getattr(tiers, tier)), committed(getattr(tiers, other))) == ([3, 1], [3, 2])
    for url in (tiers.local, tiers.remote):
        shardckpt.open(url).verify()


def test_every_rank_knows_in_which_tier_a_save_failed(tiers: Tiers) -> None:
    """Also one whose own part is durable in both, and which does not commit."""

    def work(ranks: ThreadRanks) -> dict[str, bool]:
        local: Any = tiers.local
        if ranks.rank == 1:
            local = FailingOnce(open_storage(local), 1, StorageFullError("no space left"))
        checkpointer = Checkpoints(tiers.remote, ranks, local=local, every_steps=1, snapshots=0)
        handle = checkpointer.step(1, state_at(1))
        assert handle is not None
        handle.join()
        ranks.gather(b"")  # all have done so
        checkpointer.step(2, state_at(2))  # before which the ranks tell each other
        fails = {}
        for tier in ("local", "remote"):
            try:
                handle.wait(tier)
            except SaveError:
                fails[tier] = True
            else:
                fails[tier] = False
        checkpointer.close()
        return fails

    assert outcomes(3, work) == [{"local": True, "remote": False}] * 3
    assert (committed(tiers.local), committed(tiers.remote)) == ([2], [2, 1])


def told_by(saver: SaverThread) -> list[dict[str, Any]]:
    """Drain a saver, and all that it has told."""
    saver._control.shutdown(socket.SHUT_WR)
    lines = b""
    while more := saver._control.recv(1 << 16):
        lines += more
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.parametrize("broken", [["local"], ["remote"], ["local", "remote"]], ids=" ".join)
def test_a_snapshot_that_failed_is_restored_from_and_tried_once_more(
    broken: list[str], tiers: Tiers
) -> None:
    """Training ends well all the same, and once there is space the job's end makes the snapshot durable."""
    with saver_thread(tiers.open) as saver:
        with contextlib.ExitStack() as faults, tiers.checkpointer(every_steps=1) as checkpointer:
            save(checkpointer, 1)
            for tier in broken:
                faults.enter_context(tiers.failing(tier, FULL))
            assert checkpointer.step(2, state_at(2)) is not None
        checkpointer = tiers.checkpointer()
        loaded = restored(checkpointer)
        assert (loaded.tier, loaded.step) == ("memory", 2)
        checkpointer.close()
        told = told_by(saver)
        assert saver.drain() == 0
    assert (committed(tiers.local), committed(tiers.remote)) == ([2, 1], [2, 1])
    assert sorted(line["tier"] for line in told if line["event"] == "failed") == broken


def test_what_fails_again_is_told_as_such(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    with saver_thread(tiers.open) as saver, tiers.failing("remote", FULL):
        with tiers.checkpointer() as checkpointer:
            checkpointer.save(1, state_at(1)).join()
        assert "training is over, and not all that it saved is durable" in caplog.text
        told = told_by(saver)
        assert saver.drain() == 1
    assert committed(tiers.local) == [1]
    failed = [(line["tier"], line["again"]) for line in told if line["event"] == "failed"]
    assert failed == [("remote", False), ("remote", True)]


def test_a_newer_save_replaces_one_that_failed(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    with saver_thread(tiers.open) as saver:
        with tiers.checkpointer() as checkpointer:
            with tiers.failing("local", FULL):
                checkpointer.save(1, state_at(1)).join()
            checkpointer.save(2, state_at(2)).join()
        assert saver.drain() == 0
    assert "training is over" not in caplog.text
    assert (committed(tiers.local), committed(tiers.remote)) == ([2], [2, 1])


def test_the_newest_snapshot_takes_the_place_of_a_failed_save(tiers: Tiers) -> None:
    """What failed in one tier only is made good there by a later one, that was not meant for it."""
    with saver_thread(tiers.open) as saver:
        with tiers.checkpointer(every_steps=1, local_every_steps=1, url_every_steps=2) as checkpointer:
            for step in (1, 2, 3):
                with tiers.failing("remote", FULL):
                    handle = checkpointer.step(step, state_at(step))
                    assert handle is not None
                    handle.join()
        assert saver.drain() == 0
    assert (committed(tiers.local), committed(tiers.remote)) == ([3, 2, 1], [3])


def test_a_save_that_is_lost_with_its_saver_is_raised(tiers: Tiers) -> None:
    """The next saver knows nothing of it, and so `launch` would not tell."""
    with saver_thread(tiers.open), tiers.held_up("remote"):
        checkpointer = tiers.checkpointer()
        checkpointer.save(1, state_at(1)).wait("local")
        crash(checkpointer)
        with pytest.raises(SaveError, match="the saver of this node is gone"):
            checkpointer.close()


@pytest.mark.usefixtures("saver")
@pytest.mark.parametrize("method", ["list", "delete", "delete_tree"])
def test_retention_fails(method: str, tiers: Tiers) -> None:
    """The save is durable for all that, and a later prune does the rest."""
    checkpointer = tiers.checkpointer(keep_last=1)
    save(checkpointer, 1)
    with tiers.failing("local", BROKEN, method):
        save(checkpointer, 2)
        assert 2 in committed(tiers.local)
        assert committed(tiers.remote) == [2]
    save(checkpointer, 3)
    checkpointer.close()
    assert [place.order[1] for place in iter_places(open_storage(tiers.local))] == [3]


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_real_disk_that_refuses(kind: str, tiers: Tiers, mounts: Mount) -> None:
    """A file system of one megabyte; or one that is mounted read-only for a while."""
    Path(tiers.local).mkdir()
    mounts("tmpfs", Path(tiers.local), "size=1m")
    with saver_thread():
        checkpointer = tiers.checkpointer(keep_last=2)
        save(checkpointer, 1)
        filler = Path(tiers.local, "filler")
        if kind == "full":
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            expected = "No space left on device"
        else:
            remount_read_only(Path(tiers.local), options="size=1m")
            expected = "mounted read-only"
        handle = checkpointer.save(2, state_at(2))
        handle.wait("remote")
        with pytest.raises(SaveError, match=expected):
            handle.wait("local")
        with pytest.raises(SaveError):
            checkpointer.wait()
        if kind == "full":
            filler.unlink()
        else:
            remount_read_only(Path(tiers.local), read_only=False, options="size=1m")
        assert committed(tiers.local) == [1]
        save(checkpointer, 3)
        checkpointer.close()
        assert committed(tiers.local) == [3, 1]
        shardckpt.open(tiers.local).verify()


# -- object storage


@pytest.mark.parametrize("fault", [503, 429, "lose", "refuse"])
@pytest.mark.parametrize("name", ["data.pack", "rank-00000.json", "refs.json", "manifest.json"])
def test_requests_that_fail_for_a_while(
    name: str, fault: str | int, moto_s3: S3Server, tmp_path: Path
) -> None:
    """Each is made again, and the save is durable; an answer that was lost is not taken for another's writer."""
    left = [2]

    def faults(method: str, path: str) -> str | int | None:
        if method != "PUT" or name not in path or not left[0]:
            return None
        left[0] -= 1
        return fault

    with faulty_proxy(moto_s3.endpoint) as proxy, saver_thread():
        proxy.faults = faults
        url, options = moto_s3.url(), {**moto_s3.options, "endpoint_url": proxy.endpoint}
        checkpointer = Checkpointer(url, local=tmp_path, storage_options=options, snapshots=2)
        save(checkpointer, 1)
        checkpointer.close()
        assert left == [0]
    state = state_at(0)
    assert shardckpt.load(url, state, storage_options=moto_s3.options).step == 1
    assert torch.equal(state["weight"], state_at(1)["weight"])


@pytest.mark.parametrize("name", ["data.pack", "rank-00000.json", "refs.json", "manifest.json"])
def test_requests_that_are_refused(name: str, moto_s3: S3Server, tmp_path: Path) -> None:
    """The save fails in that tier, which says why, and the next one is durable again."""
    status = [403]
    with faulty_proxy(moto_s3.endpoint) as proxy, saver_thread():
        url, options = moto_s3.url(), {**moto_s3.options, "endpoint_url": proxy.endpoint}
        checkpointer = Checkpointer(url, local=tmp_path, storage_options=options, snapshots=2, keep_last=1)
        save(checkpointer, 1)
        proxy.faults = lambda method, path: status[0] if method == "PUT" and name in path else None
        handle = checkpointer.save(2, state_at(2))
        handle.wait("local")
        with pytest.raises(SaveError, match=f"{url}.*failed"):
            handle.wait("remote")
        with pytest.raises(SaveError):
            checkpointer.wait()
        root = open_storage(url, moto_s3.options)
        assert [place.order[1] for place in iter_places(root) if place.is_committed()] == [1]
        status.clear()
        proxy.faults = lambda _method, _path: None
        save(checkpointer, 3)
        checkpointer.close()
        assert [place.order[1] for place in iter_places(root)] == [3]
    shardckpt.open(root).verify()


@pytest.mark.parametrize("fault", ["cut", "reset", "flip"])
def test_answers_that_are_spoilt(fault: str, moto_s3: S3Server, tmp_path: Path) -> None:
    """What arrives truncated or broken is read again; with a wrong bit each time, the one before is taken."""
    url = moto_s3.url()
    with saver_thread():
        checkpointer = Checkpointer(url, storage_options=dict(moto_s3.options), snapshots=0)
        save(checkpointer, 1, 2)
        checkpointer.close()
    left = [1 if fault != "flip" else 100]

    def faults(method: str, path: str) -> str | None:
        if method != "GET" or "step-00000002/rank-00000/data.pack" not in path or not left[0]:
            return None
        left[0] -= 1
        return fault

    with faulty_proxy(moto_s3.endpoint) as proxy:
        proxy.faults = faults
        options = {**moto_s3.options, "endpoint_url": proxy.endpoint}
        checkpointer = Checkpointer(url, storage_options=options, snapshots=0, local=tmp_path)
        loaded = restored(checkpointer)
    assert (loaded.tier, loaded.step) == ("remote", 1 if fault == "flip" else 2)
