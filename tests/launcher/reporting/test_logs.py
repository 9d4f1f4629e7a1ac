"""Lines out of bytes, the run directory, and what the console prints."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.job import ShownStreams
from launcher.errors import BusyError, RunDirError
from launcher.reporting.console import Console, Sink
from launcher.reporting.logs import Lines, Tail
from launcher.run_dir import RunDir


def cut(chunks: list[bytes]) -> list[bytes]:
    lines = Lines()
    return [line for chunk in chunks for line in lines.feed(chunk)] + lines.flush()


@given(st.lists(st.lists(st.sampled_from([b"a", b"b", b"\n", b"\r", b"\xff"])).map(b"".join)))
def test_lines_do_not_depend_on_how_the_bytes_come(chunks: list[bytes]) -> None:
    assert cut(chunks) == cut([b"".join(chunks)])


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\n\nb", [b"a", b"", b"b"]),
        (b"a\r\nb\r\n", [b"a", b"b"]),
        (b"\r10%\r20%\r30%\n", [b"30%"]),
        (b"\r10%\r20%", [b"20%"]),
        (b"\r", []),
        (b"", []),
    ],
)
def test_lines(data: bytes, lines: list[bytes]) -> None:
    assert cut([data]) == lines


def test_a_progress_bar_is_known_as_such() -> None:
    lines = Lines()
    lines.feed(b"text")
    assert lines.drawn == b""
    lines.feed(b"\r 10%\r 20%")
    assert lines.drawn == b" 20%"
    lines.feed(b"\n")
    assert lines.drawn == b""


def test_endless_lines_are_cut() -> None:
    """Memory stays bounded, and no byte is lost."""
    data = b"x" * (Lines.LIMIT * 2 + 10)
    lines = cut([data[i : i + 60_000] for i in range(0, len(data), 60_000)])
    assert len(lines) >= 2
    assert b"".join(lines) == data


def test_tail_reads_what_is_added(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb")
    tail = Tail(path)
    assert [line for lines in tail.read() for line in lines] == [b"a"]
    with path.open("ab") as file:
        file.write(b"c\n" + b"d\n" * Tail.CHUNK)
    assert [line for lines in tail.read() for line in lines] == [b"bc"] + [b"d"] * Tail.CHUNK
    tail.close()


def test_rounds_go_on_counting_and_nothing_is_overwritten(tmp_path: Path) -> None:
    """Also when the job is started again, when logs go elsewhere, and when the counter is lost."""
    for expected in (1, 2):
        run_dir = RunDir(tmp_path / "run", tmp_path / "run/logs")
        assert run_dir.next_round() == expected
        files = run_dir.begin_round(expected, range(2))
        run_dir.close()
        assert files[1].out == tmp_path / f"run/logs/round-000{expected}/rank-00001.out"
        assert files[1].directory == tmp_path / "run/ranks/rank-00001"
        assert files[1].out.read_text() == ""
        files[1].out.write_text("kept")
    run_dir = RunDir(tmp_path / "run", tmp_path / "elsewhere")
    assert run_dir.next_round() == 3
    run_dir.begin_round(3, range(1))
    run_dir.close()
    (tmp_path / "run/round").unlink()
    run_dir = RunDir(tmp_path / "run", tmp_path / "run/logs")
    assert run_dir.next_round() == 3
    run_dir.close()
    assert (tmp_path / "run/logs/round-0001/rank-00001.out").read_text() == "kept"


def test_one_agent_per_run_directory(tmp_path: Path) -> None:
    owner = RunDir(tmp_path / "run", tmp_path / "run/logs")
    with pytest.raises(BusyError, match=rf"in use by another launch \(pid {os.getpid()}\)"):
        RunDir(tmp_path / "run", tmp_path / "run/logs")
    owner.close()
    RunDir(tmp_path / "run", tmp_path / "run/logs").close()


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"cannot be written \(Not a directory.* --run-dir"):
        RunDir(tmp_path / "file/run", tmp_path / "file/run/logs")


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


def test_a_log_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """The option that is to be changed is the one that is named; the run directory is let go."""
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"log directory .* --log-dir$"):
        RunDir(tmp_path / "run", tmp_path / "file/logs")
    RunDir(tmp_path / "run", tmp_path / "logs").close()


def test_a_full_disk_names_what_could_not_be_written(run_dir: RunDir) -> None:
    """The system does not say which file it was that could not grow."""
    (run_dir.path / "round").symlink_to("/dev/full")
    with pytest.raises(RunDirError, match=r"No space left on device: .*round-0001"):
        run_dir.begin_round(1, [0])


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
    console.say("done", "more")
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


def test_console_without_inotify(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no watches left, it polls."""

    def refuse(_directory: Path) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("launcher.reporting.console.DirectoryWatch", refuse)
    files = run_dir.begin_round(1, range(1))
    out = Reader()
    console = Console(Sink(out.write_end), Sink(out.write_end))
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
    console.say("note", style=31)
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
