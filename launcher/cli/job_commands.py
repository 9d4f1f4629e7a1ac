"""`launch status`, `stacks`, `restart`, `scale`, `stop`: commands that ask a running job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cli.ask import ask
from launcher.cli.find_run import find_run
from launcher.cli.show_status import print_status, watch_status
from launcher.config import parsers
from launcher.errors import ExitCode, UsageError
from launcher.formatting import count

__all__ = ["JOB_COMMANDS", "JobCommand", "run_job_command"]

_STACKS_SECONDS = 90.0  # more than the agent needs for them on a busy machine
_WITHOUT = "--without"
_SAVE = "save at the next step boundary"


@dataclass(frozen=True)
class JobCommand:
    """A command that asks a running job."""

    name: str
    help: str
    takes_number: bool = False
    options: tuple[tuple[str, str], ...] = ()
    """Name, followed by its value's if it takes one; a line of help."""

    @property
    def usage(self) -> str:
        """How it is called, in a line."""
        options = "".join(f" [{name}]" for name, _ in self.options)
        return f"launch {self.name} [RUN]{' N' if self.takes_number else ''}{options}"


JOB_COMMANDS = (
    JobCommand(
        "status",
        "the state of a job, or how it ended",
        options=(("--json", "for programs"), ("--watch", "every second, until the job ends")),
    ),
    JobCommand("stacks", "where every worker is, in Python and native code, without stopping it"),
    JobCommand(
        "restart",
        "save at the next step boundary, then start a new round; a second request does not wait for it",
    ),
    JobCommand(
        "scale",
        "go on with N workers on this node from the next step boundary on",
        takes_number=True,
        options=((f"{_WITHOUT} SLOTS", "devices that get no worker, as 3 or 0,3"),),
    ),
    JobCommand(
        "stop",
        "save at the next step boundary, then end, as with SIGTERM",
        options=(("--now", "end at once, without a save"),),
    ),
)
_BY_NAME = {command.name: command for command in JOB_COMMANDS}


@dataclass(frozen=True)
class _Words:
    """The words after a command's name."""

    run: str | None
    number: int | None
    options: Mapping[str, str]  # name -> value; empty if it takes none


def run_job_command(words: Sequence[str]) -> int:
    """Carry out a command line that `asks_a_job`, and return the exit code.

    Raises:
        UsageError: The words make no sense, or the job refuses.
        UnreachableError: No job answers.
    """
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    return code


def _run(words: Sequence[str]) -> int:
    command = _BY_NAME[words[0]]
    if {"-h", "--help"}.intersection(words[1:]):
        print(_help(command))
        return ExitCode.OK
    given = _parse(command, words[1:])
    run = find_run(given.run)
    match command.name:
        case "status" if "--watch" in given.options:
            watch_status(run, as_json="--json" in given.options)
        case "status":
            print_status(run, as_json="--json" in given.options)
        case "stacks":
            _print_stacks(run)
        case "restart":
            answer = list(ask(run, "restart"))[-1]
            print(f"{run}: asked to {_how(answer)}, and to begin a new round")
        case "scale":
            answer = list(ask(run, "scale", given.number, without=_parse_slots(given)))[-1]
            workers = f"{count(answer['to'], 'worker')} instead of {answer['from']}"
            print(f"{run}: asked to {_how(answer)}, and to go on with {workers}")
        case "stop" if "--now" in given.options:
            list(ask(run, "kill"))
            print(f"{run}: asked to end at once")
        case "stop":
            answer = list(ask(run, "stop"))[-1]
            print(f"{run}: asked to {_how(answer)}, and to end")
    return ExitCode.OK


def _print_stacks(run: Path) -> None:
    for answer in ask(run, "stacks", timeout=_STACKS_SECONDS):
        if answer["summary"]:
            print(*answer["summary"], f"whole stacks: {answer['directory']}", sep="\n")
        else:
            print("no worker has begun yet: ask again in a moment")


def _how(answer: Mapping[str, Any]) -> str:
    """What happens to the workers that run."""
    if answer.get("at_once"):
        return "stop its workers, which do not answer"
    return _SAVE if answer.get("can_drain", True) else "stop its workers, which cannot save"


def _help(command: JobCommand) -> str:
    head = f"usage: {command.usage}\n\n{command.help[0].upper()}{command.help[1:]}.\n"
    run = "RUN: a run directory or its name in runs/ (default: the one that is running).\n"
    width = max((len(name) for name, _ in command.options), default=0) + 3
    options = [f"  {name:<{width}}{text}\n" for name, text in command.options]
    return "\n".join([head, run, "".join(options)]).rstrip()


# -- the words


def _parse(command: JobCommand, words: Sequence[str]) -> _Words:
    """Raises `UsageError` for words that are missing, unknown or too many."""
    options, rest = _split_options(command, words)
    number = _parse_number(command, rest.pop() if rest else None) if command.takes_number else None
    if len(rest) > 1:
        raise UsageError(f"{command.name}: expected one run, found {' '.join(rest)}: {command.usage}")
    return _Words(rest[0] if rest else None, number, options)


def _split_options(command: JobCommand, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options with their values, and the other words."""
    takes_value = {name.partition(" ")[0]: " " in name for name, _ in command.options}
    options: dict[str, str] = {}
    rest = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            rest.append(word)
        elif name not in takes_value:
            raise UsageError(
                f"{word}: unknown option of launch {command.name}: {_suggest(name, takes_value)}"
                f"usage: {command.usage}"
            )
        elif equals and not takes_value[name]:
            raise UsageError(f"{word}: {name} takes no value: usage: {command.usage}")
        else:
            options[name] = next(left, "") if takes_value[name] and not equals else value
    return options, rest


def _suggest(name: str, known: Mapping[str, bool]) -> str:
    import difflib  # only for a mistake

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"did you mean {near[0]}? " if near else ""


def _parse_slots(given: _Words) -> frozenset[int]:
    text = given.options.get(_WITHOUT)
    if text is None:
        return frozenset()
    try:
        return parsers.slots(text)
    except ValueError as expected:
        raise UsageError(f"{_WITHOUT}: expected {expected}, found {text or 'nothing'}") from None


def _parse_number(command: JobCommand, text: str | None) -> int:
    if text is None or not text.isdecimal() or int(text) < 1:
        found = "nothing" if text is None else repr(text)
        raise UsageError(f"{command.name}: expected a number of workers, found {found}: {command.usage}")
    return int(text)
