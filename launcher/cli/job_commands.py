"""`launch status`, `stacks`, `restart`, `scale`, `stop`: asking a job that runs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cli.ask import ask, is_running
from launcher.config import parsers
from launcher.errors import ExitCode, NotRunningError, UnreachableError, UsageError
from launcher.formatting import count
from launcher.reporting.journal import JOURNAL, read_journal
from launcher.reporting.past_job import PastJob
from launcher.reporting.status import Status
from launcher.reporting.terminal import LiveBlock, Sink

__all__ = ["CONTROLS", "ControlCommand", "control"]

_RUNS = Path("runs")
_STACKS_SECONDS = 90.0  # more than the agent takes for them, busy as the machine may be
_WATCH_SECONDS = 1.0
_WITHOUT = "--without"
_SAVE = "save at the next step boundary"


@dataclass(frozen=True)
class ControlCommand:
    """One of the words that ask a running job. `help` is a line."""

    name: str
    help: str
    takes_number: bool = False
    switches: tuple[
        tuple[str, str], ...
    ] = ()  # name, with that of its value if it takes one; a line of help

    @property
    def usage(self) -> str:
        switches = "".join(f" [{name}]" for name, _ in self.switches)
        return f"launch {self.name} [RUN]{' N' if self.takes_number else ''}{switches}"


CONTROLS = (
    ControlCommand(
        "status",
        "how a job is, or how it ended",
        switches=(("--json", "for programs"), ("--watch", "again every second, until the job ends")),
    ),
    ControlCommand("stacks", "where every worker is, in Python and native code, without stopping it"),
    ControlCommand(
        "restart", "save at the next step boundary, then begin a new round; again: without waiting"
    ),
    ControlCommand(
        "scale",
        "go on with N workers on this node from the next step boundary on",
        takes_number=True,
        switches=((f"{_WITHOUT} SLOTS", "give up these, as 3 or 0,3: devices that shall have no worker"),),
    ),
    ControlCommand(
        "stop",
        "save at the next step boundary, then end, as with SIGTERM",
        switches=(("--now", "end at once, without a save"),),
    ),
)
_BY_NAME = {command.name: command for command in CONTROLS}


@dataclass(frozen=True)
class _Request:
    command: ControlCommand
    run: str | None
    number: int | None
    switches: Mapping[str, str]  # with their values; empty if they take none


def control(words: Sequence[str]) -> int:
    """Carry out a command line that `asks_a_job`, and return the exit code.

    Raises `UsageError` for what makes no sense, also to the job; `UnreachableError` if no job answers.
    """
    try:
        code = _carry_out(words)
        sys.stdout.flush()
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    return code


def _carry_out(words: Sequence[str]) -> int:
    command = _BY_NAME[words[0]]
    if {"-h", "--help"}.intersection(words[1:]):
        _print(_help(command))
        return ExitCode.OK
    request = _read(command, words[1:])
    run = _find_run(request.run)
    match command.name:
        case "status" if "--watch" in request.switches:
            _watch(run, as_json="--json" in request.switches)
        case "status":
            _print(_tell(_look(run), run, as_json="--json" in request.switches))
        case "stacks":
            for answer in ask(run, "stacks", timeout=_STACKS_SECONDS):
                found = [*answer["summary"], f"whole stacks: {answer['directory']}"]
                _print(
                    *(found if answer["summary"] else ["no worker has begun yet: ask again in a moment"])
                )
        case "restart":
            answer = list(ask(run, "restart"))[-1]
            _print(f"{run}: asked to {_how(answer)}, and to begin a new round")
        case "scale":
            without = _read_slots(request)
            answer = list(ask(run, "scale", request.number, without=without))[-1]
            workers = count(answer["to"], "worker")
            _print(
                f"{run}: asked to {_how(answer)}, and to go on with {workers} instead of {answer['from']}"
            )
        case "stop" if "--now" in request.switches:
            list(ask(run, "kill"))
            _print(f"{run}: asked to end at once")
        case "stop":
            answer = list(ask(run, "stop"))[-1]
            _print(f"{run}: asked to {_how(answer)}, and to end")
    return ExitCode.OK


def _how(answer: Mapping[str, Any]) -> str:
    """What becomes of the workers that run."""
    if answer.get("at_once"):
        return "stop its workers, which do not answer"
    return _SAVE if answer.get("can_drain", True) else "stop its workers, which cannot save"


def _print(*lines: str) -> None:
    for line in lines:
        print(line)


def _help(command: ControlCommand) -> str:
    head = f"usage: {command.usage}\n\n{command.help[0].upper()}{command.help[1:]}.\n"
    run = "RUN is a run directory, or its name in runs/. Without it: the one that runs there.\n"
    width = max((len(name) for name, _ in command.switches), default=0) + 3
    switches = [f"  {name:<{width}}{text}\n" for name, text in command.switches]
    return "\n".join([head, run, "".join(switches)]).rstrip()


def _read(command: ControlCommand, words: Sequence[str]) -> _Request:
    """What is asked, of which run. Raises `UsageError` for words too many, too few, or unknown."""
    switches, rest = _separate(command, words)
    number = _read_number(command, rest.pop() if rest else None) if command.takes_number else None
    if len(rest) > 1:
        raise UsageError(f"{command.name}: expected one run, found {' '.join(rest)}: {command.usage}")
    return _Request(command, rest[0] if rest else None, number, switches)


def _separate(command: ControlCommand, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The switches with their values, and the other words."""
    takes_value = {name.partition(" ")[0]: " " in name for name, _ in command.switches}
    switches: dict[str, str] = {}
    rest = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            rest.append(word)
        elif name not in takes_value or (equals and not takes_value[name]):
            raise UsageError(f"{word}: unknown option of launch {command.name}: usage: {command.usage}")
        else:
            switches[name] = next(left, "") if takes_value[name] and not equals else value
    return switches, rest


def _read_slots(request: _Request) -> frozenset[int]:
    text = request.switches.get(_WITHOUT)
    if text is None:
        return frozenset()
    try:
        return parsers.slots(text)
    except ValueError as expected:
        raise UsageError(f"{_WITHOUT}: expected {expected}, found {text or 'nothing'}") from None


def _read_number(command: ControlCommand, text: str | None) -> int:
    if text is None or not text.isdecimal() or int(text) < 1:
        found = "nothing" if text is None else repr(text)
        raise UsageError(f"{command.name}: expected a number of workers, found {found}: {command.usage}")
    return int(text)


def _find_run(name: str | None) -> Path:
    """The run directory that the user means."""
    if name is None:
        return _only_run()
    for path in (Path(name), _RUNS / name):
        try:
            if name and _is_run(path):
                return path
        except PermissionError:
            raise UnreachableError(
                f"{path} is closed to this user: ask as the user whose job it is"
            ) from None
        except OSError:
            pass  # too long for a name of anything
    others = ", ".join(path.name for path in _runs())
    raise UsageError(
        f"no run {name or repr(name)}: expected a run directory, or a name in runs/"
        + (f": {others}" if others else "")
    )


def _only_run() -> Path:
    runs = _runs()
    running = [path for path in runs if is_running(path)]
    if len(running) > 1:
        names = ", ".join(path.name for path in running)
        raise UsageError(f"several jobs run in runs/: name one of {names}")
    if running or len(runs) == 1:
        return (running or runs)[0]
    raise NotRunningError("nothing runs in runs/: name a run directory")


def _runs() -> list[Path]:
    try:
        return [path for path in sorted(_RUNS.iterdir()) if _is_run(path)]
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    try:
        return any((path / mark).exists() for mark in ("lock", JOURNAL, "nodes"))
    except OSError:  # for others' eyes only: `ask` tells whose it is
        return path.is_dir()


# -- status


def _look(run: Path) -> Status | PastJob:
    """How the job in `run` is, or how it ended. Raises `NotRunningError` if none was ever there."""
    try:
        answer = list(ask(run, "status"))[-1]
    except NotRunningError:
        past = _past(run)
        if past is None:
            raise
        return past
    try:
        return Status.from_json(answer["status"])
    except (KeyError, TypeError, ValueError):
        raise UnreachableError(f"the job in {run} was started by another version of launch") from None


def _past(run: Path) -> PastJob | None:
    """As the agent tells it that was there last, of one or of several nodes."""
    journals = [run / JOURNAL, *run.glob(f"nodes/*/{JOURNAL}")]
    pasts = [past for journal in journals if (past := PastJob.of(read_journal(journal)))]
    return max(pasts, key=lambda past: (past.started, past.ended), default=None)


def _tell(what: Status | PastJob, run: Path, *, as_json: bool) -> str:
    if as_json:
        running: Mapping[str, Any] = {"running": isinstance(what, Status)}
        return json.dumps({**running, **what.to_json()})
    return "\n".join(_lines(what, run))


def _lines(what: Status | PastJob, run: Path) -> list[str]:
    paint = Sink(1).paint
    return what.render(paint) if isinstance(what, Status) else what.render(run.name, time.time(), paint)


def _watch(run: Path, *, as_json: bool) -> None:
    """Tell of the job each second, in place on a terminal, and at last how it ended."""
    block = LiveBlock(Sink(1), beside=Sink(1))
    for what in _looks(run):
        if as_json or not block.can_draw:
            print(_tell(what, run, as_json=as_json), flush=True)
        else:
            block.lines = _lines(what, run)
            block.refresh()


def _looks(run: Path) -> Iterator[Status | PastJob]:
    while isinstance(what := _look(run), Status):
        yield what
        time.sleep(_WATCH_SECONDS)
    yield what
