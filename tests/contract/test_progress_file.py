"""The progress file: written by `launcher.report` and by shardckpt, read by `launch`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.progress import Progress, read_progress, report
from shardckpt.progress import ProgressFile
from tests.kit.contract import table

Report = Callable[[int, float | None], None]
"""Reports a step, and the loss if there is one."""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "progress"
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(found))
    return found


def by_launcher(step: int, loss: float | None = None) -> None:
    report(step, loss=loss)


def by_shardckpt(step: int, loss: float | None = None) -> None:
    of_worker().step(step, loss)


both_writers = pytest.mark.parametrize("write", [by_launcher, by_shardckpt], ids=["launcher", "shardckpt"])


def of_worker() -> ProgressFile:
    file = ProgressFile.of_worker()
    assert file is not None
    return file


def read(path: Path) -> Progress:
    progress = read_progress(path)
    assert progress is not None
    return progress


def test_launch_reads_the_keys_of_the_document() -> None:
    """The first line has the step and its time, the object all the rest."""
    keys = set(table("Progress file")) - {"key", "in", "training"}
    assert {name for name in keys if name.isidentifier()} == {f.name for f in fields(Progress)} - {
        "step",
        "time",
    }


def test_without_a_launcher_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCH_PROGRESS_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    report(1, loss=0.5)
    assert ProgressFile.of_worker() is None
    assert not list(tmp_path.iterdir())


@both_writers
def test_steps(path: Path, write: Report) -> None:
    """The last step counts, also a lower one; the time of the first report stays."""
    assert read_progress(path) is None
    write(123456, None)
    first = read(path)
    assert first.step == 123456
    assert first.first_step == pytest.approx(first.time, abs=0.01)
    for step in (7, 0):
        write(step, None)
        assert path.stat().st_size == 512
        assert read(path).step == step
        assert read(path).time >= first.time
        assert read(path).first_step == first.first_step
    assert not read(path).drains
    assert read(path).loss is None


@both_writers
@pytest.mark.parametrize("loss", [2.5, -1.2345678901234567e-300, 3, math.inf, -math.inf])
def test_loss(path: Path, write: Report, loss: float) -> None:
    """The loss stays until another one is reported, and is JSON in the file."""
    write(1, loss)
    assert read(path).loss == loss
    write(2, None)
    assert (read(path).step, read(path).loss) == (2, loss)
    write(3, math.nan)
    assert math.isnan(read(path).loss or 0)
    assert b"NaN" not in path.read_bytes()


def test_the_start_of_a_worker(path: Path) -> None:
    """What a Checkpointer writes before the first step."""
    file = of_worker()
    file.tell(joined=1.5, world=8, steps=True, drains=True)
    assert read(path) == Progress(
        None, read(path).time, drains=True, joined=1.5, steps=True, world=8, saved={}
    )
    file.tell(restored=2.5, restored_step=7, restored_tier="memory")
    found = read(path)
    assert (found.restored, found.restored_step, found.restored_tier) == (2.5, 7, "memory")
    file.tell(drains=None)
    assert not read(path).drains


def test_phases(path: Path) -> None:
    """A phase is what the worker does besides training, until it reports a step."""
    file = of_worker()
    with file.doing("restore"):
        found = read(path)
        assert found.doing == "restore"
        assert found.alive is not None
    assert read(path).doing is None
    with file.doing("x" * 1000):
        assert (read(path).doing or "").startswith("x" * 50)
        assert path.stat().st_size == 512
        file.step(3)
        assert read(path).doing is None


def test_committed_checkpoints(path: Path) -> None:
    """By tier, those that the worker has committed without a saver."""
    of_worker().committed("local", 6)
    of_worker().committed("remote", 4)
    of_worker().committed("local", 9)
    assert read(path).saved == {"local": 9, "remote": 4}


@both_writers
def test_the_end_of_training(path: Path, write: Report) -> None:
    """A step that is reported later undoes it."""
    write(5, None)
    assert not read(path).is_over
    of_worker().over()
    assert read(path).is_over
    write(6, None)
    assert not read(path).is_over


def test_all_of_it_fits(path: Path) -> None:
    """The longest value of every key, at once."""
    file = of_worker()
    when = 1_700_000_000.123456
    file.tell(joined=when, world=1 << 20, steps=True, drains=True)
    file.tell(restored=when, restored_step=10**12, restored_tier="memory")
    file.step(10**12, -1.2345678901234567e-300)
    file.committed("local", 10**12)
    file.committed("remote", 10**12)
    file.over()
    with file.doing("y" * 1000):
        assert path.stat().st_size == 512
        found = read(path)
    assert found.saved == {"local": 10**12, "remote": 10**12}
    assert (found.world, found.restored_step, found.loss) == (1 << 20, 10**12, -1.2345678901234567e-300)
    assert found.phase
    assert found.over


def test_writers_keep_what_the_other_has_written(path: Path) -> None:
    """A script may use both `launcher.report` and a Checkpointer."""
    of_worker().tell(drains=True, joined=1.5, restored=2.0, restored_step=7, restored_tier="memory")
    of_worker().committed("remote", 6)
    before = read(path)
    report(8, loss=0.25)
    found = read(path)
    assert found == replace(before, step=8, time=found.time, loss=0.25, first_step=found.first_step)
    of_worker().tell(world=4)
    assert read(path) == replace(found, world=4)
    of_worker().step(9)
    report(10)
    found = read(path)
    assert (found.step, found.loss, found.world, found.saved) == (10, 0.25, 4, {"remote": 6})


def test_keys_that_launch_does_not_know_stay(path: Path) -> None:
    """A later version of shardckpt may write more; so may tiers be others."""
    written = b'{"drains":true,"joined":1.5,"first_step":3,"saved":{"remote":6,"odd":1},"more":1}'
    path.write_bytes(f"{-1:20d} {4.0:20.6f}\n".encode() + written.ljust(469) + b"\n")
    expected = Progress(None, 4.0, None, True, 1.5, first_step=3.0, saved={"remote": 6})
    assert read(path) == expected
    report(8, loss=0.25)
    assert read(path) == replace(expected, step=8, time=read(path).time, loss=0.25)
    assert b'"more":1' in path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"nonsense\n", b"x" * 42, b"a b\n".rjust(42), b"1" * 41 + b"\n"])
def test_garbage_is_no_progress(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_progress(path) is None


@pytest.mark.parametrize(
    "facts",
    [
        b"",
        b"{",
        b'{"loss": 1}',  # cut short
        b"[1]".ljust(469) + b"\n",
        b"x" * 470,
        b'{"loss": "low", "drains": 1, "joined": null, "restored_step": [], "more": 1}'.ljust(469) + b"\n",
    ],
)
def test_garbage_after_the_first_line(path: Path, facts: bytes) -> None:
    """The step counts all the same."""
    path.write_bytes(f"{5:20d} {1.0:20.6f}\n".encode() + facts)
    assert read(path) == Progress(5, 1.0)


@given(st.binary(max_size=300))
def test_any_content_is_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(f"{5:20d} {1.0:20.6f}\n".encode() + content)
    assert read(path).step == 5
    path.write_bytes(content)
    read_progress(path)


def test_an_object_that_is_too_long_is_left_out(path: Path) -> None:
    """The file never grows, and the step counts all the same."""
    path.write_bytes(
        f"{5:20d} {1.0:20.6f}\n".encode() + (b'{"x":"' + b"y" * 458 + b'"}').ljust(469) + b"\n"
    )
    report(6, loss=1.0)
    assert path.stat().st_size == 512
    assert read(path) == Progress(6, read(path).time)
