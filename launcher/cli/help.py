"""What `launch --help` shows."""

from __future__ import annotations

from shutil import get_terminal_size
from textwrap import wrap

from launcher.cli.job_commands import CONTROLS
from launcher.config.options import OPTIONS, Option

__all__ = ["help_text"]

_USAGE = """\
usage: launch [options] train.py [args...]
       launch [options] -m module [args...]
       launch [options] -- command [args...]
       launch status|stacks|restart|scale|stop [RUN]

Start N workers on each node, and start them again when one fails.
"""

_CONTROLS = (
    "A job that runs, on this machine and of the same user (RUN: a run directory, or its name in runs/; "
    "none: the one that runs there; `launch ./status` is a script of that name):"
)

_EPILOG = (
    "Every option may stand in the --config file by its long name (`max-restarts: 5`). Flags beat "
    "torchrun's PET_* environment variables, which beat the file, which beats what Slurm or Kubernetes "
    "says. Underscores do for dashes."
)

_CODES = (
    "Exit codes: that of the first failed worker (128 + signal if it was killed), 128 + signal if launch "
    "was told to stop (130 for Ctrl-C), and"
)
_CODE = {
    2: "bad usage; nothing was started",
    69: "run directory or port in use, or no running job answers",
    70: "the launcher failed",
    73: "run directory not writable",
    74: "the workers finished, but a checkpoint did not become durable",
    75: "preempted: saved; start it again to go on",
    76: "a hang, and the restarts are used up",
    77: "a crash loop: the same failure again and again",
    78: "fewer nodes than MIN, and none came back in time",
    126: "the command cannot be executed",
    127: "the command is not found",
}

_LEFT = 30  # columns
_WIDEST = 130


def help_text() -> str:
    """As wide as the terminal."""
    parts = [_USAGE]
    for group in dict.fromkeys(option.group for option in OPTIONS if option.group):
        parts.append(f"{group}:\n" + "".join(map(_help_line, _of_group(group))))
    controls = "".join(_line(f"  {command.usage}", command.help) for command in CONTROLS)
    parts.append(_paragraph(_CONTROLS) + controls)
    refused = ", ".join(f"--{option.name}" for option in OPTIONS if option.refusal)
    parts.append(
        _paragraph(f"Of torchrun's options these are refused, with the reason and a way out: {refused}.")
    )
    codes = "".join(f"  {code:3}  {meaning}\n" for code, meaning in _CODE.items())
    return "\n".join([*parts, _paragraph(_EPILOG), _paragraph(_CODES) + codes])


def _of_group(group: str) -> list[Option]:
    return [option for option in OPTIONS if option.group == group]


def _help_line(option: Option) -> str:
    names = [f"-{option.short}"] if option.short else []
    names += [f"--{name}" for name in (option.name, *option.aliases)]
    left = f"  {', '.join(names)} {option.metavar}".rstrip()
    return _line(left, option.help)


def _line(left: str, right: str) -> str:
    gap = "\n" + " " * _LEFT if len(left) > _LEFT - 2 else " " * (_LEFT - len(left))
    return f"{left}{gap}{_paragraph(right, _LEFT)}"


def _paragraph(text: str, indent: int = 0) -> str:
    """Lines of whole words, all but the first one after `indent` spaces."""
    width = max(_LEFT, min(_WIDEST, get_terminal_size().columns) - indent)
    lines = wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines) + "\n"
