"""The refusals that several backends have in common, in words for the user."""

from __future__ import annotations

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.endpoint import format_endpoint
from launcher.rendezvous.member.refused import Refused

__all__ = ["first_line", "not_a_store", "too_few_nodes", "unavailable"]


def unavailable(settings: RendezvousSettings, what: str, advice: str) -> Refused:
    """There is no rendezvous at the endpoint.

    Args:
        settings: this node's rendezvous.
        what: what was found at the endpoint instead.
        advice: what to do, for a node that has never met the others there.
    """
    if settings.has_met:
        again = "start the job again, it goes on from its checkpoints"
        advice = f"{settings.server} is gone, frozen or cut off; {again}"
    return Refused("unavailable", f"{what}: {advice}")


def not_a_store(settings: RendezvousSettings) -> Refused:
    """A process that listens at the endpoint does not answer as a store."""
    where = format_endpoint(settings.endpoint)
    return unavailable(
        settings,
        f"what listens at {where} does not answer as the store of a rendezvous would",
        "it is frozen, or another program has that port and --rdzv-endpoint needs another one",
    )


def too_few_nodes(settings: RendezvousSettings, came: int | None, seconds: float) -> Refused:
    """Fewer than `min_nodes` nodes came within `seconds`; `came` is their number, None if unknown."""
    found = "fewer than" if came is None else f"{came} of at least"
    nodes = "node" if settings.min_nodes == 1 else "nodes"
    return Refused("quorum", f"{found} {settings.min_nodes} {nodes} came within {seconds:g} s")


def first_line(error: BaseException) -> str:
    """Class and first line of an error of torch's, whose messages are long."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
