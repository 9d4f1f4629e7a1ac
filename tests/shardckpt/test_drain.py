"""Drains: requests reach ranks at different times, and all save and leave after the same step."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt
from launcher.progress import Progress, read_progress
from shardckpt.checkpointer import Checkpointer
from shardckpt.drain import Drained, DrainFile, DrainWatch, Request, Scope, steps_until_next
from shardckpt.errors import SaveError, StorageFullError
from shardckpt.ranks.world import Alone
from shardckpt.run.places import iter_places
from shardckpt.saving.session import SaveHandle
from shardckpt.storage import Storage, open_storage
from tests.kit.faults import FailingOnce, saver_thread
from tests.kit.parallel import Training
from tests.kit.trainers import around_saves, crash, last_save, saver_of, session_of
from tests.kit.worlds import Checkpoints, ThreadRanks, context, run_processes, run_threads

LAST = 1000
"""Steps after which a request has been overlooked."""


def ask(path: Path, tiers: str = "durable", reason: str = "preemption") -> None:
    path.write_text(f'{{"reason": "{reason}", "tiers": "{tiers}"}}\n')


def drain_file(folder: Path, rank: int = 0) -> Path:
    path = folder / f"drain-{rank}"
    path.touch()
    return path


def state_at(step: int, rank: int = 0) -> dict[str, Any]:
    return {"t": torch.full((100,), step), "step": step, "own": shardckpt.PerRank([rank, step])}


def committed(root: Storage) -> list[int]:
    return [place.order[1] for place in iter_places(root) if place.is_committed()]


def restored(checkpointer: Checkpointer) -> tuple[int, str]:
    """The step and tier that a job resumes from, its state checked."""
    state: dict[str, Any] = {
        "t": torch.zeros(100, dtype=torch.int64),
        "step": -1,
        "own": shardckpt.PerRank(None),
    }
    loaded = checkpointer.restore(state, strict=False)
    assert loaded is not None
    assert torch.equal(state["t"], torch.full((100,), loaded.step))
    assert state["step"] == loaded.step
    return loaded.step, loaded.tier


@dataclass(frozen=True)
class End:
    """What a drain tells the script."""

    step: int
    is_saved: bool
    reason: str
    code: Any


def drained(checkpointer: Checkpointer, file: Path, rank: int, request: tuple[int, str] | None) -> End:
    """Train until the drain; from the given step on, this rank's file has the request."""
    for step in range(1, LAST):
        if request is not None and step == request[0]:
            ask(file, request[1])
        try:
            checkpointer.step(step, state_at(step, rank))
        except Drained as end:
            assert end.step == step
            return End(end.step, end.is_saved, end.reason, end.code)
    raise AssertionError("the request is overlooked")


# -- agreement


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.none() | st.tuples(st.integers(1, 300), st.sampled_from(["durable", "memory"])),
        min_size=2,
        max_size=4,
    ).filter(any)
)
def test_all_ranks_drain_after_the_same_step(requests: Sequence[tuple[int, str] | None]) -> None:
    """Whenever the request reaches whom: once, and that step is saved, whole, for any number of ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def train(ranks: ThreadRanks) -> End:
            file = drain_file(folder, ranks.rank)
            with Checkpoints(open_storage(folder / "run"), ranks, drain_file=file) as checkpointer:
                try:
                    return drained(checkpointer, file, ranks.rank, requests[ranks.rank])
                finally:
                    checkpointer.close()

        ends = run_threads(len(requests), train)
        steps = {end.step for end in ends}
        assert len(steps) == 1
        step = steps.pop()
        first = min(request[0] for request in requests if request is not None)
        assert first < step <= first + 200
        assert all((end.code, end.reason, end.is_saved) == (75, "preemption", True) for end in ends)
        assert committed(open_storage(folder / "run")) == [step]
        assert restored(Checkpointer(folder / "run")) == (step, "local")


@pytest.mark.parametrize(
    "requests", [[(5, "memory"), None, (5, "durable")], [None, (5, "durable"), (6, "memory")]]
)
def test_long_steps(requests: Sequence[tuple[int, str] | None], tmp_path: Path) -> None:
    """A request is read at the next step, and answered at the one after it."""

    def train(ranks: ThreadRanks) -> End:
        file = drain_file(tmp_path, ranks.rank)
        checkpointer = Checkpoints(open_storage(tmp_path / "run"), ranks, drain_file=file, drain_interval=0)
        return drained(checkpointer, file, ranks.rank, requests[ranks.rank])

    assert [end.step for end in run_threads(3, train)] == [6, 6, 6]


def test_the_more_durable_request_counts(tmp_path: Path) -> None:
    """Where nodes are asked for different things at the same time."""

    def watch(ranks: ThreadRanks) -> Request | None:
        path = drain_file(tmp_path, ranks.rank)
        ask(path, *[("memory", "preemption"), ("durable", "restart")][ranks.rank])
        watch = DrainWatch(DrainFile(str(path)), ranks, interval=0)
        return next(found for found in iter(watch.poll, "") if found is not None)

    assert run_threads(2, watch) == [Request(Scope.DURABLE, "preemption")] * 2


@given(st.integers(1, 100), st.integers(0, 10**10))
def test_checks_come_about_ten_times_a_second(before: int, micros: int) -> None:
    """Every step where it takes long, and never many more steps than before: the next may take longer."""
    steps = steps_until_next(before, micros)
    assert 1 <= steps <= min(100, 2 * before)
    assert steps == 1 or steps * micros <= 100_000
    assert steps == min(100, 2 * before) or (steps + 1) * micros > 100_000


def test_checks_are_rare_where_steps_are_short(tmp_path: Path) -> None:
    """Few of many steps cost anything at all."""
    started = []

    class Counting(Alone):
        size = 2

        def start_maximum(self, values: Sequence[int]) -> Any:
            started.append(values)
            return super().start_maximum(values)

    watch = DrainWatch(DrainFile(str(drain_file(tmp_path))), Counting())
    for _ in range(10_000):
        assert watch.poll() is None
    watch.close()
    assert 100 <= len(started) <= 200


def _train_fsdp(rank: int, folder: Path) -> tuple[int, str, bool, Progress | None]:
    file = drain_file(folder, rank)
    os.environ["LAUNCH_DRAIN_FILE"] = str(file)
    os.environ["LAUNCH_PROGRESS_FILE"] = str(folder / f"progress-{rank}")
    training = Training.make("fsdp", factor=2.0)
    training.train(1)
    with Checkpointer(folder / "run", every_steps=10, snapshots=0) as checkpointer:
        for step in range(1, LAST):
            training.reset()
            if step == 15 + 5 * rank:
                ask(file, reason="restart")
            try:
                checkpointer.step(step, training.state(), {"loss": 1 / step})
            except SystemExit as end:
                assert isinstance(end, Drained)
                checkpointer.close()
                told = read_progress(folder / f"progress-{rank}")
                return end.step, end.reason, end.is_saved, told
            for _ in range(3):  # the training's own, which share the group
                dist.all_reduce(torch.ones(10))
    raise AssertionError("the request is overlooked")


def test_processes(tmp_path: Path) -> None:
    """Real ranks with sharded parameters: the state is bit-equal on another world size."""
    ends = run_processes(3, _train_fsdp, tmp_path)
    assert len({end[:3] for end in ends}) == 1
    step, reason, is_saved, _ = ends[0]
    assert 15 < step <= 215
    assert (reason, is_saved) == ("restart", True)
    for rank, (*_, told) in enumerate(ends):
        assert (told.step, told.loss, told.drains) == (step, 1 / step, True)
        assert told.saved == ({"local": step} if rank == 0 else {})  # by who commits, without a saver
        assert told.joined < told.first_step < told.time
        assert told.restored is None
    assert committed(open_storage(tmp_path / "run"))[0] == step
    training = Training.make("plain")
    training.train(1)
    loaded = Checkpointer(tmp_path / "run").restore(training.state(), strict=False)
    assert loaded is not None
    assert loaded.step == step
    assert training.mismatches(2.0) == []


# -- saving


def test_a_step_is_not_saved_twice(tmp_path: Path) -> None:
    """Nor is anything else changed by a drain at a step that is saved anyway, or was just before."""
    file = drain_file(tmp_path)
    for number, tiers in enumerate(("durable", "memory")):
        url = tmp_path / f"run-{number}"
        checkpointer = Checkpoints(open_storage(url), Alone(), every_steps=1, drain_file=file)
        state = state_at(1)
        checkpointer.save(1, state).wait()
        ask(file, tiers)
        with pytest.raises(Drained) as end:
            checkpointer.step(1, state)
        assert end.value.is_saved
        assert committed(open_storage(url)) == [1]
        assert restored(Checkpointer(url)) == (1, "local")


@pytest.mark.parametrize("tiers", ["memory", "durable"])
@pytest.mark.parametrize("every", [None, 4, 100])
def test_with_a_saver(tiers: str, every: int | None, tmp_path: Path) -> None:
    """It is enough that the saver has the state: the next round, on more ranks, starts from its memory."""
    with saver_thread():
        ends: list[End] = []
        saves: list[Any] = []

        def train(ranks: ThreadRanks) -> None:
            file = drain_file(tmp_path, ranks.rank)
            checkpointer = Checkpoints(
                tmp_path / "run", ranks, every_steps=every, snapshots=2, drain_file=file
            )
            ends.append(drained(checkpointer, file, ranks.rank, (7, tiers) if ranks.rank else None))
            saves.append(last_save(checkpointer))
            checkpointer.close()  # which must not tell the saver that the job is done
            crash(checkpointer)

        def go_on(ranks: ThreadRanks) -> tuple[int, str]:
            checkpointer = Checkpoints(tmp_path / "run", ranks, snapshots=2)
            found = restored(checkpointer)
            checkpointer.close()
            return found

        run_threads(2, train)
        step = ends[0].step
        assert all(end.is_saved and end.step == step for end in ends)
        is_due = tiers == "durable" or (every is not None and step % every == 0)
        assert all(save.tiers == ("memory", "local")[: 1 + is_due] for save in saves)
        assert run_threads(3, go_on) == [(step, "memory")] * 3
    assert (
        committed(open_storage(tmp_path / "run"))[0] == step
    )  # once the last is gone, durable all the same


@pytest.mark.parametrize("tiers", ["memory", "durable"])
def test_at_a_step_that_is_in_memory_only(tiers: str, tmp_path: Path) -> None:
    """It becomes durable once, by the drain's own save or when the saver ends; nothing has failed."""
    file = drain_file(tmp_path)
    with saver_thread() as saver:
        checkpointer = Checkpoints(
            tmp_path / "run", Alone(), every_steps=4, url_every_steps=100, snapshots=2, drain_file=file
        )
        handle = checkpointer.step(4, state_at(4))
        assert handle is not None
        assert handle.tiers == ("memory",)
        ask(file, tiers)
        with pytest.raises(Drained) as end:
            checkpointer.step(4, state_at(4))
        assert end.value.is_saved
        crash(checkpointer)
        assert saver.drain() == 0
    assert committed(open_storage(tmp_path / "run")) == [4]


def test_memory_without_a_saver(tmp_path: Path) -> None:
    """What no memory would keep is made durable."""
    file = drain_file(tmp_path)
    ask(file, "memory")
    checkpointer = Checkpoints(open_storage(tmp_path / "run"), Alone(), drain_file=file)
    with pytest.raises(Drained) as end:
        checkpointer.step(3, state_at(3))
    assert end.value.is_saved
    assert committed(open_storage(tmp_path / "run")) == [3]


def lose_saver_in_a_drain(checkpointer: Checkpointer) -> None:
    """In a drain, have its saver end once the ranks have seen it and before it has anything; no other starts."""

    def start_without(start: Callable[[], SaveHandle]) -> SaveHandle:
        if session_of(checkpointer).outlives_trainer:
            os.environ["LAUNCH_SAVER"] = "nobody-listens-here"
            crash(checkpointer)
            while not saver_of(checkpointer).is_lost:
                pass
        return start()

    around_saves(checkpointer, start_without, only_at_exit=True)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("every", [None, 1])
def test_memory_of_a_saver_that_ends_meanwhile(size: int, every: int | None, tmp_path: Path) -> None:
    """The trainers make durable by themselves what no memory would keep, whether the step was due or not."""

    def train(ranks: ThreadRanks) -> End:
        file = drain_file(tmp_path, ranks.rank)
        ask(file, "memory")
        checkpointer = Checkpoints(
            tmp_path / "run",
            ranks,
            every_steps=every,
            url_every_steps=every and 1000,
            snapshots=2,
            drain_file=file,
        )
        if ranks.rank == 0:
            lose_saver_in_a_drain(checkpointer)
        with pytest.raises(Drained) as end:
            for step in range(1, LAST):
                checkpointer.step(step, state_at(step, ranks.rank))
        checkpointer.close()
        assert not session_of(checkpointer).outlives_trainer
        return End(end.value.step, end.value.is_saved, end.value.reason, end.value.code)

    with saver_thread():
        ends = run_threads(size, train)
        assert len(set(ends)) == 1
        assert ends[0].is_saved
        assert committed(open_storage(tmp_path / "run"))[0] == ends[0].step


def test_storage_that_fails_on_one_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All ranks drain all the same, all know that nothing was saved, and the last checkpoint stands."""

    def train(ranks: ThreadRanks) -> End:
        storage: Any = open_storage(tmp_path / "run")
        file = drain_file(tmp_path, ranks.rank)
        checkpointer = Checkpoints(storage, ranks, drain_file=file, drain_interval=0)
        checkpointer.save(1, state_at(1, ranks.rank)).wait()
        if ranks.rank == 1:
            storage = FailingOnce(storage, 1, StorageFullError("no space left"))
        checkpointer = Checkpoints(storage, ranks, drain_file=file, drain_interval=0)
        end = drained(checkpointer, file, ranks.rank, (5, "durable"))
        checkpointer.wait()
        checkpointer.close()
        return end

    ends = run_threads(2, train)
    assert [(end.step, end.is_saved, end.code) for end in ends] == [(6, False, 75)] * 2
    assert "step 6, after which the job drains, is not saved; the last checkpoint stands" in caplog.text
    assert "no space left" in caplog.text
    assert restored(Checkpointer(tmp_path / "run")) == (1, "local")


def lose_saves(checkpointer: Checkpointer) -> None:
    """Have its node's saver be lost as soon as it has a save."""

    def start_in_vain(start: Callable[[], SaveHandle]) -> SaveHandle:
        handle = start()

        def wait(_tier: str | None = None) -> None:
            raise SaveError("the saver of this node is gone")

        handle.wait = wait  # type: ignore[assignment,method-assign]
        return handle

    around_saves(checkpointer, start_in_vain)


def test_a_node_that_loses_its_part(tmp_path: Path) -> None:
    """What one node has lost is saved on none, and all ranks say so."""

    def train(ranks: ThreadRanks) -> End:
        file = drain_file(tmp_path, ranks.rank)
        checkpointer = Checkpoints(open_storage(tmp_path / "run"), ranks, drain_file=file, drain_interval=0)
        if ranks.rank == 1:
            lose_saves(checkpointer)
        return drained(checkpointer, file, ranks.rank, (2, "durable"))

    assert [(end.step, end.is_saved) for end in run_threads(3, train)] == [(3, False)] * 3


def test_a_state_that_cannot_be_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The job leaves; to stay would not help."""
    file = drain_file(tmp_path)
    ask(file)
    checkpointer = Checkpoints(open_storage(tmp_path / "run"), Alone(), drain_file=file)
    with pytest.raises(Drained) as end:
        checkpointer.step(3, {"f": print})
    assert not end.value.is_saved
    assert "UnsupportedValueError" in caplog.text


# -- the file


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCH_DRAIN_FILE", raising=False)
    assert DrainWatch.of_worker(Alone()) is None


@pytest.mark.parametrize(
    "content",
    [
        "stop\n",
        "[]\n",
        '{"reason": "boredom", "tiers": "durable"}\n',
        '{"reason": "restart"}\n',
        '{"reason": "restart", "tiers": "paper"}\n',
        '{"reason": "restart", "tiers": "memory"}\n{}\n',
        "\0" * 100 + "\n",
    ],
)
def test_garbage_is_no_request(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, and a request after it counts."""
    path = drain_file(tmp_path)
    watch = DrainWatch(DrainFile(str(path)), Alone())
    path.write_text(content)
    assert [watch.poll() for _ in range(5)] == [None] * 5
    assert len(caplog.records) == 1
    assert f"no drain: {path} holds " in caplog.text
    ask(path)
    assert watch.poll() == Request(Scope.DURABLE, "preemption")


def test_half_a_line_is_no_request_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = drain_file(tmp_path)
    watch = DrainWatch(DrainFile(str(path)), Alone())
    path.write_text('{"reason": "restart", "tie')
    assert watch.poll() is None
    assert not caplog.records


def test_a_file_that_only_one_rank_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its node is asked for all of them."""

    def train(ranks: ThreadRanks) -> int:
        file = tmp_path / "none" if ranks.rank else drain_file(tmp_path)
        checkpointer = Checkpoints(open_storage(tmp_path / "run"), ranks, drain_file=file, drain_interval=0)
        request = None if ranks.rank else (4, "durable")
        return drained(checkpointer, file, ranks.rank, request).step

    with caplog.at_level(logging.WARNING, "shardckpt"):
        assert run_threads(2, train) == [5, 5]
    assert "this node's drain requests are not answered" in caplog.text


def test_only_one_checkpointer_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first in a process, until it is closed; the progress file says so."""
    file = drain_file(tmp_path)
    monkeypatch.setenv("LAUNCH_DRAIN_FILE", str(file))
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(tmp_path / "progress"))

    def drains() -> bool:
        progress = read_progress(tmp_path / "progress")
        assert progress is not None
        return progress.drains

    first, second = Checkpointer(tmp_path / "one"), Checkpointer(tmp_path / "two")
    assert drains()
    ask(file)
    assert second.step(1, state_at(1)) is None
    second.close()
    assert drains()
    with pytest.raises(Drained):
        first.step(1, state_at(1))
    first.close()
    assert drains()  # it has answered, and the process is about to end
    assert committed(open_storage(tmp_path / "two")) == [1]  # by `close`
    third = Checkpointer(tmp_path / "three")
    third.close()
    assert not drains()
    with pytest.raises(Drained):
        Checkpointer(tmp_path / "four").step(1, state_at(1))


def test_a_checkpointer_that_an_error_has_left_answers_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that tries again, as after it ran out of memory, makes another, which does."""
    file = drain_file(tmp_path)
    monkeypatch.setenv("LAUNCH_DRAIN_FILE", str(file))
    with pytest.raises(MemoryError), Checkpointer(tmp_path / "run", snapshots=0):
        raise MemoryError
    ask(file)
    with pytest.raises(Drained), Checkpointer(tmp_path / "run", snapshots=0) as checkpointer:
        checkpointer.step(1, state_at(1))


# -- what a script sees


_SCRIPT = """
import logging, sys, torch, shardckpt
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
try:
    with shardckpt.Checkpointer() as checkpointer:
        for step in range(1, 5):
            try:
                checkpointer.step(step, {"t": torch.zeros(3)})
            except Exception:
                print("not an Exception")
except SystemExit as end:
    print("leaving", end.code)
    raise
finally:
    print("finally")
print("not reached")
"""


def test_a_script_need_do_nothing(tmp_path: Path) -> None:
    """It ends with code 75 and without noise, through its handlers for the end."""
    file = drain_file(tmp_path)
    ask(file)
    environment = {
        **os.environ,
        "LAUNCH_DRAIN_FILE": str(file),
        "LAUNCH_CKPT_URL": str(tmp_path / "run"),
        "SHARDCKPT_SNAPSHOTS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 75
    assert done.stdout.splitlines() == [
        "step 1 is saved, and the job drains (preemption)",
        "leaving 75",
        "finally",
    ]
    assert done.stderr == ""
    assert committed(open_storage(tmp_path / "run")) == [1]


def _end_with_work_pending(rank: int, store: str, errors: str, how: str) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.environ["LAUNCH_DRAIN_FILE"] = str(drain_file(Path(errors).parent, rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    checkpointer = Checkpointer(Path(errors).parent / "run", snapshots=0)
    for step in range(1, 4):
        checkpointer.step(step, {})
        ask(Path(os.environ["LAUNCH_DRAIN_FILE"]))  # as of the last step, too late
        if step == 1:
            Path(os.environ["LAUNCH_DRAIN_FILE"]).write_text("")
    if how == "destroy":
        checkpointer.close()
        dist.destroy_process_group()
    elif how == "close":
        checkpointer.close()


@pytest.mark.parametrize("how", ["destroy", "close", "exit"])
def test_the_last_check_ends_by_itself(how: str, tmp_path: Path) -> None:
    """A request after the last steps is not answered: the job finishes, without noise, and does not hang."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [
        context.Process(
            target=_end_with_work_pending,
            args=(rank, str(tmp_path / "store"), str(tmp_path / f"err-{rank}"), how),
        )
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    try:
        assert [process.exitcode for process in ranks] == [0, 0, 0]
    finally:
        for process in ranks:
            process.kill()
    told = "".join((tmp_path / f"err-{rank}").read_text() for rank in range(3))
    expected = ("destroy_process_group", "is not saved")
    assert [line for line in told.splitlines() if not any(text in line for text in expected)] == []
