"""The nodes of a job and their rendezvous, resolved from torchrun's interdependent options. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError

__all__ = ["NODE_KEYS", "Given", "resolve_nodes"]

_DEFAULT_PORTS = {"c10d": 29400, "static": 29500, "etcd-v2": 2379, "etcd": 2379}
_KEPT = ("rdzv_id", "rdzv_conf", "local_addr")
_ENDPOINT_OPTIONS = ("standalone", "master_addr", "master_port")
"""They determine the endpoint, as --rdzv-endpoint does."""

NODE_KEYS = frozenset({"nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", *_KEPT, *_ENDPOINT_OPTIONS})
"""The keys of the options that `resolve_nodes` reads."""


@dataclass(frozen=True, slots=True)
class Given:
    """The value of one option.

    Args:
        value: as parsed.
        source: where it comes from, for messages.
        rank: how many sources take precedence over that one.
    """

    value: Any
    source: str
    rank: int = 0


def resolve_nodes(given: Mapping[str, Given]) -> dict[str, Any]:
    """The fields of `Config` about nodes and their rendezvous.

    A source that determines the endpoint overrides all lower sources that do, also by other options: a flag
    --master-addr overrides the scheduler's endpoint. Within one source such options exclude each other.

    Args:
        given: the settings of a job, by option key.

    Raises:
        UsageError: two options contradict each other.
    """
    effective = _effective(given)
    nnodes = (1, 1) if "standalone" in effective else _value(effective, "nnodes", (1, 1))
    fields = {"nnodes": nnodes, **{key: effective[key].value for key in _KEPT if key in effective}}
    return fields | (_for_one_node(effective) if nnodes[1] == 1 else _for_several_nodes(effective))


def _effective(given: Mapping[str, Given]) -> dict[str, Given]:
    """`given` without the options that a source of higher precedence overrides."""
    effective = dict(given)
    if "standalone" in effective and not effective["standalone"].value:
        del effective["standalone"]
    _choose_endpoint(effective)
    standalone, nnodes = effective.get("standalone"), effective.get("nnodes")
    if standalone and nnodes and nnodes.value[1] > 1 and nnodes.rank <= standalone.rank:
        raise UsageError(f"{nnodes.source}: {standalone.source} means one node: leave out one of them")
    one_node = [one.rank for one in (standalone, nnodes) if one and one.value in (True, (1, 1))]
    for key in ("rdzv_endpoint", "node_rank") if one_node else ():
        if key in effective and effective[key].rank > min(one_node):
            del effective[key]  # meant for several nodes, and there is one
    return effective


def _choose_endpoint(effective: dict[str, Given]) -> None:
    endpoint = effective.get("rdzv_endpoint")
    others = [effective[key] for key in _ENDPOINT_OPTIONS if key in effective]
    if endpoint is None or not others:
        return
    other = min(others, key=lambda one: one.rank)
    if other.rank == endpoint.rank:
        says = "picks the endpoint" if other is effective.get("standalone") else "says the same"
        raise UsageError(f"{endpoint.source}: {other.source} {says}: leave out one of them")
    for key in ("rdzv_endpoint",) if other.rank < endpoint.rank else _ENDPOINT_OPTIONS:
        effective.pop(key, None)


def _for_one_node(effective: Mapping[str, Given]) -> dict[str, Any]:
    """The fields for one node: an endpoint is then MASTER_ADDR and MASTER_PORT."""
    rank = effective.get("node_rank")
    if rank and rank.value:
        raise UsageError(
            f"{rank.source}: expected 0, as there is one node, found {rank.value}: give --nnodes"
        )
    if "rdzv_endpoint" in effective:
        host, port = effective["rdzv_endpoint"].value
        return {"master_addr": host, "master_port": port or 0}
    fields = {key: effective[key].value for key in ("master_addr", "master_port") if key in effective}
    if "local_addr" in effective:
        fields.setdefault("master_addr", effective["local_addr"].value)
    return fields


def _for_several_nodes(effective: Mapping[str, Given]) -> dict[str, Any]:
    """The fields for several nodes: backend, endpoint and node rank."""
    default = "static" if "rdzv_endpoint" not in effective and "master_addr" in effective else "c10d"
    backend = _value(effective, "rdzv_backend", default)
    host, port = _value(effective, "rdzv_endpoint", ("", None))
    if backend == "static" and not host:
        host, port = _value(effective, "master_addr", ""), _value(effective, "master_port", None)
    return {
        "rdzv_backend": backend,
        "rdzv_endpoint": (host, _DEFAULT_PORTS[backend] if port is None else port),
        "node_rank": _value(effective, "node_rank", None),
    }


def _value(effective: Mapping[str, Given], key: str, default: Any) -> Any:
    return effective[key].value if key in effective else default
