"""What is logged of saves that fail."""

from __future__ import annotations

import logging
import re

from shardckpt.environment import is_first_on_node

__all__ = ["FailureLog"]

_log = logging.getLogger("shardckpt")


class FailureLog:
    """Logs why saves fail, on one rank of each node: in full where a tier has a new reason, else briefly."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def tell(self, step: int, tier: str, error: BaseException) -> None:
        """Log that the save of `step` has failed in a tier."""
        if not is_first_on_node():
            return
        reason = re.sub(r"\d+", "#", str(error))  # steps, ranks and free bytes differ
        is_known = self._reasons.get(tier) == reason
        self._reasons[tier] = reason
        _log.error("step %d is not saved (%s): %s", step, tier, "the same" if is_known else error)
