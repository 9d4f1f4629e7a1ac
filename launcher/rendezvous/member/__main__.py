"""`python -m launcher.rendezvous.member FD`."""

from __future__ import annotations

import os
import signal
import sys

from launcher.rendezvous.client import RendezvousSettings

__all__ = ["main"]

_AGENT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(fd: int) -> None:
    """Carry out the orders of the agent at the other end of `fd`, and return when no node needs this process."""
    for signum in _AGENT_SIGNALS:  # the agent handles them
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _AGENT_SIGNALS)

    # torch warns whenever a wait takes long, and this process waits most of its time.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from launcher.rendezvous.member.agent_link import AgentLink
    from launcher.rendezvous.member.member import Member

    link = AgentLink(fd)
    orders = link.orders()
    settings = next(orders, None)
    if settings is None:
        return
    del settings["order"]
    member = Member(link, RendezvousSettings(**{**settings, "endpoint": tuple(settings["endpoint"])}))
    for order in orders:
        match order["order"]:
            case "join":
                member.join(order["number"], order["hello"])
            case "say":
                member.broadcast(order["number"], order["message"])
            case "leave":
                member.leave(order["outcome"])
                return
    member.abort()


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads may wait for a store forever
