"""The connection to the store at the endpoint, which this process serves itself if it is the first there."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.authentication import authenticate_store
from launcher.rendezvous.member.bounded_call import call_within
from launcher.rendezvous.member.conf import conf_seconds, conf_with_defaults, torch_parameters
from launcher.rendezvous.member.endpoint import (
    format_endpoint,
    is_this_machine,
    listening_address,
    wait_until_reachable,
)
from launcher.rendezvous.member.protocol import Notify
from launcher.rendezvous.member.refusals import not_a_store, unavailable
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.stores import PortTakenError, TCPStore, connect, serve

__all__ = ["connect_store", "wait_for_endpoint"]

_HANDSHAKE_TIMEOUT = 10.0  # seconds, at most, for the process at the endpoint to answer as a store


def connect_store(
    settings: RendezvousSettings, signer: Signer, notify: Notify
) -> tuple[TCPStore, Signer, bool]:
    """Connect to the store at the endpoint, or serve it from here.

    Args:
        settings: this node's rendezvous.
        signer: signs for the job, in any store.
        notify: called with a line for the user if the endpoint does not answer for seconds.

    Returns:
        the store, a signer for the job in this store, and whether this process serves it.

    Raises:
        Refused: nothing answers, another program does, or the secret differs.
        ValueError: a key of --rdzv-conf has a wrong value.
    """
    host, port = settings.endpoint
    conf = conf_with_defaults(settings)
    may_serve = torch_parameters(settings, "").get_as_bool("is_host")
    if may_serve is None:
        may_serve = is_this_machine(settings.endpoint)
    if may_serve:
        try:
            store = serve(host, listening_address(settings.endpoint, settings.local_addr), port)
            return store, authenticate_store(store, settings, signer, is_host=True, is_first=True), True
        except PortTakenError:
            pass  # by another member on this machine, presumably
        except OSError as error:
            why = f"{format_endpoint(settings.endpoint)} cannot be served from here: {error.strerror}"
            raise Refused("usage", f"{why}: correct --rdzv-endpoint") from None
    wait_for_endpoint(settings, notify)
    seconds = min(_read_timeout(conf), _HANDSHAKE_TIMEOUT)

    def shake_hands() -> tuple[TCPStore, Signer, bool]:
        store = connect(host, port, seconds)
        first = bool(may_serve)
        return store, authenticate_store(store, settings, signer, is_host=False, is_first=first), False

    try:
        return call_within(seconds, shake_hands)
    except (RuntimeError, TimeoutError):
        raise not_a_store(settings) from None


def wait_for_endpoint(settings: RendezvousSettings, notify: Notify) -> None:
    """Wait until the endpoint accepts connections. Raises `Refused` after the read timeout of --rdzv-conf."""
    try:
        wait_until_reachable(settings.endpoint, _read_timeout(conf_with_defaults(settings)), notify)
    except TimeoutError as error:
        raise unavailable(settings, str(error), "start the first node, or check --rdzv-endpoint") from None


def _read_timeout(conf: Mapping[str, str]) -> float:
    """Seconds to wait for an answer at the endpoint."""
    return min(conf_seconds(conf, "read_timeout"), conf_seconds(conf, "join_timeout"))
