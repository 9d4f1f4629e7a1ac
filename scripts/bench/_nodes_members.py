"""The members of scripts/bench/nodes that live in one process, two or three threads each, and their store.

Everything is the launcher's own (`Generation`, `RankAssignment`) but the store, which counts its requests.
"""

from __future__ import annotations

import gc
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

from launcher.rendezvous.member.generation import Generation
from launcher.rendezvous.member.heartbeat import PERIOD
from launcher.rendezvous.member.protocol import GenerationInfo
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.stores import SignedStore
from launcher.rendezvous.team import RankAssignment, Ready

__all__ = ["Members", "Outcome", "cpu_seconds", "raise_file_limit", "serve_members"]

_HELLO_TIMEOUT = 60.0
_CONNECTING = (
    16  # members at a time: torch asks for names, which takes long where no server for them answers
)
_DEVICES = 8
_TRACEBACK = "\n".join(
    f'  File "/opt/train/lib/module_{n}.py", line {17 * n}, in forward\n    return self.layer_{n}(hidden)'
    for n in range(20)
)

_PLACES = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """What the members of one process did in a phase.

    Attributes:
        began: when the last of them began, seconds of the monotonic clock.
        ended: when the last of them had what the phase is for.
        requests: to the store, as they go over the connection.
        cpu: seconds that all of them have computed.
    """

    began: float
    ended: float
    requests: int
    cpu: float = 0.0


class CountingStore:
    """A connection to a store that counts its requests: `get`, for example, waits first, which makes two."""

    def __init__(self, store: TCPStore, requests: list[int]) -> None:
        self._store = store
        self._requests = requests  # one number for each connection, so that no lock is needed
        with _PLACES:
            self._place = len(requests)
            requests.append(0)

    def clone(self) -> CountingStore:
        return CountingStore(self._store.clone(), self._requests)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._store, name)

        def count(*arguments: Any) -> Any:
            self._requests[self._place] += 2 if name in ("get", "multi_get") else 1
            return call(*arguments)

        setattr(self, name, count)
        return count


class Member:
    """One node: what its agent would do is reduced to hellos, readiness, and counting what it hears."""

    def __init__(self, rank: int, size: int, store: SignedStore) -> None:
        self.rank = rank
        self.size = size
        self._heard: queue.SimpleQueue[tuple[int, Mapping[str, Any]]] = queue.SimpleQueue()
        info = GenerationInfo(rank, size, store, is_host=rank == 0)
        self.generation = Generation(info, lambda *heard: self._heard.put(heard), print, print)

    def hello(self) -> None:
        host = f"node-{self.rank:04}.cluster.example"
        hello = {
            "host": host,
            "addr": f"10.0.{self.rank // 256}.{self.rank % 256}",
            "version": "1.0",
            "job": "train.py --config configs/large.toml on 512:512 nodes",
            "arguments": ["--steps", "100000", "--data", "/data/shards", "--lr", "3e-4"],
            "history": {"restarts": 0, "fingerprints": []},
            "member": f"{host}/10.0.0.1/{4000 + self.rank}",
        }
        self.generation.exchange_hellos(hello, _HELLO_TIMEOUT)
        self.generation.start()

    def plan(self) -> None:
        own = Ready(tuple(range(_DEVICES)), f"10.0.0.{self.rank % 256}", 29500, 1)
        self.generation.broadcast(own.to_json())
        ready = {node: Ready.from_json(message) for node, message in self.hear("ready", self.size)}
        assert RankAssignment.of(self.rank, ready).world == _DEVICES * self.size

    def report(self) -> None:
        deaths = [{"rank": self.rank, "traceback": f"{_TRACEBACK}\nRuntimeError: rank {self.rank}"}]
        self.generation.broadcast({"kind": "report", "report": {"node": self.rank, "deaths": deaths}})
        assert len({node for node, _ in self.hear("report", self.size)}) == self.size

    def hear(self, kind: str, count: int) -> list[tuple[int, Mapping[str, Any]]]:
        """The next `count` messages of that kind."""
        heard: list[tuple[int, Mapping[str, Any]]] = []
        while len(heard) < count:
            node, message = self._heard.get(timeout=_HELLO_TIMEOUT)
            if message["kind"] == kind:
                heard.append((node, message))
        return heard


class Members:
    """Those of one process, out of `size` in all."""

    def __init__(self, ranks: Sequence[int], size: int, port: int, *, is_libuv: bool) -> None:
        self._requests: list[int] = []
        first = TCPStore(
            "127.0.0.1",
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            use_libuv=is_libuv,
        )
        store = SignedStore(CountingStore(first, self._requests), Signer(b"secret", "bench"))  # type: ignore[arg-type]
        with ThreadPoolExecutor(_CONNECTING) as threads:
            self._members = list(threads.map(lambda rank: Member(rank, size, store), ranks))

    def hellos(self) -> Outcome:
        """All say hello, and learn all others'."""
        return self._all(Member.hello)

    def plan(self) -> Outcome:
        """All are ready, hear that all are, and compute their ranks."""
        return self._all(Member.plan)

    def failure(self) -> Outcome:
        """The last node says that a worker of its own has failed; all hear of it."""

        def act(member: Member) -> None:
            if member.rank == member.size - 1:
                member.generation.broadcast({"kind": "ended"})
            member.hear("ended", 1)

        return self._all(act, began=lambda member: member.rank == member.size - 1)

    def reports(self) -> Outcome:
        """All say what became of their workers, with a traceback of 2 KB, and hear of all others'."""
        return self._all(Member.report)

    def leader_lost(self) -> Outcome:
        """Node 0 stops; all others find out and say so, and hear that it is lost."""

        def act(member: Member) -> None:
            if member.rank == 0:
                member.generation.stop()
            else:
                member.generation.report_lost(0, "no sign of life for 4.0 s")
                while member.hear("lost", 1)[0][1]["node"] != 0:
                    pass

        return self._all(act)

    def heartbeats(self, seconds: float) -> Outcome:
        """All send heartbeats, and watch those of others."""
        before, began = sum(self._requests), time.monotonic()
        for beat in range(round(seconds / PERIOD)):
            for member in self._members:
                member.generation.check_heartbeats(time.monotonic())
            time.sleep(max(0.0, began + (beat + 1) * PERIOD - time.monotonic()))
        return Outcome(began, time.monotonic(), sum(self._requests) - before)

    def _all(
        self, act: Callable[[Member], None], began: Callable[[Member], bool] = lambda _: True
    ) -> Outcome:
        """Have all members `act` at once, each in a thread of its own."""
        before, cpu = sum(self._requests), cpu_seconds()
        begins, ends = [], []

        def run(member: Member) -> None:
            barrier.wait()
            if began(member):
                begins.append(time.monotonic())
            act(member)
            ends.append(time.monotonic())

        barrier = threading.Barrier(len(self._members))
        threads = [threading.Thread(target=run, args=(member,), daemon=True) for member in self._members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(ends) < len(threads):
            raise RuntimeError(f"{len(threads) - len(ends)} members failed: their errors are above")
        requests = sum(self._requests) - before
        return Outcome(max(begins, default=0.0), max(ends), requests, cpu_seconds() - cpu)


def serve_members(pipe: Connection, ranks: Iterable[int], size: int, port: int, is_libuv: bool) -> None:
    """Carry out phases, by name and arguments, until the other end of `pipe` is closed."""
    raise_file_limit()
    gc.disable()  # a collection would look through what all members have received
    threading.stack_size(256 << 10)
    members = Members(list(ranks), size, port, is_libuv=is_libuv)
    pipe.send(None)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(members, name)(*arguments))


def cpu_seconds() -> float:
    """Of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def raise_file_limit() -> None:
    """As `launch` does: a store has four or five connections to each member."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
