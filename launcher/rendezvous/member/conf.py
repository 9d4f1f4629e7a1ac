"""--rdzv-conf with this launcher's defaults, and torch's parameters made from it."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from torch.distributed.elastic.rendezvous import RendezvousParameters

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.endpoint import format_endpoint
from launcher.rendezvous.member.refused import Refused

__all__ = ["conf_seconds", "conf_with_defaults", "join_timeout", "node_name", "torch_parameters"]

_DEFAULTS = {
    "join_timeout": "600",
    "last_call_timeout": "2",  # later nodes are taken in at a step boundary
    "keep_alive_interval": "1",
    "keep_alive_max_attempt": "30",  # by the clocks of several hosts, which may differ by seconds
    "read_timeout": "60",
}


def conf_with_defaults(settings: RendezvousSettings) -> Mapping[str, str]:
    """The keys for torch: the user's without the secret, and defaults for the rest."""
    given = {key: value for key, value in settings.conf.items() if key != "secret"}
    if "timeout" in given:  # what the static and the old etcd rendezvous call it
        given.setdefault("join_timeout", given["timeout"])
    return {**_DEFAULTS, **given}


def conf_seconds(conf: Mapping[str, str], key: str) -> float:
    """The value of `key` in seconds. Raises ValueError if it is no number."""
    try:
        return float(conf[key])
    except ValueError:
        raise ValueError(f"{key}: expected seconds, found {conf[key]}") from None


def join_timeout(settings: RendezvousSettings) -> float:
    """Seconds to wait for the other nodes. Raises `Refused` if --rdzv-conf has no number there."""
    try:
        return conf_seconds(conf_with_defaults(settings), "join_timeout")
    except ValueError as error:
        raise Refused("usage", f"--rdzv-conf cannot be used: {error}") from None


def torch_parameters(settings: RendezvousSettings, addr: str) -> RendezvousParameters:
    """What torch's handlers are made from; `addr` is the address at which other nodes reach this one."""
    return RendezvousParameters(
        backend=settings.backend,
        endpoint=format_endpoint(settings.endpoint),
        run_id=settings.run_id,
        min_nodes=settings.min_nodes,
        max_nodes=settings.max_nodes,
        local_addr=node_name(addr),
        **conf_with_defaults(settings),
    )


def node_name(addr: str) -> str:
    """This node's name for torch, which numbers nodes in the order of their names: by host, as torchrun does."""
    return f"{socket.gethostname()}/{addr}"
