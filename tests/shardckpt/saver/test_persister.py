"""Snapshots become durable, by the savers of one node or of several."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.kit.savers import SaverProcess, wait_until
from tests.kit.trainer_processes import MEMORY_ONLY, Trainers, check_newest, everyone, saved


def test_the_newest_snapshot_is_persisted_by_a_drain(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    """Even if what the trainer sent, and its death, and the drain are heard of at one time."""
    trainer = trainers(run, saver, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    trainer.do("wait", 1)
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    trainer.do("step", 2)
    trainer.kill()
    saver.ask_to_end()
    saver.send(signal.SIGCONT)
    persisted = saver.told("persisted")
    assert (persisted["step"], persisted["tier"]) == (2, "local")
    assert persisted["url"].endswith("/attempt-0001/step-00000002")
    assert saver.drain() == 0
    assert saved(run) == ["1/2"]
    check_newest(run, 2)


def test_a_saver_that_cannot_persist_says_so_and_exits_with_1(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    (run / "attempt-0001" / "step-00000001").write_text("in the way")
    trainer.do("step", 1)
    assert "step-00000001" in trainer.do("wait_failed", 1)
    failed = saver.told("failed")
    assert (failed["step"], failed["tier"]) == (1, "local")
    assert failed["error"]
    trainer.kill()
    assert saver.drain() == 1


def test_two_nodes(nodes: list[SaverProcess], trainers: Trainers, run: Path) -> None:
    """Both savers persist their ranks' packs, and one commits. Snapshots are restored on as many ranks, and on
    fewer, which are elsewhere; without one of the nodes there are only checkpoints."""
    one, other = nodes
    world = trainers.world(run, [one, one, other, other], layout="fsdp", url_every_steps=2)
    assert everyone(world, "restore") == [None] * 4
    for step in (1, 2, 3):
        everyone(world, "save_and_wait" if step == 2 else "step", step)
    everyone(world, "wait", 3)
    assert saved(run) == ["1/2"]
    parts = {path.name: json.loads(path.read_text()) for path in run.glob("*/*/parts-*/*")}
    written = {name: [pack["rank"] for pack in part["packs"]] for name, part in parts.items()}
    assert {name: sorted(ranks) for name, ranks in written.items()} == {
        "rank-00000.json": [0, 1],
        "rank-00002.json": [2, 3],
    }
    for trainer in world:
        trainer.kill()
    world = trainers.world(run, [one, one, other, other], layout="fsdp")
    everyone(world, "zero")
    assert everyone(world, "restore") == [("memory", 3, [])] * 4
    for trainer in world:
        trainer.kill()
    world = trainers.world(run, [other, one, other], layout="fsdp", url_every_steps=1000)
    everyone(world, "zero")
    assert everyone(world, "restore") == [("memory", 3, [])] * 3
    everyone(world, "step", 4)
    everyone(world, "wait", 4)
    for trainer in world:
        trainer.kill()
    one.kill()
    one.start()
    world = trainers.world(run, [one, one, other, other], layout="fsdp")
    everyone(world, "zero")
    assert everyone(world, "restore") == [("local", 2, [])] * 4
    everyone(world, "save_and_wait", 5)
    for trainer in world:
        trainer.kill()
    check_newest(run, 5)


def test_a_part_is_no_checkpoint(nodes: list[SaverProcess], trainers: Trainers, run: Path) -> None:
    """A saver that has written its part waits for the other's commit before it says that the save is durable, and
    ends with 1 if there was none."""
    one, other = nodes
    world = trainers.world(run, nodes)
    everyone(world, "restore")
    everyone(world, "prepare")
    everyone(world, "wait_ready")
    one.send(signal.SIGSTOP)
    assert everyone(world, "step", 1) == [True, True]
    assert other.told("staged")["step"] == 1
    wait_until(lambda: list(run.glob("attempt-0001/step-00000001/parts-*/rank-00001.json")))
    one.kill()
    assert other.told_of(1)["event"] == "failed"
    for trainer in world:
        trainer.kill()
    assert other.drain() == 1
    assert saved(run) == []


def test_what_both_nodes_tell_is_committed(
    nodes: list[SaverProcess], trainers: Trainers, run: Path
) -> None:
    world = trainers.world(run, nodes)
    everyone(world, "restore")
    for step in (1, 2):
        everyone(world, "save", step)
        for saver in reversed(nodes):
            assert saver.told_of(step)["event"] == "persisted"
            assert f"1/{step}" in saved(run)
    everyone(world, "close")
    assert [saver.drain() for saver in nodes] == [0, 0]


def test_a_node_that_lacks_its_part_of_the_newest(
    nodes: list[SaverProcess], trainers: Trainers, run: Path
) -> None:
    """The job resumes from the snapshot before, which the other node still has."""
    world = trainers.world(run, nodes, **MEMORY_ONLY)
    everyone(world, "restore")
    for step in (1, 2):
        everyone(world, "step", step)
        everyone(world, "wait", step)
        everyone(world, "wait_ready")
    world[0].tell("step", 3)
    world[1].tell("stay_in_copy", 3)
    world[0].answer()
    world[0].do("wait", 3, "memory")
    for trainer in world:
        trainer.kill()
    world = trainers.world(run, nodes, **MEMORY_ONLY)
    assert everyone(world, "restore") == [("memory", 2, [])] * 2
