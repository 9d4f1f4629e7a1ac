"""Recognizes a round that failed at its start and would fail in the same way again. Pure.

An error in the script or the command is there each time: a syntax error, a module that is not installed, a URL
of no storage. An error from outside may pass: a device, a connection, a file that a network file system does not
show yet. In doubt there is another try.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.diagnosis.reports import Death
from launcher.diagnosis.tracebacks import normalized

__all__ = ["would_fail_again"]

_START_SECONDS = 60.0  # of a round in which errors of values count as errors at its start
_OF_CODE = (
    "SyntaxError",
    "IndentationError",
    "TabError",
    "ModuleNotFoundError",
    "ImportError",
    "NameError",
    "shardckpt.errors.InvalidUrlError",
)
"""Errors that every rank would meet, even if others were stopped before they came to it."""

_OF_VALUES = (
    "UnboundLocalError",
    "AttributeError",
    "TypeError",
    "ValueError",
    "KeyError",
    "IndexError",
    "LookupError",
    "AssertionError",
    "ZeroDivisionError",
    "NotImplementedError",
    "RecursionError",
    "UnicodeDecodeError",
)
"""Errors that one rank alone may meet: they count only if all ranks have failed of the same one."""

_FROM_OUTSIDE = (
    r"\b\w*(OSError|IOError|FileNotFoundError|PermissionError|TimeoutError|Connection\w*|HTTPError|URLError|"
    r"DistStoreError|DistNetworkError|DistBackendError|MemoryError|JSONDecodeError)\b|\[Errno|shared object file|"
    r"Stale file handle|out of memory|timed? ?out|CUDA|cuda|NCCL|nccl|"
    r"/(socket|ssl|urllib|http|requests|urllib3)\b"
)
"""In a traceback: signs of an error from outside, which may pass."""

_USAGE_CODE = 2  # of argparse and its like
_USAGE = r"[\w./-]+: error: |Error: (No such option|Missing|Invalid value|Got unexpected)"


def would_fail_again(deaths: Sequence[Death], world: int, seconds: float) -> bool:
    """True if all ranks of a round failed of the same error of their own, before they had joined the others.

    Args:
        deaths: of all nodes, in order of death.
        world: number of ranks of the round.
        seconds: from its start to its first failure.
    """
    # A rank that had raised may have been signalled by launch on its way out.
    own = [death for death in deaths if not death.is_ours or death.has_traceback]
    if not own or any(death.has_joined or death.step is not None or death.kill for death in deaths):
        return False
    kinds = {(death.failure_code, normalized(death.error or " ".join(death.lines[-1:]))) for death in own}
    if len(kinds) != 1:
        return False
    is_of_code = all(_is_one_of(death, _OF_CODE) or _is_usage(death) for death in own)
    if any(re.search(_FROM_OUTSIDE, "\n".join((death.error or "", *death.lines))) for death in own):
        return False
    if is_of_code:
        return len(deaths) == world
    return (
        len(own) == world
        and seconds <= _START_SECONDS
        and all(_is_one_of(death, _OF_VALUES) for death in own)
    )


def _is_one_of(death: Death, names: Sequence[str]) -> bool:
    return (
        death.failure_code == 1 and death.has_traceback and (death.error or "").partition(":")[0] in names
    )


def _is_usage(death: Death) -> bool:
    """True if the script refused its arguments."""
    return death.code == _USAGE_CODE and bool(death.lines) and re.match(_USAGE, death.lines[-1]) is not None
