"""Parsers of option values, from text. Each raises ValueError with what it expects."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.system.devices import count_cpus

__all__ = [
    "RDZV_CONF",
    "WorkerRange",
    "endpoint",
    "modules",
    "nnodes",
    "nothing",
    "one_of",
    "port",
    "ranks",
    "rdzv_conf",
    "seconds",
    "slots",
    "stop_signals",
    "storage_url",
    "streams",
    "switch",
    "text",
    "whole",
    "worker_range",
]


_ELASTIC = {
    "join_timeout": int,
    "last_call_timeout": int,
    "close_timeout": int,
    "heartbeat_timeout": int,
    "keep_alive_interval": int,
    "keep_alive_max_attempt": int,
    "read_timeout": int,
}
_SECRET = {"secret": str}  # a key of launch's own
RDZV_CONF: Mapping[str, Mapping[str, type]] = {
    "c10d": {**_ELASTIC, **_SECRET, "store_type": str, "is_host": bool},
    "etcd-v2": {
        **_ELASTIC,
        **_SECRET,
        "protocol": str,
        "ssl_cert": str,
        "ssl_cert_key": str,
        "ca_cert": str,
    },
    "etcd": {
        "timeout": int,
        "last_call_timeout": int,
        "protocol": str,
        "cert": str,
        "key": str,
        "cacert": str,
        "etcd_prefix": str,
        **_SECRET,
    },
    "static": {"timeout": int, **_SECRET},
}
"""What --rdzv-conf may hold: rendezvous backend -> key -> type, as torch reads them, and the secret."""


def whole(minimum: int, expected: str) -> Callable[[str], int]:
    """A parser of whole numbers from `minimum` on; `expected` describes them."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()) or int(text) < minimum:
            raise ValueError(expected)
        return int(text)

    return parse


def seconds(text: str) -> float:
    """A finite number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("a number of seconds, 0 or more")
    return value


def switch(text: str) -> bool:
    """true, yes, on and 1, or false, no, off and 0."""
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError("true or false")
    return words[text.lower()]


def text(text: str) -> str:
    """Any text but an empty one."""
    if not text:
        raise ValueError("some text")
    return text


def storage_url(text: str) -> str:
    """A local path or a URL of a run.

    Refused are a URL that lacks a slash, which would be a local folder called "s3:", and a checkpoint or an
    attempt inside a run.
    """
    if slip := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", text):
        meant = f"{slip[1]}://{text[slip.end() :]}"
        raise ValueError(
            f"a folder or a URL: did you mean {meant}? (A folder of this name would be ./{text})"
        )
    if not text:
        raise ValueError("a folder or a URL")
    if inside := re.match(r"(.+?)/+attempt-\d{4,}(-[0-9a-f]{8})?/+step-\d{8,}/*\Z", text, re.S):
        raise ValueError(f"a run, not a checkpoint in it: give {inside[1]}")
    if os.path.isfile(f"{text}/attempt.json"):  # noqa: PTH113 - not Path.is_file, which raises for a closed folder
        raise ValueError(f"a run, not an attempt in it: give {Path(text).parent}")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser of a few words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(" or ".join(choices))
        return text

    return parse


_DEVICES = ("auto", "gpu", "cpu")
_WORKERS = "a number of workers of at least 1, or auto, gpu or cpu, or MIN:MAX of these"


class WorkerRange:
    """The fewest and the most workers of a node. (A plain class: the start waits for this module's import.)

    Args:
        least: None: as many as the most.
        most: a number, or "auto", "gpu" or "cpu".
    """

    def __init__(self, least: int | None, most: int | str) -> None:
        self.least = least
        self.most = most

    def count(self, gpus: int) -> tuple[int, int]:
        """The fewest and the most workers on a node with `gpus` GPUs. Raises ValueError for "gpu" without any."""
        most = self.most if isinstance(self.most, int) else self._count_devices(gpus)
        return most if self.least is None else self.least, most

    def _count_devices(self, gpus: int) -> int:
        if self.most == "gpu" and not gpus:
            raise ValueError("a node with GPUs that torch can use, or --nproc N, or --nproc cpu")
        return count_cpus() if self.most == "cpu" or not gpus else gpus


def worker_range(text: str) -> WorkerRange:
    """N, or MIN:N, where N may be "auto", "gpu" or "cpu"."""
    least, colon, most = text.rpartition(":")
    number = whole(1, _WORKERS)
    return WorkerRange(number(least) if colon else None, most if most in _DEVICES else number(most))


def nnodes(text: str) -> tuple[int, int]:
    """The fewest and the most nodes: N or MIN:MAX."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError("a number of nodes of at least 1, or MIN:MAX")
    return least, most


def modules(text: str) -> tuple[str, ...]:
    """Dotted module names, separated by commas."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ValueError("module names separated by commas")
    return names


def ranks(text: str) -> frozenset[int] | None:
    """Ranks, separated by commas; None if there are none."""
    return _numbers(text, "ranks separated by commas, as 0,1") if text else None


def slots(text: str) -> frozenset[int]:
    """Device slots, separated by commas."""
    return _numbers(text, "slots separated by commas, as 0,3")


def _numbers(text: str, expected: str) -> frozenset[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(expected)
    return frozenset(map(int, text.split(",")))


def streams(text: str) -> Mapping[int | None, int]:
    """torchrun's bit masks (1 stdout, 2 stderr): one for every rank (key None), or by rank."""
    if re.fullmatch(r"[0-3]", text):
        return {None: int(text)}
    if not re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
        raise ValueError("0 to 3 (1 stdout, 2 stderr, 3 both), or RANK:0-3 separated by commas")
    pairs = (pair.split(":") for pair in text.split(","))
    return {int(rank): int(mask) for rank, mask in pairs}


def endpoint(text: str) -> tuple[str, int | None]:
    """A host, and a port or None. An IPv6 address with a port is in brackets."""
    address = r"[0-9a-fA-F]*:[0-9a-fA-F.]*:[0-9a-fA-F:.]*(?:%\w+)?"
    match = re.fullmatch(rf"(?:\[({address})\]|([\w.-]+))(?::(\d{{1,5}}))?|({address})", text.strip())
    if match is None or int(match[3] or 0) > 65535:
        raise ValueError("HOST or HOST:PORT")
    return match[1] or match[2] or match[4], int(match[3]) if match[3] else None


def rdzv_conf(text: str) -> Mapping[str, str]:
    """KEY=VALUE pairs, separated by commas, with keys that some backend knows. Which backend is checked later."""
    known = {key: kind for keys in RDZV_CONF.values() for key, kind in keys.items()}
    pairs = {}
    for pair in text.split(",") if text.strip() else ():
        key, _, value = (part.strip() for part in pair.partition("="))
        if not key or not value:
            raise ValueError("KEY=VALUE pairs separated by commas")
        if key not in known:
            raise ValueError(f"keys of {', '.join(sorted(known))}")
        _check_conf(key, value, known[key])
        pairs[key] = value
    return pairs


def _check_conf(key: str, value: str, kind: type) -> None:
    if kind is int:
        whole(1, f"{key} to be a number of at least 1")(value)
    elif kind is bool and value.lower() not in ("0", "1", "t", "f", "true", "false", "y", "n", "yes", "no"):
        raise ValueError(f"{key} to be true or false")
    elif key == "store_type" and value != "tcp":
        raise ValueError("store_type to be tcp: nodes do not see each other's death in a file")


def port(text: str) -> int:
    """A port; 0: any free one."""
    port = whole(0, "a port from 0 (any free one) to 65535")(text)
    if port > 65535:
        raise ValueError("a port from 0 (any free one) to 65535")
    return port


def stop_signals(text: str) -> str:
    """The signals that always end a job, which cannot be changed."""
    if set(text.split(",")) - {"SIGUSR1"} != {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}:
        raise ValueError(
            "SIGTERM,SIGINT,SIGHUP,SIGQUIT, which always end the job (so does SIGUSR1; SIGUSR2 never)"
        )
    return text


def nothing(text: str) -> str:
    """Never called: the option is refused before its value is parsed."""
    raise AssertionError(text)
