"""Which nodes a job has and where they meet: what torchrun's options for that mean together. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError

__all__ = ["NODE_KEYS", "Given", "resolve_nodes"]

_DEFAULT_PORTS = {"c10d": 29400, "static": 29500, "etcd-v2": 2379, "etcd": 2379}
_KEPT = ("rdzv_id", "rdzv_conf", "local_addr")
_RIVALS = ("standalone", "master_addr", "master_port")  # they say where to meet as --rdzv-endpoint does

NODE_KEYS = frozenset({"nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", *_KEPT, *_RIVALS})
"""The keys of all options that `resolve_nodes` reads."""


@dataclass(frozen=True, slots=True)
class Given:
    """The value that one option has, who says so, and how many sources would have been heard first."""

    value: Any
    source: str
    rank: int = 0


def resolve_nodes(given: Mapping[str, Given]) -> dict[str, Any]:
    """The fields of `Config` that say which nodes there are and where they meet.

    What one source says of the place beats all that lower ones say of it, also with other options: a
    flag --master-addr beats an endpoint of the scheduler's. Within one source they exclude each other,
    and that raises `UsageError`.
    """
    said = _heard(given)
    nnodes = (1, 1) if "standalone" in said else _value(said, "nnodes", (1, 1))
    fields = {"nnodes": nnodes, **{key: said[key].value for key in _KEPT if key in said}}
    return fields | (_alone(said) if nnodes[1] == 1 else _together(said))


def _heard(given: Mapping[str, Given]) -> dict[str, Given]:
    """What remains of `given` when nothing in it contradicts what ranks above it."""
    said = dict(given)
    if "standalone" in said and not said["standalone"].value:
        del said["standalone"]
    _choose_place(said)
    standalone, nnodes = said.get("standalone"), said.get("nnodes")
    if standalone and nnodes and nnodes.value[1] > 1 and nnodes.rank <= standalone.rank:
        raise UsageError(f"{nnodes.source}: {standalone.source} means one node: leave out one of them")
    one_node = [one.rank for one in (standalone, nnodes) if one and one.value in (True, (1, 1))]
    for key in ("rdzv_endpoint", "node_rank") if one_node else ():
        if key in said and said[key].rank > min(one_node):
            del said[key]  # meant for the several nodes that there are not
    return said


def _choose_place(said: dict[str, Given]) -> None:
    endpoint = said.get("rdzv_endpoint")
    rivals = [said[key] for key in _RIVALS if key in said]
    if endpoint is None or not rivals:
        return
    rival = min(rivals, key=lambda one: one.rank)
    if rival.rank == endpoint.rank:
        says = "picks the endpoint" if rival is said.get("standalone") else "says the same"
        raise UsageError(f"{endpoint.source}: {rival.source} {says}: leave out one of them")
    for key in ("rdzv_endpoint",) if rival.rank < endpoint.rank else _RIVALS:
        said.pop(key, None)


def _alone(said: Mapping[str, Given]) -> dict[str, Any]:
    """One node: an endpoint is the address and the port at which the workers meet."""
    rank = said.get("node_rank")
    if rank and rank.value:
        raise UsageError(
            f"{rank.source}: expected 0, as there is one node, found {rank.value}: give --nnodes"
        )
    if "rdzv_endpoint" in said:
        host, port = said["rdzv_endpoint"].value
        return {"master_addr": host, "master_port": port or 0}
    fields = {key: said[key].value for key in ("master_addr", "master_port") if key in said}
    if "local_addr" in said:
        fields.setdefault("master_addr", said["local_addr"].value)
    return fields


def _together(said: Mapping[str, Given]) -> dict[str, Any]:
    """Several nodes: the endpoint and how they meet there."""
    default = "static" if "rdzv_endpoint" not in said and "master_addr" in said else "c10d"
    backend = _value(said, "rdzv_backend", default)
    host, port = _value(said, "rdzv_endpoint", ("", None))
    if backend == "static" and not host:
        host, port = _value(said, "master_addr", ""), _value(said, "master_port", None)
    return {
        "rdzv_backend": backend,
        "rdzv_endpoint": (host, _DEFAULT_PORTS[backend] if port is None else port),
        "node_rank": _value(said, "node_rank", None),
    }


def _value(said: Mapping[str, Given], key: str, default: Any) -> Any:
    return said[key].value if key in said else default
