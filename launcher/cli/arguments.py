"""A command line of `launch`, taken apart: its own options, and the script with the script's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.job import Config, config_from_settings, settings_from_environ, settings_from_file
from launcher.config.options import OPTIONS, Option, Setting, find_option
from launcher.config.schedulers import settings_from_scheduler
from launcher.config.secret import VARIABLE
from launcher.errors import UsageError

__all__ = ["CONTROL_NAMES", "Parsed", "asks_a_job", "configure", "parse", "split"]

CONTROL_NAMES = ("status", "stacks", "restart", "scale", "stop")
"""The words that ask a running job, see controls.py."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was given, in order, and not looked at yet."""

    settings: list[Setting]
    words: list[str]  # the script and its arguments
    is_program: bool  # they came after --

    def asks_for(self, switch: str) -> bool:
        """Whether the option `switch` was given."""
        return any(setting.option.name == switch for setting in self.settings)


def asks_a_job(words: Sequence[str]) -> bool:
    """Whether a command line asks a running job. A script of that name in the current directory comes first."""
    return bool(words) and words[0] in CONTROL_NAMES and not Path(words[0]).is_file()


def parse(argv: Sequence[str]) -> Config:
    """The job that a command line describes. Raises `UsageError` for anything it cannot mean."""
    return configure(split(argv))


def configure(parsed: Parsed) -> Config:
    """The job that `parsed` describes, with what environment, file and scheduler add to it."""
    if not parsed.words or not parsed.words[0]:
        raise UsageError("nothing to run: give a script, `-m module`, or `-- command` (launch --help)")
    if not (parsed.is_program or parsed.asks_for("module") or parsed.asks_for("no-python")):
        _check_word(parsed.words[0])
    files = [setting.text for setting in parsed.settings if setting.option.name == "config"]
    from_file = [setting for path in files for setting in settings_from_file(path)]
    return config_from_settings(
        parsed.words,
        parsed.settings,
        settings_from_environ(),
        from_file,
        settings_from_scheduler(),
        is_program=parsed.is_program,
        secret=os.environ.get(VARIABLE),
    )


def _check_word(word: str) -> None:
    """Raise `UsageError` if `word` is no script, but nearly a word that asks a running job."""
    if not word.isalpha() or os.path.exists(word):  # noqa: PTH110 - Path.exists raises for a long name
        return
    import difflib  # only a mistake needs it

    for name in difflib.get_close_matches(word, CONTROL_NAMES, n=1, cutoff=0.7):
        raise UsageError(f"script {word} does not exist: did you mean `launch {name}`?")


def split(argv: Sequence[str]) -> Parsed:
    """Separate the launcher's options from what it shall run."""
    settings: list[Setting] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return Parsed(settings, words, is_program=True)
        if not word.startswith("-") or word == "-":
            return Parsed(settings, [word, *words], is_program=False)
        option, name, text = _option(word)
        if text is None and option.is_switch:
            text = "true"
        elif text is None and words:
            text = words.pop(0)
        elif text is None:
            raise UsageError(f"{name} needs a value: {option.metavar}")
        settings.append(Setting(option, text, name))
    return Parsed(settings, [], is_program=False)


def _option(word: str) -> tuple[Option, str, str | None]:
    """The option that `word` names, as it is written there, and its value if that is attached."""
    if word.startswith("--"):
        name, equals, text = word.partition("=")
        return find_option(name[2:], name), name, text if equals else None
    for option in OPTIONS:
        if option.short and word[1] == option.short:
            attached = word[2:].removeprefix("=")
            if not (attached and option.is_switch):
                return option, word[:2], attached or None
    raise UsageError(f"{word}: unknown option: `launch --help` lists the options")
