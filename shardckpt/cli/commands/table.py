"""The commands, by name. A module is imported when its command is used."""

from __future__ import annotations

import argparse
import importlib
from typing import Protocol, cast

__all__ = ["NAMES", "Command", "load_command"]

NAMES = ("ls", "info", "verify", "merge", "reshard", "copy", "refs")
"""Each is a module of this folder, in the order of the help."""


class Command(Protocol):
    """What the module of a command has."""

    SUMMARY: str
    """What it does, in one line for the list of commands: lower case, without a full stop."""
    DETAILS: str
    """More about it, for its own help; may be empty."""
    JSON_FIELDS: str
    """The fields of its JSON document, one a line."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments. --json, --follow-links and --endpoint-url are added for all."""

    def run(self, options: argparse.Namespace) -> int:
        """Carry it out and print the result.

        Returns the exit code. Raises ShardckptError, UsageError, OSError.
        """


def load_command(name: str) -> Command:
    """The module of the command `name`, one of `NAMES`."""
    return cast(Command, importlib.import_module(f"shardckpt.cli.commands.{name}"))
