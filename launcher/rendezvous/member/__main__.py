"""`python -m launcher.rendezvous.member FD`."""

from __future__ import annotations

import os
import signal
import sys

from launcher.rendezvous.client import RendezvousSettings

__all__ = ["main"]

_AGENTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(fd: int) -> None:
    """Obey the agent at the other end of `fd`, and end this process when nobody needs it any more."""
    for signum in _AGENTS:  # are the agent's business
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _AGENTS)

    # It warns whenever a wait takes long, and waiting is what this process does.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from launcher.rendezvous.member.agent_link import Link
    from launcher.rendezvous.member.member import Member

    link = Link(fd)
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
                member.say(order["number"], order["message"])
            case "leave":
                member.leave(order["outcome"])
                return
    member.abort()


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads may wait for a store for ever
