"""Opens the rendezvous of a job: torch's elastic one, or the static ranks that a scheduler has assigned.

For the backends "c10d", "etcd-v2" and those of torch's registry, torch's handler agrees on which nodes are in
the next generation. The messages of a generation go through a `TCPStore`: that of the c10d backend, which lives
at the endpoint, or else one that node 0 of the generation serves.
"""

from __future__ import annotations

import os

from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, create_handler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.conf import torch_parameters
from launcher.rendezvous.member.connect import connect_store, wait_for_endpoint
from launcher.rendezvous.member.elastic import ElasticRendezvous
from launcher.rendezvous.member.endpoint import resolve_endpoint
from launcher.rendezvous.member.protocol import Notify, Rendezvous
from launcher.rendezvous.member.refusals import first_line, not_a_store
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signed_backend import SignedBackend, StoreBackend
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.static import StaticRendezvous
from launcher.rendezvous.member.stores import SignedStore, Store

__all__ = ["open_rendezvous", "open_with_backend"]

# Workers have a store of their own. With torch's shared one, the address of the first generation's store is
# cached and not published in later ones: a node that joins then waits for it in vain (torch 2.13).
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def open_rendezvous(
    settings: RendezvousSettings, addr: str, notify: Notify, on_forged: Notify
) -> Rendezvous:
    """Connect to the rendezvous, or begin to serve its store if the endpoint is this machine.

    Args:
        settings: this node's rendezvous.
        addr: the address at which other nodes reach this one.
        notify: called with lines for the user while the connection takes long.
        on_forged: called at any later time with a key of the store that no node of this job has written.

    Raises:
        Refused: there is no rendezvous at the endpoint, or it is not of this job.
    """
    signer = Signer(settings.secret_key, settings.run_id, on_forged=on_forged)
    try:
        if settings.backend in ("c10d", "static"):
            return _open_at_store(settings, addr, signer, notify)
        return _open_by_name(settings, addr, signer, notify)
    except ValueError as error:
        raise Refused("usage", f"--rdzv-conf cannot be used: {error}") from None


def _open_at_store(settings: RendezvousSettings, addr: str, signer: Signer, notify: Notify) -> Rendezvous:
    """A rendezvous whose store one of the nodes serves at the endpoint."""
    store, signer, is_host = connect_store(settings, signer, notify)
    job_store = SignedStore(store, signer, f"launch.{settings.run_id}/")
    if settings.backend == "static":
        return StaticRendezvous(settings, job_store, is_host)
    backend = SignedBackend(StoreBackend(store, f"launch.{settings.run_id}/state"), signer)
    handler: RendezvousHandler = create_handler(store, backend, torch_parameters(settings, addr))
    return ElasticRendezvous(settings, addr, handler, backend, signer, job_store, is_host)


def _open_by_name(settings: RendezvousSettings, addr: str, signer: Signer, notify: Notify) -> Rendezvous:
    """A rendezvous at a server such as etcd."""
    resolve_endpoint(settings.endpoint)
    parameters = torch_parameters(settings, addr)
    try:
        if settings.backend == "etcd-v2":
            from torch.distributed.elastic.rendezvous.etcd_rendezvous_backend import create_backend

            return open_with_backend(settings, addr, signer, *create_backend(parameters))
        # "etcd" keeps its state as JSON and needs no signed backend.
        return ElasticRendezvous(settings, addr, get_rendezvous_handler(parameters), None, signer)
    except RendezvousConnectionError:
        wait_for_endpoint(settings, notify)
        raise not_a_store(settings) from None
    except Exception as error:
        raise Refused(
            "usage", f"--rdzv-backend {settings.backend} cannot be used: {first_line(error)}"
        ) from error


def open_with_backend(
    settings: RendezvousSettings, addr: str, signer: Signer, torch_backend: RendezvousBackend, store: Store
) -> Rendezvous:
    """A rendezvous with torch's state in `torch_backend`, whose `store` cannot compare and set, as etcd's."""
    backend = SignedBackend(torch_backend, signer)
    handler = create_handler(store, backend, torch_parameters(settings, addr))
    return ElasticRendezvous(settings, addr, handler, backend, signer)
