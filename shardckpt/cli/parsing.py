"""The command line: what there is, and what to say about what there is not."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from shardckpt.version import __version__

__all__ = ["UsageError", "parse"]

_EXIT_CODES = """\
exit codes:
  0    done; for verify: the checkpoint is good
  1    another failure
  2    the command line is wrong, or names something that the checkpoint lacks
  3    nothing is there, it is not a checkpoint, or one of a version that this one does not read
  4    the checkpoint is corrupt: stored bytes differ from what was written, or its manifest is invalid
  5    the storage is full or out of reach, or wants other credentials
  6    what is to be written exists already; it was left as it is
  130  interrupted (Ctrl-C); it says what is left, if anything is
"""

_S3 = """\
CKPT, RUN and URL are local paths or URLs, such as s3://bucket/run. Where a checkpoint is wanted, a run stands
for its newest good one. Credentials and endpoint for s3:// come from where its other tools take them
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws, ...), or the endpoint from --endpoint-url.
"""

_COMMANDS = {
    "ls": "list a run's checkpoints, the newest last",
    "info": "show what is in a checkpoint: tensors and values",
    "verify": "check every chunk of a checkpoint against its checksum",
    "merge": "write a checkpoint as one .safetensors or .pt file",
    "reshard": "write a checkpoint again, as another number of ranks would have written it",
    "copy": "copy a checkpoint to another storage, verified on the way",
    "refs": "write refs.json, by which Zarr reads, anew after a run was moved or copied",
}


class UsageError(Exception):
    """The command line is wrong; the text says how."""


class _Parser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the process."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            **arguments,
        )
        self.add_argument("-h", "--help", action="help", help="show this and exit")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. {self.prog} --help shows what it takes")

    @property
    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `command`. Raises UsageError; SystemExit for --help and --version, after printing."""
    if not arguments or arguments[0].startswith("-"):
        top = _top()
        top.parse_known_args(arguments[:1])
        if arguments:
            raise UsageError(f"unknown option {arguments[0]}{_hint(arguments[0], top.options)}")
        top.print_help()
        raise SystemExit(2)
    command = arguments[0]
    if command not in _COMMANDS:
        known = f". The commands are {', '.join(_COMMANDS)}"
        raise UsageError(f"unknown command {command!r}{_hint(command, list(_COMMANDS)) or known}")
    parser = _parser(command)
    options, unknown = parser.parse_known_args(arguments[1:])
    if unknown:
        is_option = unknown[0].startswith("-")
        hint = _hint(unknown[0].partition("=")[0], parser.options) if is_option else ""
        what = "unknown option" if is_option else "one argument too many:"
        raise UsageError(
            f"{command}: {what} {unknown[0]}{hint or f'. {parser.prog} --help shows what it takes'}"
        )
    options.command = command
    return options


def _top() -> _Parser:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in _COMMANDS.items())
    parser = _Parser(
        prog="shardckpt",
        usage="shardckpt COMMAND ...",
        description=f"Look into sharded checkpoints, check, convert and copy them.\n\ncommands:\n{commands}",
        epilog=f"shardckpt COMMAND --help shows a command's options.\n\n{_S3}\n{_EXIT_CODES}",
    )
    parser.add_argument(
        "--version", action="version", version=f"shardckpt {__version__}", help="show the version"
    )
    return parser


def _parser(command: str) -> _Parser:
    parser = _Parser(prog=f"shardckpt {command}", epilog=f"{_S3}\n{_EXIT_CODES}")
    parser.description = _COMMANDS[command][0].upper() + _COMMANDS[command][1:] + "."
    add = parser.add_argument
    if command == "ls":
        parser.description += " The newest good one, which a restore takes, is marked *."
        add("url", metavar="RUN", help="a run, or one checkpoint")
    elif command == "refs":
        add("url", metavar="RUN", help="a run, or one checkpoint, where it is now")
    elif command in ("copy",):
        add("url", metavar="CKPT", help="a checkpoint or a run")
        add("out", metavar="URL", help="where it is to be; for a run, the run it becomes a part of")
    else:
        add("url", metavar="CKPT", help="a checkpoint or a run")
    if command == "info":
        add("--select", metavar="GLOB", action="append", default=[], help=_help_select("names"))
        add("--all", action="store_true", help="one row for each tensor, and every value")
    if command == "merge":
        _add_merge(parser)
    if command == "reshard":
        add("out", metavar="URL", help="the new checkpoint, where nothing is yet")
        add("--world-size", metavar="N", type=_positive, required=True, help="number of ranks")
    add("--json", action="store_true", help="print one JSON document; of an error too, as {'error': ...}")
    add("--follow-links", action="store_true", help="also read where links lead out of a local run")
    add("--endpoint-url", metavar="URL", help="address of the S3 server, if it is not Amazon's")
    return parser


def _add_merge(parser: _Parser) -> None:
    parser.description = """\
Write a checkpoint as one file, streamed: memory is bounded by the largest tensor.

OUT.safetensors  has tensors only, named as in the checkpoint (model/layers.0.weight). Tensors that share
                 memory are written once for each name, since the format cannot share.
OUT.pt           has the whole state as it was passed to save, {"model": {...}, "optimizer": {...}, ...}, for
                 torch.load(OUT, weights_only=True). PerRank values become lists by rank, NumPy arrays tensors.

To export a model's weights, so that model.load_state_dict takes them:

    shardckpt merge RUN weights.safetensors --only model"""
    add = parser.add_argument
    add("out", metavar="OUT", help="a local file that ends with .safetensors or .pt")
    add("--only", metavar="PATH", help="what lies at this path of the state becomes the whole: model")
    add("--select", metavar="GLOB", action="append", default=[], help=_help_select("names (below --only)"))
    add("--force", action="store_true", help="replace OUT if it exists")


def _help_select(names: str) -> str:
    return f"only what has {names} like GLOB: '*.weight'; can be given several times"


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return number


def _hint(given: str, known: Sequence[str]) -> str:
    """What the user may have meant. Dashes, which all options have, make none like another."""
    bare = {name.lstrip("-"): name for name in known}
    alike = difflib.get_close_matches(given.lstrip("-"), bare, n=1, cutoff=0.7)
    return f"; did you mean {bare[alike[0]]}?" if alike else ""
