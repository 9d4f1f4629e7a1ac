"""The progress file: what a worker tells, and what can be read of it whatever it holds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.progress import Progress, read_progress, report


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "progress"
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(found))
    return found


def read(path: Path) -> Progress:
    progress = read_progress(path)
    assert progress is not None
    return progress


def test_without_a_launcher_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCH_PROGRESS_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    report(1, loss=0.5)
    assert not list(tmp_path.iterdir())


def test_steps(path: Path) -> None:
    """The last step counts, also a lower one; the first report's time stays."""
    assert read_progress(path) is None
    report(123456)
    first = read(path)
    assert first.step == 123456
    assert first.first_step == pytest.approx(first.time, abs=0.01)
    for step in (7, 0):
        report(step)
        assert path.stat().st_size == 512
        assert read(path).step == step
        assert read(path).time >= first.time
        assert read(path).first_step == first.first_step
    assert not read(path).drains
    assert read(path).loss is None


@pytest.mark.parametrize("loss", [2.5, -1.2345678901234567e-300, 3, math.inf, -math.inf])
def test_loss(path: Path, loss: float) -> None:
    """The loss stays until another is told, and is in the file as JSON has it."""
    report(1, loss=loss)
    assert read(path).loss == loss
    report(2)
    assert (read(path).step, read(path).loss) == (2, loss)
    report(3, loss=math.nan)
    assert math.isnan(read(path).loss or 0)
    assert b"NaN" not in path.read_bytes()


def test_what_others_tell_stays(path: Path) -> None:
    """A script may use both `launcher.report` and a Checkpointer: neither undoes what the other told."""
    told = b'{"drains":true,"joined":1.5,"restored":2,"restored_step":7,"restored_tier":"memory","first_step":3'
    told += b',"saved":{"remote":6,"odd":1}}'
    path.write_bytes(f"{-1:20d} {4.0:20.6f}\n".encode() + told.ljust(469) + b"\n")
    expected = Progress(None, 4.0, None, True, 1.5, 2.0, 7, "memory", 3.0, saved={"remote": 6})
    assert read(path) == expected
    report(8, loss=0.25)
    found = read(path)
    assert found == replace(expected, step=8, time=found.time, loss=0.25)


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
def test_garbage_behind_the_first_line(path: Path, facts: bytes) -> None:
    """The step counts all the same."""
    path.write_bytes(f"{5:20d} {1.0:20.6f}\n".encode() + facts)
    assert read(path) == Progress(5, 1.0)


@given(st.binary(max_size=300))
def test_whatever_the_file_holds(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(f"{5:20d} {1.0:20.6f}\n".encode() + content)
    assert read(path).step == 5
    path.write_bytes(content)
    read_progress(path)


def test_more_than_fits_is_not_told(path: Path) -> None:
    """The file never grows, and the step counts all the same."""
    path.write_bytes(
        f"{5:20d} {1.0:20.6f}\n".encode() + (b'{"x":"' + b"y" * 458 + b'"}').ljust(469) + b"\n"
    )
    report(6, loss=1.0)
    assert path.stat().st_size == 512
    assert read(path) == Progress(6, read(path).time)
