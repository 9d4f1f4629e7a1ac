"""Whether nodes belong together: the same job, and the same version of this program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["Compatibility", "check_hellos"]


def check_hellos(hellos: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Raise `Refused` unless all nodes of a generation belong together; this one is number `rank`."""
    for hello in hellos:
        _compare(hello, hellos[rank])


class Compatibility:
    """What the last generation was of. `store` is what the job keeps beside its generations.

    A node that does not fit to a running job finds out before it takes part, and disturbs it no more.
    """

    def __init__(self, store: SignedStore) -> None:
        self._store = store

    def check(self, hello: Mapping[str, Any]) -> None:
        """Raise `Refused` unless a node that says `hello` belongs to the job, as far as there is one."""
        text = self._store.get("charter")
        if text is not None:
            _compare(json.loads(text), hello)

    def write(self, hello: Mapping[str, Any]) -> None:
        """A generation of nodes like the one that says `hello` begins."""
        self._store.set("charter", json.dumps({key: hello.get(key) for key in ("host", "version", "job")}))


def _compare(other: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if other.get("job") != own.get("job"):
        raise Refused(
            "usage",
            f"with this rendezvous id {other['host']} runs '{other.get('job')}', and this node "
            f"'{own.get('job')}': correct the command, or choose another --rdzv-id if it is another job",
        )
    if other["version"] != own["version"]:
        raise Refused(
            "usage",
            f"{other['host']} has shardckpt {other['version']} and {own['host']} has {own['version']}: "
            "install the same version on all nodes",
        )
