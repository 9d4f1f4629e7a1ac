"""The live view: what is to be seen on a terminal, whatever workers write and users do."""

from __future__ import annotations

import codecs
import os
import re
import select
import signal
import subprocess
import sys
import termios
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.job import ShownStreams
from launcher.reporting.console import Console, Sink
from launcher.reporting.message import Level, Message, error, headline, warning
from launcher.reporting.terminal import fit
from launcher.run_dir import RankFiles
from tests.kit.job import PATIENCE, Job
from tests.kit.screens import Screen


class Terminal:
    """A pseudo-terminal and the screen behind it."""

    def __init__(self, columns: int = 40, rows: int = 10) -> None:
        self.controller, self.fd = os.openpty()
        self.screen = Screen(columns, rows)
        self.raw = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.resize(columns)

    def resize(self, columns: int) -> None:
        termios.tcsetwinsize(self.fd, (self.screen.rows, columns))
        self.screen.resize(columns)

    def read(self) -> list[str]:
        """What is on the screen now."""
        while select.select([self.controller], [], [], 0)[0]:
            self._read()
        return self.screen.text

    def wait_for(self, *lines: str) -> None:
        """Return when the screen shows `lines` and the cursor below them."""
        self.wait_until(lambda shown: shown == [*lines, ""])

    def wait_until(self, is_there: Callable[[list[str]], bool]) -> list[str]:
        """The screen, once it shows what `is_there` looks for."""
        while not is_there(self.read()):
            assert select.select([self.controller], [], [], 20)[0], f"it stays at {self.screen.text}"
            self._read()
        return self.screen.text

    def _read(self) -> None:
        data = os.read(self.controller, 1 << 16)
        self.raw += data
        self.screen.feed(self._decoder.decode(data))

    def console(self, level: Level = Level.INFO) -> Console:
        return Console(Sink(self.fd), Sink(self.fd), level)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.controller)


@pytest.fixture(autouse=True)
def _xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def rank_files(path: Path, rank: int = 0) -> RankFiles:
    files = RankFiles(rank, path / f"{rank}.out", path / f"{rank}.err", path / "error", path)
    files.out.touch()
    files.err.touch()
    return files


def test_it_stays_below_what_is_printed_and_goes_at_the_end(terminal: Terminal, tmp_path: Path) -> None:
    files = rank_files(tmp_path)
    console = terminal.console()
    console.follow([files], ShownStreams())
    console.live(["one", "two"])
    terminal.wait_for("one", "two")
    files.out.write_text("hello\n" * 3)
    hello = ["[0] hello"] * 3
    terminal.wait_for(*hello, "one", "two")
    console.say(Message(("message", "its second line")))
    terminal.wait_for(*hello, "launch: message", "its second line", "one", "two")
    console.live(["three"])
    terminal.wait_for(*hello, "launch: message", "its second line", "three")
    console.close()
    assert terminal.read() == [*hello, "launch: message", "its second line", ""]


def test_workers_cannot_disturb_it(terminal: Terminal, tmp_path: Path) -> None:
    """Cursor movements, cleared screens, titles and bells of workers do not reach the terminal; colours do."""
    files = rank_files(tmp_path)
    console = terminal.console()
    console.follow([files], ShownStreams())
    console.live(["view"])
    lines = [
        b"up\x1b[5A\x1b[2J\x1b[?1049h\x1b[H\x1b[10;10H.",
        b"title\x1b]0;mine\x07.",
        b"link\x1b]8;;http://x\x1b\\.",
        b"modes\x1bc\x1b7\x1b8\x1b(0\x1b=\x1b[>4;2m.",
        b"c1\xc2\x9b2J.",
        b"bell\x07.",
        b"red\x1b[1;31m.",
        b"cut\x1b",
        b"\r 10%\r 20%",
    ]
    files.out.write_bytes(b"\n".join(lines) + b"\n")
    console.unfollow()
    console.say(headline("end"))
    console.close()
    assert terminal.read()[: len(lines)] == [
        "[0] up.",
        "[0] title.",
        "[0] link.",
        "[0] modes.",
        "[0] c1?2J.",
        "[0] bell?.",
        "[0] red.",
        "[0] cut",
        "[0]  20%",
    ]
    assert b"red\x1b[1;31m.\x1b[0m" in terminal.raw


def test_it_is_cut_to_the_terminal(terminal: Terminal) -> None:
    """In width and in height; a block that is higher than the screen could not be drawn over."""
    console = terminal.console()
    console.live(["x" * 100, "\x1b[31m" + "漢" * 50 + "\x1b[0m", *[str(i) for i in range(50)]])
    terminal.wait_for("x" * 39, "漢" * 19, *map(str, range(6)))
    assert ("漢" * 19 + "\x1b[0m\r\n").encode() in terminal.raw
    console.say(headline("said"))
    console.live(["y"])
    terminal.wait_for("launch: said", "y")
    console.close()


@pytest.mark.parametrize("columns", [5, 17, 39, 41, 200])
def test_it_survives_another_size(columns: int) -> None:
    terminal = Terminal(columns=40, rows=30)
    console = terminal.console()
    console.say(headline("above"))
    console.live(["x" * 60, "short", "y" * 30])
    terminal.wait_for("launch: above", "x" * 39, "short", "y" * 30)
    terminal.resize(columns)
    console.close()
    assert "".join(terminal.read()) == "launch: above"
    terminal.close()


def test_a_terminal_without_any_size(terminal: Terminal) -> None:
    termios.tcsetwinsize(terminal.fd, (0, 0))
    console = terminal.console()
    console.live(["x" * 30])
    terminal.wait_for("x" * 30)
    console.close()


@pytest.mark.parametrize("reason", ["dumb", "piped", "quiet"])
def test_where_there_is_none(terminal: Terminal, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dumb terminal, output that comes back through `| tee`, and --quiet: lines only."""
    read_end, write_end = os.pipe()
    if reason == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    out = Sink(write_end if reason == "piped" else terminal.fd)
    console = Console(out, Sink(terminal.fd), Level.WARNING if reason == "quiet" else Level.INFO)
    assert not console.has_live_view
    console.live(["view"])
    console.say(warning("warning"))
    console.close()
    assert terminal.read() == ["launch: warning", ""]
    os.close(read_end)
    os.close(write_end)


def test_no_colour(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal.console()
    console.live([console.paint("view", 31)])
    console.say(error("red"))
    console.close()
    assert terminal.read() == ["launch: red", ""]
    assert b"31m" not in terminal.raw


def test_show_is_a_line_of_it(terminal: Terminal) -> None:
    console = terminal.console()
    console.show("1 of 2")
    terminal.wait_for("launch: 1 of 2")
    console.say(headline("said"))
    console.show("2 of 2")
    terminal.wait_for("launch: said", "launch: 2 of 2")
    console.close()
    assert terminal.read() == ["launch: said", ""]


@pytest.mark.parametrize("level", Level)
def test_levels(level: Level, terminal: Terminal) -> None:
    console = terminal.console(level)
    for one in Level:
        console.say(Message((one.name,), level=one))
    console.close()
    assert terminal.read()[:-1] == [f"launch: {one.name}" for one in Level if one >= level]


def test_a_held_terminal_holds_up_nobody(terminal: Terminal) -> None:
    """Ctrl-S, for long: what it shows afterwards is the newest view, not all that it has missed."""
    console = terminal.console()
    termios.tcflow(terminal.fd, termios.TCOOFF)
    for number in range(20_000):
        console.live([f"view {number}."])
    termios.tcflow(terminal.fd, termios.TCOON)
    terminal.wait_for("view 19999.")
    console.close()
    assert len(terminal.raw) < 2000


def test_a_flood_of_lines_is_not_held_up_by_it(terminal: Terminal, tmp_path: Path) -> None:
    files = rank_files(tmp_path)
    console = terminal.console()
    console.follow([files], ShownStreams())
    console.live(["view"])
    terminal.wait_for("view")
    lines = [f"line {number}" for number in range(5000)]
    printed = [f"[0] {line}" for line in lines]
    reader = threading.Thread(target=terminal.wait_for, args=printed)
    reader.start()
    with files.out.open("w") as file:
        for line in lines:
            print(line, file=file, flush=True)
    console.close()
    reader.join()
    assert terminal.read() == [*printed, ""]


# Takes the terminal for its own, draws a view, and the next after SIGUSR1 and, in the foreground, SIGCONT.
VIEWER = """
    import fcntl, os, signal, subprocess, sys, termios, threading
    from launcher.reporting.console import Console, Sink
    from launcher.reporting.message import headline

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    console = Console(Sink(1), Sink(2))
    if "background" in sys.argv:
        other = subprocess.Popen(["sleep", "60"], process_group=0)
        os.tcsetpgrp(0, other.pid)
        console.say(headline("begun"))
    else:
        resumed, handler = threading.Event(), signal.getsignal(signal.SIGCONT)
        signal.signal(signal.SIGCONT, lambda *given: (handler(*given), resumed.set()))
    console.live(["first view"])
    signal.sigwait([signal.SIGUSR1])
    if "background" not in sys.argv:
        resumed.wait()
    console.live(["second view"])
    console.say(headline("said"))
    signal.pause()
    """


@pytest.fixture(params=["foreground"])
def viewer(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """A process in a session and a terminal of its own."""
    terminal = Terminal()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(VIEWER), request.param],
        stdin=terminal.fd,
        stdout=terminal.fd,
        stderr=terminal.fd,
        start_new_session=True,
    )
    yield process, terminal
    process.kill()
    process.wait()
    terminal.close()  # and with it ends what else is in the session


@pytest.mark.parametrize("viewer", ["background"], indirect=True)
def test_in_the_background(viewer: tuple[subprocess.Popen[bytes], Terminal]) -> None:
    """`launch ... &`: the terminal is somebody else's; lines are printed there, and that is all."""
    process, terminal = viewer
    terminal.wait_for("launch: begun")
    process.send_signal(signal.SIGUSR1)
    terminal.wait_for("launch: begun", "launch: said")
    assert b"view" not in terminal.raw


def test_ctrl_z_and_fg(viewer: tuple[subprocess.Popen[bytes], Terminal]) -> None:
    """What the shell has written meanwhile stays; the view is drawn anew below."""
    process, terminal = viewer
    terminal.wait_for("first view")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    os.write(terminal.fd, b"$ ls\nfile\n$ fg\n")
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGUSR1)
    terminal.wait_for("first view", "$ ls", "file", "$ fg", "launch: said", "second view")


def test_killed(viewer: tuple[subprocess.Popen[bytes], Terminal]) -> None:
    """The cursor is below the view, and the terminal's modes are as before."""
    process, terminal = viewer
    before = termios.tcgetattr(terminal.fd)
    terminal.wait_for("first view")
    process.kill()
    process.wait()
    assert terminal.read() == ["first view", ""]
    assert (terminal.screen.row, terminal.screen.column) == (1, 0)
    assert termios.tcgetattr(terminal.fd) == before


@given(st.text(), st.integers(1, 60))
def test_what_fits(text: str, columns: int) -> None:
    """It takes as many columns as it says, never more than there are, and is one line."""
    shown, used = fit(text, columns)
    assert used <= columns
    screen = Screen(columns, 10)
    screen.feed(shown)
    assert len(screen.lines) == 1
    assert screen.column == used


# Each rank reports steps; the first says something in between, as a progress bar too.
TRAINER = """
    import os, sys, time
    import launcher

    rank = int(os.environ["RANK"])
    for step in range(1, 100_000):
        launcher.report(step, loss=0.5)
        if rank == 0 and step % 50 == 0:
            print(f"step {step}", flush=True)
            sys.stderr.write(f"\\r{step} of many\\x1b[A")
        time.sleep(0.01)
    """


def test_a_real_job(job: Job) -> None:
    """The view is below the workers' lines, and the verdict; nothing of it is left when the job ends."""
    terminal = Terminal(columns=100, rows=30)
    process = job.start(
        "--nproc=2",
        job.script(TRAINER),
        stdin=terminal.fd,
        stdout=terminal.fd,
        stderr=terminal.fd,
    )
    view = r"\ntrain: running, round 1 for [\w ]+, 2 ranks\n  step    \d+.*, loss 0\.5\n(  ranks .*\n)?$"
    terminal.wait_until(lambda lines: bool(re.search(view, "\n".join(lines))))
    terminal.wait_until(lambda lines: any(line == "[0] step 100" for line in lines))
    process.send_signal(signal.SIGINT)
    terminal.wait_until(lambda lines: any("nothing is left running" in line for line in lines))
    assert process.wait(PATIENCE) == 130
    left = terminal.read()
    assert left[-2:] == ["launch: stopped by SIGINT; nothing is left running", ""]
    assert not any("2 ranks" in line for line in left)
    terminal.close()


def test_a_real_job_that_is_piped(job: Job) -> None:
    """Nothing periodic; --quiet leaves what the workers print."""
    script = job.script(
        "import time, launcher\nfor i in range(20): launcher.report(i); time.sleep(0.1)\nprint('end')"
    )
    done = job.run(script)
    assert (done.out, done.err.count("\n")) == ("[0] end\n", 2)
    assert re.fullmatch(r"launch: finished in \d+ s: step 19", done.err.splitlines()[-1])
    assert job.run("--quiet", script).err == ""
    assert "launch: worker exited: rank 0, " in job.run("--log-level", "debug", script).err
