"""The progress file: what a Checkpointer tells the launcher."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from launcher.progress import Progress, read_progress, report
from tests.kit.runs import saved, state_at


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
