"""`launch status` and the other words that ask a running job: what is typed, found, asked, printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.control import Control
from launcher.agent.control_protocol import RECORD
from launcher.cli import main
from launcher.cli.arguments import JOB_COMMAND_NAMES, asks_a_job, parse
from launcher.cli.job_commands import JOB_COMMANDS
from launcher.config.command import Command, Kind
from launcher.events import RequestReceived
from launcher.progress import Progress
from launcher.reporting.journal import JOURNAL, Journal
from launcher.reporting.status_board import StatusBoard
from tests.kit.job import LAUNCH, PATIENCE, Job
from tests.launcher.agent.test_control import Agent


def a_status() -> dict[str, Any]:
    board = StatusBoard("train").began_round(1, {0: "a", 1: "a"}, now=1.0)
    return {"status": board.sampled({0: Progress(5, 2.0), 1: Progress(5, 2.0)}, 2.0).status(3.0).to_json()}


ANSWERS = {
    "status": a_status(),
    "stacks": {"summary": ["ranks 0-1: step 5, in train.py:3"], "directory": "/runs/train/stacks"},
    "restart": {},
    "scale": {"from": 2, "to": 1},
    "stop": {},
    "kill": {},
}


def answer(control: Control, asked: RequestReceived) -> None:
    control.answer(asked.client, ANSWERS[asked.verb])


class Runs:
    """Run directories in runs/ of the current directory."""

    def __init__(self) -> None:
        self._agents: list[Agent] = []

    def make(self, name: str = "train") -> Path:
        path = Path("runs", name)
        path.mkdir(parents=True)
        (path / "lock").touch()
        return path

    def start(self, name: str = "train") -> Agent:
        self._agents.append(Agent(self.make(name) / RECORD, answer))
        return self._agents[-1]

    def close(self) -> None:
        for agent in self._agents:
            agent.close()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    monkeypatch.chdir(tmp_path)
    runs = Runs()
    yield runs
    runs.close()


def test_the_words_are_known_before_what_they_do_is_imported() -> None:
    assert tuple(command.name for command in JOB_COMMANDS) == JOB_COMMAND_NAMES


def test_a_script_of_that_name_comes_first(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.start()
    assert main(["status"]) == 0
    assert capsys.readouterr().out.startswith("train: running")
    assert main(["--nproc", "1", "status"]) == 2  # after an option it can only be a script
    assert "status" in capsys.readouterr().err
    Path("status").touch()
    assert not asks_a_job(["status"])
    assert parse(["status", "--json"]).command == Command(Kind.SCRIPT, "status", ("--json",))


@pytest.mark.parametrize(
    ("words", "asked", "printed"),
    [
        (
            ["stacks"],
            ("stacks", None),
            "ranks 0-1: step 5, in train.py:3\nwhole stacks: /runs/train/stacks\n",
        ),
        (
            ["restart", "train"],
            ("restart", None),
            "asked to save at the next step boundary, and to begin a new",
        ),
        (["scale", "train", "1"], ("scale", 1), "and to go on with 1 worker instead of 2"),
        (["scale", "1"], ("scale", 1), "1 worker instead of 2"),
        (["scale", "1", "--without=0"], ("scale", 1), "1 worker instead of 2"),
        (["scale", "--without", "0", "train", "1"], ("scale", 1), "1 worker instead of 2"),
        (
            ["stop", "runs/train"],
            ("stop", None),
            "runs/train: asked to save at the next step boundary, and to end",
        ),
        (["stop", "--now", "train"], ("kill", None), "asked to end at once"),
        (["stop", "train", "--now"], ("kill", None), "asked to end at once"),
    ],
)
def test_what_is_asked(
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    asked: tuple[str, int | None],
    printed: str,
) -> None:
    agent = runs.start()
    assert main(words) == 0
    assert [(one.verb, one.number) for one in agent.asked] == [asked]
    assert printed in capsys.readouterr().out


def test_stacks_of_workers_that_are_still_to_come(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ANSWERS, "stacks", {"summary": [], "directory": "/runs/train/stacks"})
    runs.start()
    assert main(["stacks"]) == 0
    assert capsys.readouterr().out == "no worker has begun yet: ask again in a moment\n"


def test_status(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.start()
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "train: running, round 1 for 2 s, 2 ranks\n  step    5\n"
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"running": True, **a_status()["status"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["status", "--jsn"],
            "--jsn: unknown option of launch status: did you mean --json? usage: launch status [RUN] [--json]",
        ),
        (["stop", "--json"], "--json: unknown option of launch stop"),
        (["status", "a", "b"], "launch: status: expected one run, found a b"),
        (["status", "nope"], "no run nope: expected a run directory, or a name in runs/: train"),
        (["scale"], "launch: scale: expected a number of workers, found nothing"),
        (["scale", "train"], "launch: scale: expected a number of workers, found 'train'"),
        (["scale", "train", "0"], "launch: scale: expected a number of workers, found '0'"),
        (["scale", "train", "1.5"], "found '1.5'"),
        (
            ["scale", "train", "1", "--without"],
            "launch: --without: expected slots separated by commas, as 0,3",
        ),
        (["scale", "train", "1", "--without=x"], "found x"),
        (["status", "--json=yes"], "--json=yes: --json takes no value: usage: launch status"),
        (["scale", "train", "7", "8"], "launch: scale: expected one run, found train 7"),
        (["status", ""], "no run '': "),
        (["status", "x" * 300], "xx: expected a run directory, or a name in runs/: train"),
        ([""], "nothing to run: give a script"),
        (["statsu"], "script statsu does not exist: did you mean `launch status`?"),
    ],
)
def test_mistakes(runs: Runs, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    runs.make()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("launch: ")
    assert message in err


@pytest.mark.parametrize("name", JOB_COMMAND_NAMES)
def test_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: launch {name} [RUN]")
    assert main(["--help"]) == 0
    assert f"launch {name} [RUN]" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 132])
def test_help_is_as_wide_as_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And breaks no line in the middle of a word."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert columns - 20 < max(map(len, out.splitlines())) <= columns
    assert "fewer nodes than MIN" in out


def test_which_run_is_meant(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """None that is named: the only one that runs, or else the only one there is."""
    assert main(["status"]) == 69
    assert "nothing runs in runs/: name a run directory" in capsys.readouterr().err
    runs.make("old")
    assert main(["status"]) == 69
    assert "nothing runs in runs/old" in capsys.readouterr().err
    runs.start("one")
    assert main(["stop"]) == 0
    assert "runs/one" in capsys.readouterr().out
    runs.start("two")
    assert main(["stop"]) == 2
    assert "several jobs run in runs/: name one of one, two" in capsys.readouterr().err
    Path("one").mkdir()  # no run directory, so runs/one is meant
    assert main(["stop", "one"]) == 0


def test_how_it_ended(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.make()
    assert main(["status", "train"]) == 69
    assert "launch: nothing runs in runs/train" in capsys.readouterr().err
    journal = Journal(path / JOURNAL, pytest.fail)
    journal.record("job_started", nproc=2)
    journal.record("round_started", round=1)
    journal.record("job_ended", exit_code=0, reason="")
    journal.close()
    assert main(["status", "train"]) == 0
    assert capsys.readouterr().out == "train: ended 0 s ago with exit code 0\n  ran     0 s, 1 round\n"
    assert main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["running"], told["exit_code"], told["rounds"]) == (False, 0, 1)
    for words in (["stop"], ["stacks"], ["restart"], ["scale", "2"]):
        assert main(words) == 69
    assert main(["status", "--watch"]) == 0


def test_it_ends_while_it_is_asked(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """The end is printed."""
    agent = Agent(runs.make() / RECORD, lambda _control, _asked: None)
    journal = Journal(Path("runs/train") / JOURNAL, pytest.fail)
    journal.record("job_started")
    journal.record("job_ended", exit_code=75)
    journal.close()
    ender = threading.Thread(target=lambda: [agent.wait(), agent.close()])
    ender.start()
    assert main(["status", "--watch"]) == 0
    ender.join()
    assert "with exit code 75" in capsys.readouterr().out


def test_how_it_ended_on_several_nodes(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """The node that was there last tells."""
    path = runs.make()
    for number, host in enumerate(("a", "b")):
        (path / "nodes" / host).mkdir(parents=True)
        journal = Journal(path / "nodes" / host / JOURNAL, pytest.fail)
        journal.record("job_started", time=100 + number)
        journal.record("job_ended", time=200 + number, exit_code=number)
        journal.close()
    assert main(["status", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 1


def test_a_job_of_another_version(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.start()
    monkeypatch.setitem(ANSWERS, "status", {"status": {"weather": "fine"}})
    assert main(["status"]) == 69
    assert "started by another version of launch" in capsys.readouterr().err


# -- with real jobs

# Reports steps until it is told to end; rank 0 tells through a pipe when it has begun.
STEPPER = """
    import os, sys, time
    import launcher

    if os.environ["RANK"] == "0":
        with open(sys.argv[1], "w") as file:
            file.write(os.environ["LAUNCH_ROUND"])
    step = 0
    while True:
        step += 1
        launcher.report(step, loss=1 / step)
        time.sleep(0.01)
    """


class Stepping:
    """A job that takes steps, and words to ask it with."""

    def __init__(self, job: Job, **options: object) -> None:
        self.job = job
        self.fifo = job.fifo()
        words = ["--nproc=1:2", job.script(STEPPER), str(self.fifo)]
        self.process = job.start(*words, **options)

    def ask(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LAUNCH, *words],
            cwd=self.job.path,
            env=self.job.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **options,
        )

    def status(self) -> dict[str, Any]:
        done = self.ask("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_whole_life(job: Job) -> None:
    """Watched, scaled, restarted, stopped; and what is told of it afterwards."""
    stepping = Stepping(job)
    assert stepping.fifo.read_text() == "1"
    watcher = subprocess.Popen(
        [*LAUNCH, "status", "--watch", "--json"],
        cwd=job.path,
        env=job.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None
    steps = [0]
    for line in watcher.stdout:
        told = json.loads(line)
        steps.append(told["step"] or 0)
        if steps[-1] > steps[-2] > 0:
            break
    assert told["world"] == 2
    stacks = stepping.ask("stacks")
    assert stacks.returncode == 0
    assert "train.py" in stacks.stdout
    scaled = stepping.ask("scale", "train", "1")
    assert (scaled.returncode, scaled.stderr) == (0, "")
    assert stepping.fifo.read_text() == "2"
    assert stepping.status()["world"] == 1
    refused = stepping.ask("scale", "train", "0")
    assert refused.returncode == 2
    assert stepping.ask("restart").returncode == 0
    assert stepping.fifo.read_text() == "3"
    assert stepping.ask("stop").returncode == 0
    ended = job.end(stepping.process)
    assert ended.code == 128 + signal.SIGTERM
    rest = [json.loads(line) for line in watcher.stdout]
    assert watcher.wait(PATIENCE) == 0
    watcher.stdout.close()
    assert rest[-1]["running"] is False
    assert rest[-1]["exit_code"] == 143
    after = stepping.ask("status", "train")
    assert after.returncode == 0
    assert "with exit code 143" in after.stdout
    assert "3 rounds" in after.stdout
    assert stepping.ask("stop").returncode == 69


def test_stop_now(job: Job) -> None:
    stepping = Stepping(job)
    stepping.fifo.read_text()
    assert stepping.ask("stop", "--now").returncode == 0
    assert job.end(stepping.process).code == 128 + signal.SIGTERM


def test_no_reader(job: Job) -> None:
    """As with `launch status | true`: no traceback."""
    stepping = Stepping(job)
    stepping.fifo.read_text()
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*LAUNCH, "status"],
        cwd=job.path,
        env=job.environment,
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    stepping.ask("stop", "--now")
    job.end(stepping.process)


def test_a_killed_launch(job: Job) -> None:
    stepping = Stepping(job)
    stepping.fifo.read_text()
    stepping.process.kill()
    stepping.process.wait()
    for stream in (stepping.process.stdout, stepping.process.stderr):
        assert stream is not None
        stream.read()  # until the workers are dead too
    done = stepping.ask("status", "train")
    assert done.returncode == 0
    assert "its launch was killed" in done.stdout
    assert f"(pid {stepping.process.pid}) was killed" in stepping.ask("stop", "train").stderr


def test_light_imports() -> None:
    """What starts a job does not import what asks one; nothing here needs torch."""
    code = (
        "import sys; from launcher.cli import main; "
        "assert 'launcher.cli.job_commands' not in sys.modules; "
        "import launcher.cli.job_commands; assert 'torch' not in sys.modules; assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
