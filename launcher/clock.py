"""The time of day, which steps of the system's clock do not change once this process has started.

So differences are durations, also between processes of one host that share `ANCHOR`.
"""

from __future__ import annotations

import time

__all__ = ["ANCHOR", "now"]

ANCHOR = time.time() - time.monotonic()
"""What to add to this host's monotonic clock for the time since the epoch, in seconds."""


def now() -> float:
    """Seconds since the epoch."""
    return ANCHOR + time.monotonic()
