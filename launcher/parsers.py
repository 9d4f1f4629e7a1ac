"""From the text of an option to its value. Each raises ValueError saying what it expects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from launcher.devices import count_cpus, count_gpus

__all__ = [
    "endpoint",
    "modules",
    "nothing",
    "nproc",
    "one_node",
    "one_of",
    "port",
    "ranks",
    "seconds",
    "stop_signals",
    "streams",
    "switch",
    "text",
    "whole",
]


def whole(minimum: int, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()) or int(text) < minimum:
            raise ValueError(what)
        return int(text)

    return parse


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("a number of seconds, 0 or more")
    return value


def switch(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError("true or false")
    return words[text.lower()]


def text(text: str) -> str:
    if not text:
        raise ValueError("some text")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(" or ".join(choices))
        return text

    return parse


def nproc(text: str) -> int:
    if text == "cpu":
        return count_cpus()
    if text in ("gpu", "auto"):
        gpus = count_gpus()
        if text == "gpu" and not gpus:
            raise ValueError("a node with GPUs that torch can use, or --nproc N, or --nproc cpu")
        return gpus or count_cpus()
    return whole(1, "a number of workers of at least 1, or auto, gpu or cpu")(text)


def modules(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ValueError("module names separated by commas")
    return names


def ranks(text: str) -> frozenset[int] | None:
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise ValueError("ranks separated by commas, as 0,1")
    return frozenset(map(int, text.split(","))) if text else None


def streams(text: str) -> Mapping[int | None, int]:
    """torchrun's bit mask (1 stdout, 2 stderr) for every rank (key None), or rank by rank."""
    if re.fullmatch(r"[0-3]", text):
        return {None: int(text)}
    if not re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
        raise ValueError("0 to 3 (1 stdout, 2 stderr, 3 both), or RANK:0-3 separated by commas")
    pairs = (pair.split(":") for pair in text.split(","))
    return {int(rank): int(mask) for rank, mask in pairs}


def one_node(text: str) -> int:
    if text not in ("1", "1:1"):
        raise ValueError("1, as launch runs one node for now; use torchrun for several")
    return 1


def endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if re.search(r":\d+$", text) else (text, "", "0")
    if not host or int(port) > 65535:
        raise ValueError("HOST or HOST:PORT")
    return host.strip("[]"), int(port)


def port(text: str) -> int:
    port = whole(0, "a port from 0 (any free one) to 65535")(text)
    if port > 65535:
        raise ValueError("a port from 0 (any free one) to 65535")
    return port


def stop_signals(text: str) -> str:
    if set(text.split(",")) != {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}:
        raise ValueError(
            "SIGTERM,SIGINT,SIGHUP,SIGQUIT, which always end the job (SIGUSR1 and SIGUSR2 never do)"
        )
    return text


def nothing(text: str) -> str:
    raise AssertionError(text)
