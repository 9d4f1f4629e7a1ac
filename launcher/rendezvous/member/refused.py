"""Why this node is in no team, as the agent is told."""

from __future__ import annotations

__all__ = ["Refused"]


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """This node cannot join, or is in no team any more; all as in `launcher.events.MemberFailed`."""

    def __init__(self, kind: str, reason: str, outcome: int | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.outcome = outcome
