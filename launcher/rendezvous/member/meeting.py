"""Where the nodes of a job meet: torch's elastic rendezvous, or the ranks that a scheduler gave them.

torch's part, for the backends "c10d", "etcd-v2" and those of its registry, is to agree on who is in the
next generation. What is said in one goes through a `TCPStore`: that of the c10d backend, which lives at the
endpoint, or else one that node 0 of the generation serves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, create_handler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.connect import (
    connect_store,
    first_line,
    not_a_store,
    parameters_of,
    reach_endpoint,
    seconds_of,
    settings_of,
)
from launcher.rendezvous.member.elastic import Elastic
from launcher.rendezvous.member.endpoint import resolve
from launcher.rendezvous.member.gate import Gate, StoreBackend
from launcher.rendezvous.member.protocol import Meeting, Tell
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.static import Fixed
from launcher.rendezvous.member.stores import (
    SignedStore,
    Store,
)

__all__ = ["meet", "meet_through"]


# Workers have a store of their own. With torch's shared one, the address of the first generation's is remembered
# and not told in later ones: a node that comes then waits for it in vain (2.13).
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def meet(settings: RendezvousSettings, addr: str, tell: Tell, suspect: Tell) -> Meeting:
    """Connect to the rendezvous, or begin to serve its store if the endpoint is this machine.

    Raises `Refused`. `tell` is called with lines for the user, meanwhile, and `suspect` at any time with what
    is found in a store that no node of this job has written.
    """
    try:
        return _meet(settings, settings_of(settings), addr, tell, suspect)
    except ValueError as error:
        raise Refused("usage", f"--rdzv-conf cannot be used: {error}") from None


def _meet(
    settings: RendezvousSettings, conf: Mapping[str, str], addr: str, tell: Tell, suspect: Tell
) -> Meeting:
    signer = Signer(settings.secret_key, settings.run_id, suspect=suspect)
    if settings.backend in ("c10d", "static"):
        store, signer, is_host = connect_store(settings, conf, signer, tell)
        own = SignedStore(store, signer, f"launch.{settings.run_id}/")
        if settings.backend == "static":
            return Fixed(settings, seconds_of(conf, "join_timeout"), own, is_host)
        gate = Gate(StoreBackend(store, f"launch.{settings.run_id}/state"), signer)
        handler: RendezvousHandler = create_handler(store, gate, parameters_of(settings, conf, addr))
        return Elastic(settings, addr, handler, gate, signer, own, is_host)
    resolve(settings.endpoint)
    parameters = parameters_of(settings, conf, addr)
    try:
        if settings.backend == "etcd-v2":
            from torch.distributed.elastic.rendezvous.etcd_rendezvous_backend import create_backend

            return meet_through(settings, addr, signer, *create_backend(parameters))
        return Elastic(settings, addr, get_rendezvous_handler(parameters), None, signer)  # JSON in etcd
    except RendezvousConnectionError:
        reach_endpoint(settings, conf, tell)
        raise not_a_store(settings) from None
    except Exception as error:
        raise Refused(
            "usage", f"--rdzv-backend {settings.backend} cannot be used: {first_line(error)}"
        ) from error


def meet_through(
    settings: RendezvousSettings, addr: str, signer: Signer, backend: RendezvousBackend, store: Store
) -> Meeting:
    """Meet where torch's state is in a `backend` whose `store` cannot compare and set, as etcd's."""
    gate = Gate(backend, signer)
    handler = create_handler(store, gate, parameters_of(settings, settings_of(settings), addr))
    return Elastic(settings, addr, handler, gate, signer)
