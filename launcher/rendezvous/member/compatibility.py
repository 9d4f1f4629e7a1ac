"""Checks that nodes belong together: the same job, and the same version of this program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["Compatibility", "check_hellos"]

_KEY = "charter"


def check_hellos(hellos: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Raise `Refused` unless all nodes of a generation belong together with node `rank`, this one."""
    for hello in hellos:
        _compare(hello, hellos[rank])


class Compatibility:
    """Job and version of the last generation, as recorded in the job's store.

    A node that does not belong to a running job is refused before it takes part, and does not disturb it.
    """

    def __init__(self, store: SignedStore) -> None:
        self._store = store

    def check(self, hello: Mapping[str, Any]) -> None:
        """Raise `Refused` unless a node with this hello belongs to the job, if one is recorded."""
        text = self._store.get(_KEY)
        if text is not None:
            _compare(json.loads(text), hello)

    def record(self, hello: Mapping[str, Any]) -> None:
        """Record the job and version of the generation that begins."""
        self._store.set(_KEY, json.dumps({key: hello.get(key) for key in ("host", "version", "job")}))


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
