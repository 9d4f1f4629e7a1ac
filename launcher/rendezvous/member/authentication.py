"""Checks that a node has the same secret as the other users of a store, before it takes part.

The first node of a job at a store writes a signed random number there, the nonce. Values of the job count only if
they are signed for this nonce: nothing signed for an earlier life of the store can be replayed.
"""

from __future__ import annotations

import json
import secrets
import time

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.endpoint import format_endpoint
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signing import ForgedError, Signer
from launcher.rendezvous.member.stores import Store

__all__ = ["authenticate_store"]

_POLL = 0.05  # seconds between two looks for the nonce
_NONCE_TIMEOUT = 5.0  # seconds for the store's server, or the job's first node there, to write the nonce
_REMEDY = "give all nodes the same one: --rdzv-conf secret=FILE, or LAUNCH_SECRET in the environment"


def authenticate_store(
    store: Store, settings: RendezvousSettings, signer: Signer, *, is_host: bool, is_first: bool
) -> Signer:
    """Read the job's nonce from a store, or write it if no node has done so yet.

    Args:
        store: the store at the endpoint.
        settings: this node's rendezvous.
        signer: signs for the job, in any store.
        is_host: true if this process serves the store: a nonce that is there already does not count.
        is_first: true if this node need not wait for another one to write the nonce.

    Returns:
        a signer for the job in this store.

    Raises:
        Refused: the others have another secret, or only one side has any.
    """
    key = f"launch.{settings.run_id}/seal"
    own = signer.sign(key, json.dumps({"nonce": secrets.token_hex(16)}).encode())
    if is_host:
        store.set(key, own)  # type: ignore[arg-type]
    deadline = time.monotonic() + _NONCE_TIMEOUT
    while not is_first and not store.check([key]) and time.monotonic() < deadline:
        time.sleep(_POLL)
    found = store.compare_set(key, b"", own)  # type: ignore[arg-type]
    try:
        return signer.within(str(json.loads(signer.check(key, found))["nonce"]))
    except (ForgedError, ValueError, LookupError, TypeError):
        raise Refused("usage", _describe_mismatch(found, settings)) from None


def _describe_mismatch(stored: bytes, settings: RendezvousSettings) -> str:
    """Why this node's secret does not match the nonce as it is stored."""
    mine, where = settings.secret_source, format_endpoint(settings.endpoint)
    if not Signer.is_signed(stored):
        if settings.secret_key is None or not Signer.is_unsigned(stored):
            return f"what is at {where} is not of launch: choose another port for --rdzv-endpoint"
        return f"the job at {where} has no secret, and this node has one ({mine}): {_REMEDY}"
    if settings.secret_key is None:
        return f"the nodes of the job at {where} know each other by a secret, and this node has none: {_REMEDY}"
    return f"the job at {where} has another secret than this node ({mine}): {_REMEDY}"
