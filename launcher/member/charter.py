"""Whether nodes belong together: the same job, and the same version of this program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.member.refusal import Refused
from launcher.member.stores import Store

__all__ = ["Charter", "check_hellos"]


def check_hellos(hellos: Sequence[Mapping[str, Any]]) -> None:
    """Raise `Refused` unless all nodes of a generation belong together."""
    for hello in hellos[1:]:
        _compare(hellos[0], hello)


class Charter:
    """What the last generation was of. `store` is what the job keeps beside its generations.

    A node that does not fit to a running job finds out before it takes part, and disturbs it no more.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def check(self, hello: Mapping[str, Any]) -> None:
        """Raise `Refused` unless a node that says `hello` belongs to the job, as far as there is one."""
        if self._store.check(["charter"]):
            _compare(json.loads(self._store.get("charter")), hello)

    def write(self, hello: Mapping[str, Any]) -> None:
        """A generation of nodes like the one that says `hello` begins."""
        self._store.set("charter", json.dumps({key: hello.get(key) for key in ("host", "version", "job")}))


def _compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if one.get("job") != other.get("job"):
        raise Refused(
            "usage",
            f"another job uses the same rendezvous id (on {one['host']} and {other['host']}): "
            "choose another --rdzv-id",
        )
    if one["version"] != other["version"]:
        raise Refused(
            "usage",
            f"{one['host']} has shardckpt {one['version']} and {other['host']} has {other['version']}: "
            "install the same version on all nodes",
        )
