"""The last words of a dead process: its traceback among all that it wrote, its exception in one line. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["DATALOADER_WORKER", "LastWords", "innermost_frames", "normalized", "read_last_words"]

DATALOADER_WORKER = r"DataLoader worker \(pid(?:\(s\))? (\d+)"
"""Pattern of torch's message about a DataLoader worker that has died; its group is the pid."""

_TAIL_LINES = 10
_TRACEBACK_LINES = 30
_MESSAGE_LINES = 5

# Patterns are compiled when they are used: most agents never need them, and all pay for their start.
_HEADER = "Traceback (most recent call last):"
_RANK_PREFIX = r"\[rank\d+\]: "  # torch writes it before each line of an uncaught exception
_GROUP_LINE = r" *[|+]([ -]|$)"
_EXCEPTION = (
    r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Warning|Group|Failure|Timeout|Iteration)\b(:|$)"
)
_CAUSED = "The above exception was the direct cause of the following exception:"
_FRAME = r'\s*(?:\|\s+)?File "(?P<file>[^"]+)", line (?P<line>\d+)(?:,? in (?P<name>.+))?'
_WRAPPERS = ("ChildFailedError", "ProcessExitedException", "CalledProcessError")
"""Exceptions that only say that another process failed: what that process wrote is more telling."""

_CHATTER = (
    r"^(\[rank\d+\]:)?\[W\d{4,} |has NOT been destroyed|resource_tracker|warnings\.warn\(|\.py:\d+: \w*Warning:"
    r"|^Exception ignored in|^={5,}$|^-{5,}$|To enable traceback see"
)
_FATAL = r"^(Fatal Python error: .+)"
_WHAT = r"^\s*what\(\):\s+(.+)"


@dataclass(frozen=True, slots=True)
class LastWords:
    """What a failed process wrote last."""

    lines: tuple[str, ...] = ()  # its traceback, or else its last lines
    has_traceback: bool = False
    error: str | None = None  # the exception in one line


def read_last_words(lines: Sequence[str], *, was_killed: bool = False) -> LastWords:
    """The traceback that a process ended with, or else its last lines.

    Args:
        lines: what it wrote.
        was_killed: True if a signal ended it. It may have written tracebacks of errors that it had handled, so
            only one at the very end counts, or one that torch has marked as uncaught.
    """
    own, rest = _uncaught_by_torch(lines)
    found = _tracebacks(own, has_end=own is not lines)
    telling = [one for one in found if not _is_wrapper(one.error)] or found
    is_uncaught = own is not lines
    if telling and (is_uncaught or not was_killed or not _says_more([*own[telling[-1].end :], *rest])):
        last = telling[-1]
        cause = _first_cause(own, found, last)
        error = f"{last.error} (from {cause})" if cause else last.error
        return LastWords(tuple(last.lines[-_TRACEBACK_LINES:]), True, error)
    return _without_traceback(lines)


def _uncaught_by_torch(lines: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The lines of an uncaught exception, which torch marks with the rank, and the lines after them.

    Without such an exception, all lines, and none.
    """
    for line in lines:
        if (marked := re.match(_RANK_PREFIX, line)) and line.endswith(_HEADER):
            numbers = [number for number, line in enumerate(lines) if line.startswith(marked[0])]
            return [lines[number].removeprefix(marked[0]) for number in numbers], lines[numbers[-1] + 1 :]
    return lines, ()


@dataclass(frozen=True, slots=True)
class _Traceback:
    start: int
    end: int  # behind its last line
    lines: list[str]
    error: str


def _tracebacks(lines: Sequence[str], *, has_end: bool) -> list[_Traceback]:
    """All tracebacks in order of appearance; an exception group is one of them.

    With `has_end`, the message of the last one goes on up to the last line.
    """
    found: list[_Traceback] = []
    number = 0
    while number < len(lines):
        # A progress bar, for one, leaves its last state on the same line.
        head, header, _ = lines[number].partition(_HEADER)
        if header and lines[number + 1 : number + 2] and lines[number + 1].startswith("  "):
            is_group = head.endswith("Exception Group ")
            found.append((_read_group if is_group else _read_traceback)(lines, number))
            number = found[-1].end
        else:
            number += 1
    if has_end and found:
        last = found.pop()
        message = lines[last.end :][:_MESSAGE_LINES]
        found.append(replace(last, end=len(lines), lines=[*last.lines, *message]))
    return found or _syntax_error(lines)


def _read_traceback(lines: Sequence[str], start: int) -> _Traceback:
    """The traceback up to the first line of its exception: nothing marks the end of the message."""
    for end in range(start + 1, len(lines)):
        if lines[end] and not lines[end][0].isspace():
            break
    else:
        end = len(lines) - 1  # the process could not finish it
    return _Traceback(start, end + 1, [_HEADER, *lines[start + 1 : end + 1]], lines[end].strip())


def _read_group(lines: Sequence[str], start: int) -> _Traceback:
    end = start + 1
    while end < len(lines) and re.match(_GROUP_LINE, lines[end]):
        end += 1
        if lines[end - 1].strip().startswith("+-") and lines[end - 1].strip("+- ") == "":
            break
    block = list(lines[start:end])
    texts = (line.strip().lstrip("|").strip() for line in block[1:])
    error = next((text for text in texts if re.match(_EXCEPTION, text)), "ExceptionGroup")
    return _Traceback(start, end, block, error)


def _syntax_error(lines: Sequence[str]) -> list[_Traceback]:
    """A script that Python cannot compile is shown without a header; one that it cannot decode, in one line."""
    said = [number for number, line in enumerate(lines) if line.strip()]
    last = said[-1] if said else 0
    if said and re.match(r"(Syntax|Indentation|Tab)Error: ", lines[last]):
        for start in range(last, max(-1, last - 6), -1):
            if re.match(_FRAME, lines[start]):
                return [_Traceback(start, last + 1, list(lines[start : last + 1]), lines[last])]
        return [_Traceback(last, last + 1, [lines[last]], lines[last])]
    return []


def _first_cause(lines: Sequence[str], found: Sequence[_Traceback], last: _Traceback) -> str | None:
    """The first exception in the chain of causes that `last` was raised from; None if it has no cause."""
    cause = None
    number = found.index(last)
    while number > 0 and _CAUSED in lines[found[number - 1].end : found[number].start]:
        number -= 1
        cause = found[number].error
    return cause


def _is_wrapper(error: str) -> bool:
    return error.partition(":")[0].rpartition(".")[2] in _WRAPPERS


def _says_more(lines: Sequence[str]) -> bool:
    """True if `lines` have anything but the chatter of libraries."""
    return any(line.strip() and not re.search(_CHATTER, line) for line in lines)


def _without_traceback(lines: Sequence[str]) -> LastWords:
    said = [line for line in lines if line.strip()]
    said = [line for line in said if not re.search(_CHATTER, line)] or said
    for pattern in (_FATAL, _WHAT):
        for start, line in enumerate(said):
            if match := re.search(pattern, line):
                return LastWords(tuple(said[start:][:_TRACEBACK_LINES]), False, match[1].strip())
    last = re.sub(_RANK_PREFIX, "", said[-1]) if said else ""
    error = last if re.match(_EXCEPTION, last) else None
    return LastWords(tuple(said[-_TAIL_LINES:]), False, error)


def innermost_frames(lines: Sequence[str], count: int) -> list[str]:
    """The last `count` frames of a traceback, each as `train.py:88 in load_batch`."""
    frames = [match for line in lines if (match := re.match(_FRAME, line))]
    return [f"{f['file'].rpartition('/')[2]}:{f['line']} in {f['name'] or '?'}" for f in frames[-count:]]


def normalized(text: str) -> str:
    """`text` without what differs between two occurrences of one error: addresses, numbers, directories."""
    text = re.sub(r"0x[0-9a-fA-F]+|\b[0-9a-f]{12,}\b", "#", text)
    text = re.sub(r"(?<![\w/])~?/(?:[\w.@+-]+/)*", "", text)
    return re.sub(r"\d+(\.\d+)*", "#", text)
