"""The reason for which a node is in no team, as its agent receives it."""

from __future__ import annotations

__all__ = ["Refused"]


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """This node cannot join, or is in no team any more.

    Args:
        kind, reason, outcome: as in `launcher.events.MemberFailed`.
    """

    def __init__(self, kind: str, reason: str, outcome: int | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.outcome = outcome
