"""The command line: from arguments to a command and its options, with suggestions for what is misspelt."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from shardckpt.cli.commands.table import NAMES, Command, load_command
from shardckpt.cli.exit_codes import EXIT_CODES, UsageError
from shardckpt.version import __version__

__all__ = ["full_parser", "parse"]

_URLS = """\
CKPT, RUN and URL are local paths or URLs, such as s3://bucket/run. Where a
checkpoint is wanted, a run stands for its newest good one. Credentials and
endpoint for s3:// come from where other S3 tools take them
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws, ...);
--endpoint-url overrides the endpoint.
"""

_JSON = """\
Every command takes --json: it prints one JSON document, of which the
command's --help names the fields. After an error the document is
{"error": {"type", "message", "exit_code"}}.
"""

_COMPLETION = "--print-completion"
_SHELLS = ("bash", "zsh", "fish")


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


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command and its options.

    Raises UsageError; SystemExit for --help, --version and --print-completion, after printing.
    """
    if not arguments or arguments[0].startswith("-"):
        _parse_top(arguments)
    name = arguments[0]
    if name not in NAMES:
        known = f". The commands are {', '.join(NAMES)}"
        raise UsageError(f"unknown command {name!r}{_suggestion(name, NAMES) or known}")
    command = load_command(name)
    parser = _command_parser(name, command)
    options, unknown = parser.parse_known_args(arguments[1:])
    if unknown:
        is_option = unknown[0].startswith("-")
        hint = _suggestion(unknown[0].partition("=")[0], parser.options) if is_option else ""
        what = "unknown option" if is_option else "one argument too many:"
        raise UsageError(
            f"{name}: {what} {unknown[0]}{hint or f'. {parser.prog} --help shows what it takes'}"
        )
    return command, options


def full_parser() -> argparse.ArgumentParser:
    """One parser with a subparser for each command: the shape that completion generators read."""
    parser = _top_parser()
    subparsers = parser.add_subparsers(parser_class=_Parser)
    for name in NAMES:
        _fill(subparsers.add_parser(name, help=load_command(name).SUMMARY), load_command(name))
    return parser


def _parse_top(arguments: Sequence[str]) -> NoReturn:
    """Options before, or in place of, a command."""
    parser = _top_parser()
    options, unknown = parser.parse_known_args(arguments[:2])
    if options.shell:
        from shardckpt.cli.completion import completion_script

        print(completion_script(full_parser(), options.shell))
        raise SystemExit(0)
    if unknown:
        raise UsageError(f"unknown option {arguments[0]}{_suggestion(arguments[0], parser.options)}")
    parser.print_help()
    raise SystemExit(2)


def _top_parser() -> _Parser:
    width = max(map(len, NAMES))
    commands = "\n".join(f"  {name:<{width}}  {load_command(name).SUMMARY}" for name in NAMES)
    parser = _Parser(
        prog="shardckpt",
        usage="shardckpt COMMAND ...",
        description=f"List, inspect, verify, export and copy sharded checkpoints.\n\ncommands:\n{commands}",
        epilog=f"shardckpt COMMAND --help shows a command's options.\n\n{_URLS}\n{_JSON}\n{EXIT_CODES}",
    )
    parser.add_argument(
        "--version", action="version", version=f"shardckpt {__version__}", help="show the version"
    )
    parser.add_argument(
        _COMPLETION,
        dest="shell",
        choices=_SHELLS,
        help="print a completion script for this shell (needs shardckpt[completion])",
    )
    return parser


def _command_parser(name: str, command: Command) -> _Parser:
    parser = _Parser(prog=f"shardckpt {name}")
    _fill(parser, command)
    return parser


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    summary = command.SUMMARY[0].upper() + command.SUMMARY[1:] + "."
    parser.description = f"{summary}\n\n{command.DETAILS}".rstrip()
    parser.epilog = (
        f"fields of --json:\n{command.JSON_FIELDS}\nURLs, credentials and exit codes: shardckpt --help"
    )
    command.add_arguments(parser)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON document, also of an error")
    add("--follow-links", action="store_true", help="also read where links lead out of a local run")
    add("--endpoint-url", metavar="URL", help="address of the S3 server, if it is not Amazon's")


def _suggestion(given: str, known: Sequence[str]) -> str:
    """The known name that is spelt like `given`, as the end of a message. Leading dashes do not count."""
    bare = {name.lstrip("-"): name for name in known}
    alike = difflib.get_close_matches(given.lstrip("-"), bare, n=1, cutoff=0.7)
    return f"; did you mean {bare[alike[0]]}?" if alike else ""
