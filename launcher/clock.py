"""The time of day as this process reckons it from its start on: steps of the system's clock do not change it.

So differences are durations, also between processes of one host that share `ANCHOR`.
"""

from __future__ import annotations

import time

__all__ = ["ANCHOR", "now"]

ANCHOR = time.time() - time.monotonic()
"""Seconds since the epoch at which the monotonic clock of this host would have begun."""


def now() -> float:
    """Seconds since the epoch."""
    return ANCHOR + time.monotonic()
