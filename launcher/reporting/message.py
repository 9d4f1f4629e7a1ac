"""One message of the launcher to its user: lines, how much it matters, and its style on a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Level", "Message", "Style", "detail", "error", "headline", "warning"]


class Level(IntEnum):
    """How much a message matters. Verdicts are errors."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


class Style(IntEnum):
    """ANSI styles."""

    PLAIN = 0
    BOLD = 1
    DIM = 2
    RED = 31
    YELLOW = 33


@dataclass(frozen=True, slots=True)
class Message:
    """Lines that are printed together; the style is the first line's."""

    lines: tuple[str, ...]
    style: Style = Style.PLAIN
    level: Level = Level.INFO


def headline(*lines: str) -> Message:
    """What happens to the whole job."""
    return Message(lines, Style.BOLD)


def detail(*lines: str, level: Level = Level.INFO) -> Message:
    """What can be passed over."""
    return Message(lines, Style.DIM, level)


def warning(*lines: str) -> Message:
    """What the user may want to change."""
    return Message(lines, Style.YELLOW, Level.WARNING)


def error(*lines: str) -> Message:
    """What has failed."""
    return Message(lines, Style.RED, Level.ERROR)
