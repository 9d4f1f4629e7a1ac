"""Runs: when a Checkpointer saves, what it keeps, and from where it resumes."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import (
    CheckpointExistsError,
    NotACheckpointError,
    SaveError,
    StateError,
    StorageError,
)
from shardckpt.run.places import iter_places
from shardckpt.storage import open_storage
from tests.kit.faults import FailingOnce
from tests.kit.runs import committed, restored, saved, state_at
from tests.kit.servers import S3Server
from tests.kit.worlds import run_processes


@pytest.fixture(params=["local", "file", "memory", "s3", "s3 without conditional puts"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A run's URL and storage_options, on every kind of storage."""
    if request.param.startswith("s3"):
        server: S3Server = request.getfixturevalue("moto_s3" if request.param == "s3" else "rclone_s3")
        return server.url("run"), {"storage_options": dict(server.options)}
    prefix = {"local": "", "file": "file://", "memory": "memory:/"}[request.param]
    return f"{prefix}{tmp_path}", {}


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


@pytest.mark.parametrize(
    ("name", "hint"), [("keep_best", "did you mean keep_last? It has url, "), ("zzz", "it has url, ")]
)
def test_an_unknown_keyword(name: str, hint: str, tmp_path: Path) -> None:
    """The error says what there is, with the nearest name."""
    arguments: dict[str, Any] = {name: 3}
    with pytest.raises(TypeError) as error:
        shardckpt.Checkpointer(tmp_path, **arguments)
    assert str(error.value).startswith(f"Checkpointer has no argument {name!r}; {hint}")
    assert str(error.value).endswith("commit_timeout, url_timeout")
