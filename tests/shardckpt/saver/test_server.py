"""The saver and its trainers as real processes that are killed, stopped, and made to misbehave."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from shardckpt.checkpointer import Checkpointer
from tests.kit.savers import SaverProcess, wait_until
from tests.kit.trainer_processes import (
    MEMORY_ONLY,
    Trainers,
    check_newest,
    everyone,
    own_saver,
    saved,
    wait_for_end,
)


def test_a_save_needs_no_trainer_once_it_has_returned(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    """Not even to hand anything over: here the saver hears of it after the trainer's death only."""
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("prepare")
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    assert trainer.do("step", 1)
    trainer.kill()
    assert saved(run) == []
    saver.send(signal.SIGCONT)
    assert saver.told("staged")["step"] == 1
    assert saver.told("persisted")["step"] == 1
    check_newest(run, 1)
    again = trainers(run, saver)
    assert again.do("restore") == ("memory", 1, [])


def test_death_in_the_middle_of_a_copy_leaves_the_snapshot_before(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver, **MEMORY_ONLY)
    for step in (1, 2, 3):
        trainer.do("step", step)
        trainer.do("wait", step)
        trainer.do("wait_ready")
    trainer.tell("die_in_copy", 4)
    trainer.wait_for_death()
    again = trainers(run, saver, **MEMORY_ONLY)
    assert again.do("restore") == ("memory", 3, [])
    again.kill()
    assert saver.drain() == 0
    check_newest(run, 3)


def test_a_forked_child_does_not_hide_the_death_of_a_trainer(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    """It has the connection open. What the trainer was in the middle of is lost, and said to be so."""
    world = trainers.world(run, [saver, saver], **MEMORY_ONLY)
    everyone(world, "restore")
    everyone(world, "prepare")
    child = world[1].do("fork")
    world[0].tell("step", 1)
    world[1].tell("stay_in_copy", 1)
    try:
        assert world[0].answer()
        world[1].kill()
        assert "a rank ended before it had staged its part" in world[0].do("wait_failed", 1)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_zombie_disturbs_nobody(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    zombie = trainers(run, saver, **MEMORY_ONLY)
    zombie.do("restore")
    for step in (1, 2):
        zombie.do("step", step)
        zombie.do("wait", step)
    os.kill(zombie.pid, signal.SIGSTOP)
    trainer = trainers(run, saver, **MEMORY_ONLY)
    assert trainer.do("restore") == ("memory", 2, [])
    trainer.do("step", 3)
    trainer.do("wait", 3)
    os.kill(zombie.pid, signal.SIGCONT)
    for step in (3, 4, 5, 6):
        zombie.do("save_and_wait", step)
    trainer.kill()
    again = trainers(run, saver, **MEMORY_ONLY)
    assert again.do("restore") == ("memory", 3, [])
    again.kill()
    zombie.kill()
    assert saver.drain() == 0
    assert saved(run) == ["1/3", "1/4", "1/5", "1/6", "2/3"]
    check_newest(run, 3)


def test_training_goes_on_with_a_new_saver(trainers: Trainers, run: Path) -> None:
    trainer = trainers(run)
    trainer.do("restore")
    trainer.do("save_and_wait", 1)
    first = own_saver(run)
    os.kill(first, signal.SIGKILL)
    wait_for_end(first)
    trainer.do("lost_saver")
    assert trainer.do("said", "the snapshots that were in memory only")
    check_newest(run, 1)
    trainer.do("save_and_wait", 2)
    second = own_saver(run)
    assert second != first
    check_newest(run, 2)
    trainer.do("close")
    wait_for_end(second)


def test_a_save_that_the_saver_took_with_it_is_raised_by_close(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("save_and_wait", 1)
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    trainer.do("step", 2)
    saver.kill()
    assert "the saver of this node is gone" in trainer.do("close_fails")
    assert saved(run) == ["1/1"]
    check_newest(run, 1)


def test_a_stopped_saver_does_not_stop_training(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("prepare")
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    started = [trainer.do("step", step) for step in range(1, 6)]
    assert True in started
    assert started[-1] is False
    assert trainer.do("said", "no checkpoint at step ")
    saver.send(signal.SIGCONT)
    trainer.do("wait", 1)
    trainer.do("save_and_wait", 6)
    check_newest(run, 6)


def test_a_saver_that_never_answers_is_given_up(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    """From its first buffer on: saves are written by the trainer, then, and nothing hangs."""
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("patience", 0.3)
    saver.send(signal.SIGSTOP)
    assert trainer.do("step", 1)
    assert "has not answered" in trainer.do("wait_failed", 1)
    assert trainer.do("step", 2)
    trainer.do("wait", 2)
    assert trainer.do("said", "from now on saves are written by the trainers")
    check_newest(run, 2)


def test_nothing_leaks(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    """Neither descriptors nor memory, in fifty saves of five worlds that are killed."""
    shm = sorted(Path("/dev/shm").iterdir())
    seen = []
    step = 0
    for _ in range(5):
        trainer = trainers(run, saver, keep_last=2)
        loaded = trainer.do("restore")
        assert loaded == (("memory", step, []) if step else None)
        for _ in range(10):
            step += 1
            trainer.do("save_and_wait", step)
        trainer.do("wait_ready")
        seen.append((saver.descriptors, saver.memory))
        if seen[0] != seen[-1]:  # a thread may have a file of the run open just now
            wait_until(lambda: (saver.descriptors, saver.memory) == seen[0])
            seen.pop()
        trainer.kill()
    assert len(set(seen)) == 1, seen
    assert seen[0][1] == 2 * (2 << 20)
    assert sorted(Path("/dev/shm").iterdir()) == shm
    assert saver.drain() == 0
    assert len(saved(run)) == 2


def test_a_closed_checkpointer_can_be_used_again(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("save_and_wait", 1)
    trainer.do("close")
    trainer.do("save_and_wait", 2)
    trainer.do("open")
    assert trainer.do("restore")[1:] == (2, [])
    trainer.do("save_and_wait", 3)
    trainer.do("close")
    trainer.kill()
    assert saver.drain() == 0
    assert saved(run) == ["1/1", "1/2", "2/3"]


def test_two_runs_of_one_process(
    saver: SaverProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_SAVER", saver.address)
    names = ("one", "other")
    made = [Checkpointer(tmp_path / name, snapshots=2, every_steps=1, **MEMORY_ONLY) for name in names]
    states = [{"w": torch.full((10,), number)} for number in range(2)]
    for step in (1, 2):
        for checkpointer, state in zip(made, states, strict=True):
            handle = checkpointer.step(step, state)
            assert handle is not None
            handle.wait()
    for number, checkpointer in enumerate(made):
        state = {"w": torch.zeros(10, dtype=torch.int64)}
        loaded = checkpointer.restore(state)
        assert loaded is not None
        assert (loaded.tier, loaded.step) == ("memory", 2)
        assert bool((state["w"] == number).all())
        checkpointer.close()
    assert saver.drain() == 0
    for name in names:
        assert saved(tmp_path / name) == ["1/2"]
