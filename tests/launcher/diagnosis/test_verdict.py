"""What a verdict says, on one node and on several."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.diagnosis.judge import judge
from tests.kit.failures import (
    CLOSED,
    OWN,
    RESET,
    died,
    judged,
    reported,
    verdict_on,
)


def test_verdict_on_one_node() -> None:
    """One block says who, why, who else, and what comes next; the same goes to the JSON file."""
    lines = ("Traceback …", "ValueError: boom")
    first = replace(died(1, 1, OWN), lines=lines, step=1203, log="/r/logs/rank-00001.err")
    others = [died(rank, 1, RESET) for rank in (2, 3, 5)]
    own = died(6, -11)
    stopped = [died(rank, -15, is_ours=True) for rank in (7, 8)]
    verdict = judged(reported(first, *others, own, *stopped, step=1203), saved=1200)
    moment = time.strftime("%H:%M:%S", time.localtime(1e9))
    assert verdict.render() == [
        "round 2 failed after 0.6 s",
        f"  rank 1 failed first, at {moment}.125: ValueError: boom (exit code 1)",
        "  its traceback:",
        "    Traceback …",
        "    ValueError: boom",
        "  then, of it: ranks 2-3, 5: connection reset by peer",
        "  then: rank 6: killed by SIGSEGV (signal 11, a crash in native code)",
        "  stopped: ranks 7-8",
        "  step 1203 reached, snapshot of step 1200: 3 steps lost",
        "  log: /r/logs/rank-00001.err",
        "  restarting",
    ]
    record = json.loads(json.dumps(verdict.to_json()))
    assert (record["round"], record["rank"], record["code"], record["step"]) == (2, 1, 1, 1203)
    assert (record["newest_saved"], record["steps_lost"]) == (1200, 3)
    assert record["stopped"] == [7, 8]
    assert record["victims"][0] == {
        "rank": 2,
        "how": "connection reset by peer",
        "of_it": True,
        "later": 0.125,
    }
    assert "here" not in "\n".join(verdict.render())


@pytest.mark.parametrize(
    ("step", "saved", "line"),
    [
        (5, None, "  step 5 reached"),
        (5, 5, "  step 5 reached and saved: nothing is lost"),
        (5, 4, "  step 5 reached, snapshot of step 4: 1 step lost"),
        (5, 0, "  step 5 reached, snapshot of step 0: 5 steps lost"),
    ],
)
def test_steps_lost(step: int, saved: int | None, line: str) -> None:
    assert line in judged(reported(died(0, 1, OWN), step=step), saved=saved).render()


@pytest.mark.parametrize(("step", "saved"), [(None, 5), (5, None), (None, None)])
def test_steps_lost_that_are_not_known(step: int | None, saved: int | None) -> None:
    verdict = judged(reported(died(0, 1, OWN), step=step), saved=saved)
    assert json.loads(json.dumps(verdict.to_json()))["steps_lost"] is None


def test_a_snapshot_in_memory_alone_is_not_promised() -> None:
    verdict = judge([reported(died(0, 1, OWN), step=5)], {}, "", newest_saved=5, is_only_in_memory=True)
    assert "  step 5 reached; snapshot of step 5 in memory" in verdict.render()


def test_a_worker_that_leaves_without_the_others() -> None:
    stopped = died(1, -signal.SIGTERM, is_ours=True)
    verdict = judged(reported(stopped, ended=((0, 75, 1e9),)))
    assert verdict.rank is None
    cause = "  rank 0 had ended before the others, with exit code 75, as after saving to leave"
    assert verdict.render()[1:3] == [cause, "  stopped: rank 1"]


def test_headlines_are_short_and_paths_as_they_would_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = replace(died(0, 1, f"ValueError: {'x' * 3000}"), log=str(tmp_path / "runs/a/rank-00000.err"))
    text = verdict_on(long).render()
    assert len(text[1]) < 280
    assert text[1].endswith("x… (exit code 1)")
    assert "  log: runs/a/rank-00000.err" in text
    assert "x" * 3000 in "\n".join(text)


def test_verdict_on_several_nodes() -> None:
    """Order is that of death on all nodes, and the first one's host is told."""
    near = reported(died(0, 1, RESET), died(1, 1, CLOSED), step=7)
    far = reported(replace(died(9, -9), host="far"), node=1, host="far", step=8)
    verdict = judged(near, far)
    assert (verdict.rank, verdict.host, verdict.node, verdict.step) == (9, "far", 1, 8)
    text = verdict.render()
    assert text[1].startswith("  rank 9 on far failed first, at ")
    assert "  then, of it: rank 0: connection reset by peer" in text
    assert "  then, of it: rank 1: connection closed by peer" in text
    assert verdict.time == 1e9 + 9 / 8
    earlier = reported(replace(died(8, 1, OWN), at=1e9 - 1), node=1, host="far")
    assert judged(reported(died(0, 1, OWN), died(1, 1, OWN)), earlier).rank == 8
    without = judged(reported(at=1e9 + 2), reported(at=1e9 + 1, node=1, host="far"))
    assert (without.rank, without.time) == (None, 1e9 + 1)


def test_verdict_on_a_lost_node() -> None:
    near = reported(died(0, 1, RESET), died(1, 1, RESET))
    verdict = judged(near, lost={1: ("far", "no sign of life for 5 s")})
    assert verdict.rank is None
    text = verdict.render()
    assert text[1] == "  lost: node 1 (far): no sign of life for 5 s"
    assert text[2] == "  then, of it: ranks 0-1: connection reset by peer"
    assert sum("no sign of life" in line for line in text) == 1
    text = judged(reported(died(0, 1, OWN)), lost={1: ("far", "gone")}).render()
    assert "ValueError: boom" in text[1]
    assert "  lost: node 1 (far): gone" in text


def test_verdict_on_a_hang() -> None:
    stacks = (
        "rank 3 is behind: step 118, in train.py:88 in load_batch",
        "ranks 0-2 wait for it in all_reduce",
    )
    stopped = [died(rank, -15, is_ours=True) for rank in range(4)]
    verdict = judged(reported(*stopped, hang=stacks, step=119))
    assert verdict.rank is None
    assert verdict.cause == "no rank made progress any more"
    assert verdict.render() == [
        "round 2 hung after 0.5 s",
        "  no rank made progress any more:",
        f"  {stacks[0]}",
        f"  {stacks[1]}",
        "  stopped: ranks 0-3",
        "  step 119 reached",
        "  restarting",
    ]


def test_verdict_on_other_trouble() -> None:
    verdict = judged(reported(trouble="rank 1 could not be started: no memory"))
    assert verdict.render()[1:3] == ["  rank 1 could not be started: no memory", "  restarting"]
    both = judged(reported(died(0, 1, OWN), trouble="processes are left"), reported(node=1, host="far"))
    assert "  here: processes are left" in both.render()


def test_a_kill_by_the_kernel_is_the_cause() -> None:
    death = died(0, -9, kill="killed by the kernel, out of memory (cgroup limit 64.0 GiB)")
    assert verdict_on(death).cause == death.kill
    assert "it left no output" in "\n".join(verdict_on(death).render())
