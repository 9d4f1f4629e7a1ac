"""The events that a member sends to its agent, and how they end: with one failure, or with none."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.rendezvous.member.agent_link import AgentLink

__all__ = ["AgentEvents"]


class AgentEvents:
    """Sends events of the current join. At most one failure is sent, and nothing after it or after `end`.

    Methods may be called from any thread.
    """

    def __init__(self, link: AgentLink) -> None:
        self._link = link
        self._lock = threading.Lock()
        self.number = 0
        """The last join that the agent has ordered."""
        self.is_ended = False

    def joined(self, number: int, rank: int, hellos: Sequence[Mapping[str, Any]]) -> None:
        """This node is number `rank` of a generation."""
        self._send(event="joined", number=number, rank=rank, hellos=hellos)

    def message(self, number: int, node: int, message: Mapping[str, Any]) -> None:
        """Node `node` of the generation has sent a message."""
        self._send(event="heard", number=number, node=node, message=message)

    def news(self, text: str, **more: Any) -> None:
        """A line for the user; `more` are the fields of `MemberNews`."""
        self._send(event="news", number=self.number, text=text, **more)

    def failed(self, kind: str, reason: str, outcome: int | None = None) -> None:
        """This node is in no team any more, as in `MemberFailed`."""
        if self.end():
            self._link.send(event="failed", number=self.number, kind=kind, reason=reason, outcome=outcome)

    def end(self) -> bool:
        """Send no events from now on; return whether this is the first call."""
        with self._lock:
            was_ended, self.is_ended = self.is_ended, True
        return not was_ended

    def _send(self, **event: Any) -> None:
        with self._lock:
            if not self.is_ended:
                self._link.send(**event)
