"""The seal of a store: whose it is, and whether a node that comes has the same secret as the others."""

from __future__ import annotations

import json
import secrets
import time

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.endpoint import show
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signing import ForgedError, Signer
from launcher.rendezvous.member.stores import Store

__all__ = ["open_seal"]

_PAUSE = 0.05  # seconds between two looks for it
_PATIENCE = 5.0  # seconds that whoever serves a store, or is the first of its job there, takes to seal it
_REMEDY = "give all nodes the same one: --rdzv-conf secret=FILE, or LAUNCH_SECRET in the environment"


def open_seal(
    store: Store, settings: RendezvousSettings, signer: Signer, *, is_host: bool, is_first: bool
) -> Signer:
    """What signs all that a job puts into a store, which is sealed with `signer` if no node has done so yet.

    `is_host`: this process serves the store, so that whatever is there already counts for nothing.
    `is_first`: this node need not wait for another one to seal it. Raises `Refused` if the others have
    another secret, or this node has none and they do. The seal has a number that is drawn anew for each:
    nothing that was signed under another one counts here.
    """
    key = f"launch.{settings.run_id}/seal"
    own = signer.sign(key, json.dumps({"nonce": secrets.token_hex(16)}).encode())
    if is_host:
        store.set(key, own)  # type: ignore[arg-type]
    deadline = time.monotonic() + _PATIENCE
    while not is_first and not store.check([key]) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    found = store.compare_set(key, b"", own)  # type: ignore[arg-type]
    try:
        return signer.within(str(json.loads(signer.check(key, found))["nonce"]))
    except (ForgedError, ValueError, LookupError, TypeError):
        raise Refused("usage", _explain(found, settings)) from None


def _explain(stored: bytes, settings: RendezvousSettings) -> str:
    """What is wrong with the secret of a node that `stored` does not let in."""
    mine, where = settings.secret_source, show(settings.endpoint)
    if not Signer.is_signed(stored):
        if settings.secret_key is None or not Signer.is_unsigned(stored):
            return f"what is at {where} is not of launch: choose another port for --rdzv-endpoint"
        return f"the job at {where} has no secret, and this node has one ({mine}): {_REMEDY}"
    if settings.secret_key is None:
        return f"the nodes of the job at {where} know each other by a secret, and this node has none: {_REMEDY}"
    return f"the job at {where} has another secret than this node ({mine}): {_REMEDY}"
