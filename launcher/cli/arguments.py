"""The command line of `launch`, split into its own options and the script with the script's arguments.

Not argparse. It could do 40 lines of this module's work and no more: the environment, the YAML file and the
schedulers give options too, so the table in `config/options.py` and the parsers have to stay. It cannot do these:

- `launch -- prog` and `launch prog` are the same to it, and it takes the script's own `--` away
  (`launch train.py -- x` calls the script with `x`), in another way from one Python version to the next;
- a value that begins with a dash (`--rdzv-conf -x`) is refused, a switch takes no value (`--standalone=0`);
- its errors neither say what is expected and found, nor suggest the nearest option (before Python 3.14).

It takes 1.1 ms to import, 3.0 ms to build the options and 0.1 ms to parse, against 0.02 ms here. The zygote waits
for this part of the start, which takes 31 ms of CPU with all imports (scripts/bench/command_line).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.job import Config
from launcher.config.options import OPTIONS, Option, Setting, find_option
from launcher.config.schedulers import settings_from_scheduler
from launcher.config.secret import VARIABLE
from launcher.config.settings import config_from_settings, settings_from_environ, settings_from_file
from launcher.errors import UsageError

__all__ = ["JOB_COMMAND_NAMES", "CommandLine", "asks_a_job", "configure", "parse", "split"]

JOB_COMMAND_NAMES = ("status", "stacks", "restart", "scale", "stop")
"""The commands that ask a running job, see `job_commands`."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The options in the order given, unparsed, and what to run."""

    settings: list[Setting]
    words: list[str]  # the script and its arguments
    is_program: bool  # True if they came after `--`

    def has(self, switch: str) -> bool:
        """True if the option `switch` was given."""
        return any(setting.option.name == switch for setting in self.settings)


def asks_a_job(words: Sequence[str]) -> bool:
    """True if a command line asks a running job. A script of that name in the current directory comes first."""
    return bool(words) and words[0] in JOB_COMMAND_NAMES and not Path(words[0]).is_file()


def parse(argv: Sequence[str], gpus: int | None = None) -> Config:
    """The job that a command line describes. Raises `UsageError` for anything that makes no sense.

    Args:
        argv: options, and the script with its arguments.
        gpus: GPUs of this node that workers can see; None: they are counted.
    """
    return configure(split(argv), gpus)


def configure(line: CommandLine, gpus: int | None = None) -> Config:
    """The job that `line` describes, together with the environment, the configuration file and the scheduler."""
    if not line.words or not line.words[0]:
        raise UsageError("nothing to run: give a script, `-m module`, or `-- command` (launch --help)")
    if not (line.is_program or line.has("module") or line.has("no-python")):
        _check_word(line.words[0])
    files = [setting.text for setting in line.settings if setting.option.name == "config"]
    from_file = [setting for path in files for setting in settings_from_file(path)]
    return config_from_settings(
        line.words,
        line.settings,
        settings_from_environ(),
        from_file,
        settings_from_scheduler(),
        is_program=line.is_program,
        secret=os.environ.get(VARIABLE),
        gpus=gpus,
    )


def _check_word(word: str) -> None:
    """Raise `UsageError` if `word` is no script, but a misspelt command that asks a running job."""
    if not word.isalpha() or os.path.exists(word):  # noqa: PTH110 - Path.exists raises for a long name
        return
    import difflib  # only a mistake needs it

    for name in difflib.get_close_matches(word, JOB_COMMAND_NAMES, n=1, cutoff=0.7):
        raise UsageError(f"script {word} does not exist: did you mean `launch {name}`?")


def split(argv: Sequence[str]) -> CommandLine:
    """Separate the launcher's options from what to run."""
    settings: list[Setting] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return CommandLine(settings, words, is_program=True)
        if not word.startswith("-") or word == "-":
            return CommandLine(settings, [word, *words], is_program=False)
        option, name, text = _option(word)
        if text is None and option.is_switch:
            text = "true"
        elif text is None and words:
            text = words.pop(0)
        elif text is None:
            raise UsageError(f"{name} needs a value: {option.metavar}")
        settings.append(Setting(option, text, name))
    return CommandLine(settings, [], is_program=False)


def _option(word: str) -> tuple[Option, str, str | None]:
    """The option in `word`, its name as written there, and its value if that is attached."""
    if word.startswith("--"):
        name, equals, text = word.partition("=")
        return find_option(name[2:], name), name, text if equals else None
    for option in OPTIONS:
        if option.short and word[1] == option.short:
            attached = word[2:].removeprefix("=")
            if not (attached and option.is_switch):
                return option, word[:2], attached or None
    raise UsageError(f"{word}: unknown option: `launch --help` lists the options")
