"""The command line: `launch [options] train.py [args…]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launcher import run
from launcher.config import Config, config_from_settings, settings_from_environ, settings_from_file
from launcher.errors import ExitCode, LaunchError, UsageError
from launcher.options import OPTIONS, Option, Setting, find
from launcher.schedulers import settings_from_scheduler

__all__ = ["main", "parse"]

_USAGE = """\
usage: launch [options] train.py [args...]
       launch [options] -m module [args...]
       launch [options] -- command [args...]

Start N workers on this node, and start them again when one fails.
"""

_EPILOG = """\
Every option may stand in the --config file by its long name (`max-restarts: 5`). Flags beat
torchrun's PET_* environment variables, which beat the file, which beats what Slurm or Kubernetes
says. Underscores do for dashes.

Exit codes: that of the first failed worker (128 + signal if it was killed), 128 + signal if launch
was told to stop (130 for Ctrl-C), 2 bad usage, 69 run directory or port in use, 70 the launcher
failed, 73 run directory not writable, 74 the workers finished but a checkpoint did not become
durable, 126 and 127 command not executable or not found.
"""


@dataclass(frozen=True, slots=True)
class _Parsed:
    settings: list[Setting]
    words: list[str]  # the script and its arguments
    is_program: bool  # they came after --

    def asks_for(self, switch: str) -> bool:
        return any(setting.option.name == switch for setting in self.settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `launch` with `argv` (default: the process's own), and return its exit code."""
    try:
        parsed = _split(sys.argv[1:] if argv is None else argv)
        if parsed.asks_for("help"):
            sys.stdout.write(_help())
            return ExitCode.OK
        if parsed.asks_for("version"):
            from importlib.metadata import version  # takes as long as all else here

            sys.stdout.write(f"launch {version('shardckpt')}\n")
            return ExitCode.OK
        return run(_configure(parsed))
    except LaunchError as error:
        sys.stderr.write(f"launch: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:  # before there was anything to stop, or after everything was
        return 128 + 2


def parse(argv: Sequence[str]) -> Config:
    """The job that a command line describes. Raises `UsageError` for anything it cannot mean."""
    return _configure(_split(argv))


def _configure(parsed: _Parsed) -> Config:
    if not parsed.words:
        raise UsageError("nothing to run: give a script, `-m module`, or `-- command` (launch --help)")
    files = [setting.text for setting in parsed.settings if setting.option.name == "config"]
    from_file = [setting for path in files for setting in settings_from_file(path)]
    return config_from_settings(
        parsed.words,
        parsed.settings,
        settings_from_environ(),
        from_file,
        settings_from_scheduler(),
        is_program=parsed.is_program,
    )


def _split(argv: Sequence[str]) -> _Parsed:
    """Separate the launcher's options from what it shall run."""
    settings: list[Setting] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return _Parsed(settings, words, is_program=True)
        if not word.startswith("-") or word == "-":
            return _Parsed(settings, [word, *words], is_program=False)
        option, name, text = _option(word)
        if text is None and option.is_switch:
            text = "true"
        elif text is None and words:
            text = words.pop(0)
        elif text is None:
            raise UsageError(f"{name} needs a value: {option.metavar}")
        settings.append(Setting(option, text, name))
    return _Parsed(settings, [], is_program=False)


def _option(word: str) -> tuple[Option, str, str | None]:
    """The option that `word` names, as it is written there, and its value if that is attached."""
    if word.startswith("--"):
        name, equals, text = word.partition("=")
        return find(name[2:], name), name, text if equals else None
    for option in OPTIONS:
        if option.short and word[1] == option.short:
            attached = word[2:].removeprefix("=")
            if not (attached and option.is_switch):
                return option, word[:2], attached or None
    raise UsageError(f"{word}: unknown option: `launch --help` lists the options")


def _help() -> str:
    parts = [_USAGE]
    for group in dict.fromkeys(option.group for option in OPTIONS if option.group):
        parts.append(f"{group}:\n" + "".join(map(_help_line, _of_group(group))))
    refused = ", ".join(f"--{option.name}" for option in OPTIONS if option.refusal)
    parts.append(f"Of torchrun's options these are refused, with the reason and a way out: {refused}.\n")
    return "\n".join([*parts, _EPILOG])


def _of_group(group: str) -> list[Option]:
    return [option for option in OPTIONS if option.group == group]


def _help_line(option: Option) -> str:
    names = [f"-{option.short}"] if option.short else []
    names += [f"--{name}" for name in (option.name, *option.aliases)]
    left = f"  {', '.join(names)} {option.metavar}".rstrip()
    gap = "\n" + " " * 30 if len(left) > 28 else " " * (30 - len(left))
    return f"{left}{gap}{option.help}\n"
