"""What the console prints of workers' lines and of the launcher's own messages."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config.job import ShownStreams
from launcher.reporting.console import Console, Sink
from launcher.reporting.logs import DirectoryWatch
from launcher.reporting.message import Message, error
from launcher.run_dir import RunDir


class Reader:
    """Both ends of a pipe; everything that comes through it is collected."""

    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        self._file = os.fdopen(read_end, "rb")
        self._text = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        self._text = self._file.read()

    def text(self) -> str:
        os.close(self.write_end)
        self._thread.join()
        self._file.close()
        return self._text.decode()


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    run_dir = RunDir(tmp_path / "run", tmp_path / "run/logs")
    yield run_dir
    run_dir.close()


def test_console_keeps_lines_whole_and_in_order(run_dir: RunDir) -> None:
    """Each line once, with its rank, unbroken; messages after all that was written before them."""
    files = run_dir.begin_round(1, range(11))
    out, err = Reader(), Reader()
    console = Console(Sink(out.write_end), Sink(err.write_end))
    console.follow(files, ShownStreams())
    lines = [f"line {i} " + "x" * (i % 300) for i in range(2000)]

    def work(rank: int) -> None:
        with files[rank].out.open("wb", buffering=0) as file:
            for line in lines:
                for part in (line[:5].encode(), f"{line[5:]}\n".encode()):
                    file.write(part)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    files[3].out.write_bytes(b"\r1%\r2%")
    files[4].err.write_bytes(b"\xff\x00\n")
    console.unfollow()
    console.say(Message(("done", "more")))
    console.close()
    printed = out.text().splitlines()
    assert [line for line in printed if line.startswith("[ 0] ")] == [f"[ 0] {x}" for x in lines]
    assert [line for line in printed if line.startswith("[10] ")] == [f"[10] {x}" for x in lines]
    assert sum(line.startswith("[ 3]") for line in printed) <= 2
    assert "[ 3] 2%" in printed
    os.close(err.write_end)
    err._thread.join()
    assert err._text == b"[ 4] \xff\x00\nlaunch: done\nmore\n"
    err._file.close()


@pytest.mark.parametrize("end", ["", "\r", "\n"])
def test_a_progress_bar_that_stands_still_is_shown_once(run_dir: RunDir, end: str) -> None:
    """Whether its line is ended or not; a line that says the same again is another one."""
    (files,) = run_dir.begin_round(1, [0])
    reader, writer = os.pipe()
    console = Console(Sink(1), Sink(writer))
    console.follow([files], ShownStreams())
    with files.err.open("wb", buffering=0) as file:
        file.write(b"\r 10%\r 100%")
        assert os.read(reader, 100) == b"[0]  100%\n"
        file.write(end.encode() + b" 100%\nbye\n" * (end == "\n"))
    console.unfollow()
    console.close()
    os.close(writer)
    with os.fdopen(reader, "rb") as rest:
        assert rest.read() == (b"[0]  100%\n[0] bye\n" if end == "\n" else b"")


def test_console_without_inotify(run_dir: RunDir) -> None:
    """Where the system has no watches left, it polls."""

    def refuse(_directory: Path) -> DirectoryWatch:
        raise OSError(24, "Too many open files")

    files = run_dir.begin_round(1, range(1))
    out = Reader()
    console = Console(Sink(out.write_end), Sink(out.write_end), watch=refuse)
    console.follow(files, ShownStreams())
    files[0].out.write_text("hello\n")
    console.close()
    assert out.text() == "[0] hello\n"


def test_console_shows_what_it_should(run_dir: RunDir) -> None:
    files = run_dir.begin_round(1, range(2))
    out = Reader()
    console = Console(Sink(out.write_end), Sink(out.write_end))
    console.follow(files, ShownStreams(redirects={None: 1}, ranks=frozenset([1])))
    for of_rank in files:
        of_rank.out.write_text("out\n")
        of_rank.err.write_text("err\n")
    console.unfollow()
    console.close()
    assert out.text() == "[1] err\n"


def test_a_terminal_gets_colours_and_no_garbage(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    controller, terminal = os.openpty()
    files = run_dir.begin_round(1, range(1))
    console = Console(Sink(terminal), Sink(terminal))
    console.follow(files, ShownStreams())
    files[0].out.write_bytes(b"a\x07\xff\x1b[31mred\n")
    console.unfollow()
    console.say(error("note"))
    console.close()
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(controller, 1 << 16):
            shown += part
    except OSError:  # the terminal's other end is closed
        pass
    os.close(controller)
    text = shown.decode()
    assert re.search(r"\x1b\[\d+m\[0\]\x1b\[0m a\?\ufffd\x1b\[31mred\x1b\[0m\r\n", text)
    assert "\x1b[31mlaunch: note\x1b[0m\r\n" in text


def test_a_status_is_a_line_now_and_then_elsewhere() -> None:
    err = Reader()
    console = Console(Sink(err.write_end), Sink(err.write_end))
    for done in range(100):
        console.show(f"{done} of 100")
    console.close()
    assert err.text() == "launch: 0 of 100\n"


def test_a_reader_that_goes_away_is_told_of_once(run_dir: RunDir) -> None:
    files = run_dir.begin_round(1, range(1))
    read_end, gone = os.pipe()
    os.close(read_end)
    err = Reader()
    console = Console(Sink(gone), Sink(err.write_end))
    console.follow(files, ShownStreams())
    files[0].out.write_text("a\nb\n")
    console.unfollow()
    console.follow(files, ShownStreams())
    console.unfollow()
    console.close()
    assert err.text().count("stdout has no reader any more; the job goes on") == 1
    os.close(gone)
