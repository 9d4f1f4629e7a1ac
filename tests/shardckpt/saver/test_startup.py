"""A saver without launcher: started by a trainer, found by the next one, and gone at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.trainer_processes import MEMORY_ONLY, Trainers, check_newest, own_saver, wait_for_end


@pytest.mark.parametrize("linger", ["0", "60"])
def test_after_goodbye_nothing_is_left(trainers: Trainers, run: Path, linger: str) -> None:
    trainer = trainers(run, environment={"SHARDCKPT_LINGER": linger}, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    pid = own_saver(run)
    trainer.do("close")
    wait_for_end(pid)
    check_newest(run, 1)


def test_after_a_crash_it_lingers_so_long(trainers: Trainers, run: Path) -> None:
    trainer = trainers(run, environment={"SHARDCKPT_LINGER": "0.2"}, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    trainer.do("wait", 1)
    pid = own_saver(run)
    trainer.kill()
    wait_for_end(pid)
    again = trainers(run)
    again.do("restore")
    wait = own_saver(run)
    again.do("close")
    wait_for_end(wait)


def test_a_restarted_job_finds_its_saver(trainers: Trainers, run: Path) -> None:
    trainer = trainers(run, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    trainer.kill()
    again = trainers(run, **MEMORY_ONLY)
    assert again.do("restore") == ("memory", 1, [])
    pid = own_saver(run)
    again.do("close")
    wait_for_end(pid)
