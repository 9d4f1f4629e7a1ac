"""Connecting to the store at the endpoint, or serving it from here; what is wrong if neither works."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch.distributed.elastic.rendezvous import (
    RendezvousParameters,
)

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.endpoint import is_here, listening_address, reach, show
from launcher.rendezvous.member.protocol import Tell
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.seal import open_seal
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.stores import (
    PortTakenError,
    TCPStore,
    connect,
    serve,
)

__all__ = [
    "bounded",
    "connect_store",
    "first_line",
    "join_patience",
    "node_name",
    "not_a_store",
    "parameters_of",
    "reach_endpoint",
    "seconds_of",
    "settings_of",
    "too_few",
]


_HANDSHAKE = 10.0  # seconds at most, for what listens at the endpoint to show that it is a store


_DEFAULTS = {
    "join_timeout": "600",
    "last_call_timeout": "2",  # who comes later is taken in at a step boundary
    "keep_alive_interval": "1",
    "keep_alive_max_attempt": "30",  # by the clocks of several hosts, which need not agree better than that
    "read_timeout": "60",
}


_Value = TypeVar("_Value")


def bounded(seconds: float, call: Callable[[], _Value]) -> _Value:
    """What `call` returns or raises; TimeoutError if it takes more than `seconds`, and it is left behind."""
    outcome: list[tuple[_Value | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # handed to whoever waits
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def join_patience(settings: RendezvousSettings) -> float:
    """How many seconds to wait for the other nodes."""
    try:
        return seconds_of(settings_of(settings), "join_timeout")
    except ValueError as error:
        raise Refused("usage", f"--rdzv-conf cannot be used: {error}") from None


def settings_of(settings: RendezvousSettings) -> Mapping[str, str]:
    given = {key: value for key, value in settings.conf.items() if key != "secret"}
    if "timeout" in given:  # the one that the static and the old etcd rendezvous have
        given.setdefault("join_timeout", given["timeout"])
    return {**_DEFAULTS, **given}


def parameters_of(settings: RendezvousSettings, conf: Mapping[str, str], addr: str) -> RendezvousParameters:
    return RendezvousParameters(
        backend=settings.backend,
        endpoint=show(settings.endpoint),
        run_id=settings.run_id,
        min_nodes=settings.min_nodes,
        max_nodes=settings.max_nodes,
        local_addr=node_name(addr),
        **conf,
    )


def node_name(addr: str) -> str:
    """What torch knows this node by. It numbers nodes in the order of these: by host, as under torchrun."""
    return f"{socket.gethostname()}/{addr}"


def connect_store(
    settings: RendezvousSettings, conf: Mapping[str, str], signer: Signer, tell: Tell
) -> tuple[TCPStore, Signer, bool]:
    """A connection to the store at the endpoint, and what signs for the job there.

    Also, whether this process serves it, which it does if it is the first there.
    """
    host, port = settings.endpoint
    wants_to_host = parameters_of(settings, conf, "").get_as_bool("is_host")
    if wants_to_host is None:
        wants_to_host = is_here(settings.endpoint)
    if wants_to_host:
        try:
            store = serve(host, listening_address(settings.endpoint, settings.local_addr), port)
            return store, open_seal(store, settings, signer, is_host=True, is_first=True), True
        except PortTakenError:
            pass  # another process of this machine has the port; it should be one like this
        except OSError as error:
            why = f"{show(settings.endpoint)} cannot be served from here: {error.strerror}"
            raise Refused("usage", f"{why}: correct --rdzv-endpoint") from None
    reach_endpoint(settings, conf, tell)
    seconds = min(_patience(conf), _HANDSHAKE)

    def shake_hands() -> tuple[TCPStore, Signer, bool]:
        store = connect(host, port, seconds)
        return store, open_seal(store, settings, signer, is_host=False, is_first=bool(wants_to_host)), False

    try:
        return bounded(seconds, shake_hands)
    except (RuntimeError, TimeoutError):
        raise not_a_store(settings) from None


def reach_endpoint(settings: RendezvousSettings, conf: Mapping[str, str], tell: Tell) -> None:
    """Wait until somebody accepts connections at the endpoint; raises `Refused` if nobody does in time."""
    try:
        reach(settings.endpoint, _patience(conf), tell)
    except TimeoutError as error:
        raise _unavailable(settings, str(error), "start the first node, or check --rdzv-endpoint") from None


def _patience(conf: Mapping[str, str]) -> float:
    """How many seconds to wait for somebody at the endpoint."""
    return min(seconds_of(conf, "read_timeout"), seconds_of(conf, "join_timeout"))


def seconds_of(conf: Mapping[str, str], key: str) -> float:
    try:
        return float(conf[key])
    except ValueError:
        raise ValueError(f"{key}: expected seconds, found {conf[key]}") from None


def _unavailable(settings: RendezvousSettings, what: str, advice: str) -> Refused:
    """There is `what` instead of a rendezvous; `advice` is for a node that has not seen it there before."""
    if settings.has_met:
        again = "start the job again, it goes on from its checkpoints"
        advice = f"{settings.server} is gone, frozen or cut off; {again}"
    return Refused("unavailable", f"{what}: {advice}")


def not_a_store(settings: RendezvousSettings) -> Refused:
    return _unavailable(
        settings,
        f"what listens at {show(settings.endpoint)} does not answer as the store of a rendezvous would",
        "it is frozen, or another program has that port and --rdzv-endpoint needs another one",
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def too_few(settings: RendezvousSettings, came: int | None, seconds: float) -> Refused:
    found = "fewer than" if came is None else f"{came} of at least"
    nodes = "node" if settings.min_nodes == 1 else "nodes"
    return Refused("quorum", f"{found} {settings.min_nodes} {nodes} came within {seconds:g} s")
