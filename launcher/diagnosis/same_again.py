"""Whether a round that failed at its start would fail alike if it were started again. Pure.

What is in the script or the command fails each time: a syntax error, a module that is not installed, a URL
of no storage. What comes from outside
may not: a device, a connection, a file that a network file system does not show yet. When in doubt there is
another try.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.diagnosis.reports import Death
from launcher.diagnosis.tracebacks import normalized

__all__ = ["would_fail_again"]

_START = (
    60.0  # seconds of a round in which other errors than those of the code count as errors at its start
)
_OF_CODE = (
    "SyntaxError",
    "IndentationError",
    "TabError",
    "ModuleNotFoundError",
    "ImportError",
    "NameError",
    "shardckpt.errors.InvalidUrlError",
)
"""Errors that no rank is spared, even if others were stopped before they got there."""

_OF_VALUES = (
    *(
        "UnboundLocalError",
        "AttributeError",
        "TypeError",
        "ValueError",
        "KeyError",
        "IndexError",
        "LookupError",
    ),
    *("AssertionError", "ZeroDivisionError", "NotImplementedError", "RecursionError", "UnicodeDecodeError"),
)
"""Errors that may be of one rank alone, and count only if all ranks have failed of the same."""

_FROM_OUTSIDE = (
    r"\b\w*(OSError|IOError|FileNotFoundError|PermissionError|TimeoutError|Connection\w*|HTTPError|URLError|"
    r"DistStoreError|DistNetworkError|DistBackendError|MemoryError|JSONDecodeError)\b|\[Errno|shared object file|"
    r"Stale file handle|out of memory|timed? ?out|CUDA|cuda|NCCL|nccl|"
    r"/(socket|ssl|urllib|http|requests|urllib3)\b"
)
"""In a traceback: something that may be another time not as it was now."""

_USAGE_CODE = 2  # of argparse and its like
_USAGE = r"[\w./-]+: error: |Error: (No such option|Missing|Invalid value|Got unexpected)"


def would_fail_again(deaths: Sequence[Death], world: int, seconds: float) -> bool:
    """Whether all ranks of a round failed of the same, in their own code, before they had joined the others.

    `deaths` are those of all its nodes, in order of death; `world` is how many ranks it had. The first one
    failed `seconds` after the start.
    """
    # launch's SIGTERM may have met a rank that had raised, on its way out.
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
    return len(own) == world and seconds <= _START and all(_is_one_of(death, _OF_VALUES) for death in own)


def _is_one_of(death: Death, names: Sequence[str]) -> bool:
    return (
        death.failure_code == 1 and death.has_traceback and (death.error or "").partition(":")[0] in names
    )


def _is_usage(death: Death) -> bool:
    """Whether the script did not understand its arguments."""
    return death.code == _USAGE_CODE and bool(death.lines) and re.match(_USAGE, death.lines[-1]) is not None
