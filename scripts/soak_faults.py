"""What scripts/soak does to a job: each kind of fault, and which one is next.

A fault is a generator: it does its harm, yields the seconds until it wants to go on, and heals at its end. So
faults last, and overlap, without threads.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from soak_world import Network, Node, send

__all__ = ["KINDS", "Fault", "Kind", "kinds_for"]

Fault = Iterator[float]


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        weight: how often it is drawn, against the others.
        act: begins it on a node. The generator's first value comes at once, or none if there was nothing to hit.
        nodes: how many nodes it needs.
    """

    name: str
    weight: int
    act: Callable[[Node, random.Random], Fault]
    nodes: int = 1


def _kill(role: str) -> Callable[[Node, random.Random], Fault]:
    def act(node: Node, chance: random.Random) -> Fault:
        pids = node.processes(role)
        if pids and send(chance.choice(pids), signal.SIGKILL):
            yield 0.0

    return act


def _freeze(role: str, least: float, most: float) -> Callable[[Node, random.Random], Fault]:
    def act(node: Node, chance: random.Random) -> Fault:
        pids = node.processes(role)
        pid = chance.choice(pids) if pids else 0
        if pid and send(pid, signal.SIGSTOP):
            try:
                yield chance.uniform(least, most)
            finally:
                send(pid, signal.SIGCONT)

    return act


def _signal(signum: int) -> Callable[[Node, random.Random], Fault]:
    def act(node: Node, _: random.Random) -> Fault:
        if any(send(pid, signum) for pid in node.processes("agent")):
            yield 0.0

    return act


def _cut(node: Node, chance: random.Random) -> Fault:
    network: Network = node.network
    network.pull_cable(node.number)
    try:
        yield chance.choice([0.5, 2.0, 10.0])
    finally:
        network.plug_cable(node.number)


def _scale(node: Node, chance: random.Random) -> Fault:
    if node.ask("scale", "1") == 0:
        try:
            yield chance.uniform(1.0, 5.0)
        finally:
            node.ask("scale", "2")


def _restart(node: Node, _: random.Random) -> Fault:
    if node.ask("restart") == 0:
        yield 0.0


KINDS = (
    Kind("kill -9 worker", 6, _kill("worker")),
    Kind("kill -9 zygote", 2, _kill("zygote")),
    Kind("kill -9 saver", 2, _kill("saver")),
    Kind("kill -9 agent", 2, _kill("agent")),
    Kind("freeze worker", 2, _freeze("worker", 0.5, 3.0)),
    Kind("hang worker", 2, _freeze("worker", 20.0, 30.0)),
    Kind("freeze saver", 1, _freeze("saver", 0.5, 5.0)),
    Kind("freeze agent", 2, _freeze("agent", 0.5, 8.0)),
    Kind("preempt (SIGUSR1)", 2, _signal(signal.SIGUSR1)),
    Kind("stop (SIGTERM)", 2, _signal(signal.SIGTERM)),
    Kind("launch scale 1, 2", 2, _scale),
    Kind("launch restart", 1, _restart),
    Kind("kill -9 member", 1, _kill("member"), nodes=2),
    Kind("cut network", 4, _cut, nodes=2),
)


def kinds_for(nodes: int) -> list[Kind]:
    return [kind for kind in KINDS if kind.nodes <= nodes]
