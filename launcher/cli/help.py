"""The text of `launch --help`, as wide as the terminal."""

from __future__ import annotations

from shutil import get_terminal_size
from textwrap import wrap

from launcher.cli.job_commands import JOB_COMMANDS
from launcher.config.options import OPTIONS, Option

__all__ = ["help_text"]

_USAGE = """\
usage: launch [options] train.py [args...]
       launch [options] -m module [args...]
       launch [options] -- command [args...]
       launch status|stacks|restart|scale|stop [RUN]

Start N workers on each node, and start them again when one fails.

  launch --nproc 8 train.py --lr 3e-4     8 workers on this node
  launch --nnodes 2 --nproc 8 --rdzv-endpoint node0:29400 train.py
                                          the same command on each of 2 nodes
"""

_ASKING = (
    "Commands that ask a running job of the same user on this machine. RUN is a run directory or its name "
    "in runs/; without it, the run that is running there. (`launch ./status` starts a script of that name.)"
)

_EPILOG = (
    "The --config file may hold every option by its long name (`max-restarts: 5`), with dashes or "
    "underscores. Flags beat torchrun's PET_* environment variables; these beat the file; the file beats "
    "what Slurm or Kubernetes says."
)

_CODES = (
    "Exit codes: that of the first failed worker (128 + signal if a signal killed it), 128 + signal if "
    "launch was told to stop (130 for Ctrl-C), and"
)
_CODE = {
    2: "bad usage; nothing was started",
    69: "the run directory or port is in use, or no running job answers",
    70: "launch itself failed",
    73: "the run directory cannot be written",
    74: "the workers finished, but a checkpoint did not become durable",
    75: "preempted: saved; start it again to go on",
    76: "a hang, and the restarts are used up",
    77: "a crash loop: the same failure again and again",
    78: "fewer nodes than MIN, and none came back in time",
    126: "the command cannot be executed",
    127: "the command does not exist",
}

_LEFT = 30  # columns before the help of an option
_WIDEST = 130  # columns; longer lines are hard to read


def help_text() -> str:
    """The whole text."""
    parts = [_USAGE]
    for group in dict.fromkeys(option.group for option in OPTIONS if option.group):
        parts.append(f"{group}:\n" + "".join(map(_help_line, _of_group(group))))
    commands = "".join(_line(f"  {command.usage}", command.help) for command in JOB_COMMANDS)
    parts.append(_paragraph(_ASKING) + commands)
    refused = ", ".join(f"--{option.name}" for option in OPTIONS if option.refusal)
    parts.append(
        _paragraph(
            f"Options of torchrun that are refused, with the reason and what to do instead: {refused}."
        )
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
    """`text` in lines of whole words; all but the first are indented by so many spaces."""
    width = max(_LEFT, min(_WIDEST, get_terminal_size().columns) - indent)
    lines = wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines) + "\n"
