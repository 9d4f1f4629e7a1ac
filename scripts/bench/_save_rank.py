"""One rank of scripts/bench/save: does the jobs it is given, in step with the others, and reports times.

Its argument is a `World` as JSON. Rank 0 reports, as lines of JSON on the descriptor in it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _kit.environments import use
from _kit.limits import Limits, touch_free_memory
from _kit.state import State, build_state
from _peers.base import Candidate
from _peers.candidates import CANDIDATES
from _save.first import FIRST, measure_first
from _save.profile import Profile
from _save.slow import Measured, slow_saves_table
from _save.training import measure_stalls, measure_training
from torch.distributed.checkpoint.api import CheckpointException

__all__ = ["Bench", "World"]

_PAUSE = 0.05  # for the sampler of memory to see a state of rest
_FIRST_STEPS = 2.0  # seconds of training before a first save, given to who can use them


@dataclass(frozen=True)
class World:
    """What a world of ranks is to do.

    Attributes:
        jobs: pairs of a round's number and a candidate's word, or "limits", "profile", "stalls", "first", or
            "training:" and a candidate's word. Round 0 is not timed; memory is measured in it.
        only_load: whether to load what another world has saved, again and again, and to save nothing.
        loads: whether what is saved is also loaded.
        keep_round: the round whose checkpoints are left for another world; None: no round's.
        report: where rank 0 writes.
    """

    rank: int
    ranks: int
    gigabytes: float
    layout: str
    tensors: int | None
    folder: str
    store: str
    jobs: list[tuple[int, str]]
    only_load: bool
    loads: bool
    keep_round: int | None
    stalls: int
    window: float
    peers: str
    report: int


class CandidateError(Exception):
    """A candidate failed on some rank; the world cannot go on."""


class Bench:
    """The rank's means: times over all ranks, reports, caches."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=240))
        self.state: State = build_state(world.gigabytes, world.layout, world.tensors)
        self._timed = False

    def run(self) -> None:
        """All jobs. Ends the process's work at the first that fails, having reported it."""
        self.report(event="ready", stored=self.state.stored, tensors=len(self.state.tensors))
        for number, word in self.world.jobs:
            self.report(event="begin", round=number, candidate=word)
            error = ""
            results: dict[str, float] = {}
            try:
                results = self._job(number, word)
            except (Exception, CheckpointException) as failure:  # DCP's own is no Exception
                error = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[-1]}"
                traceback.print_exc()
            errors: list[str] = [""] * self.world.ranks
            dist.all_gather_object(errors, error, group=self.control)
            if any(errors):
                told = next(f"rank {r}: {e}" for r, e in enumerate(errors) if e)
                self.report(event="failed", round=number, candidate=word, error=told)
                raise CandidateError(told)
            self.report(event="end", round=number, candidate=word, results=results)

    def _job(self, number: int, word: str) -> dict[str, float]:
        self._timed = number > 0
        if word == "limits":
            return self._limits()
        if word == "profile":
            self._timed = True
            return self._profile()
        if word == "stalls":
            return self._stalls()
        if word == "first":
            return self._first()
        if word.startswith("training:"):
            return self._training(word.removeprefix("training:"))
        if word.startswith("s3:"):
            return self._remote(number, word)
        kind = CANDIDATES[word]
        self._use(kind)
        last = self.world.keep_round if self.world.only_load else number
        folder = Path(self.world.folder, f"{word}-{last}")
        candidate = kind(self.state, folder, self.world.layout)
        times: dict[str, float] = {}
        if not self.world.only_load:
            times |= self._saves(candidate, memory=number == 0)
        if self.world.loads and (kind.own_format or number == 0):
            times |= self._loads(candidate, memory=number == 0)
        kept = number == self.world.keep_round and kind.reshards and kind.own_format
        if not self.world.only_load and not kept:
            self._remove(folder)
        return times

    def _use(self, kind: type[Candidate]) -> None:
        if kind.needs:
            use(Path(self.world.peers), kind.needs)

    def _remote(self, number: int, word: str) -> dict[str, float]:
        """To object storage, and back."""
        from _kit.bare_s3_client import BareClient
        from _peers.remote import REMOTE, remove

        if word == "s3:limits":
            share = -(-self.state.stored // self.world.ranks)
            times = BareClient(list(self.state.tensors.values()), share).measure(self.seconds)
            name = "bare-"
        else:
            kind = REMOTE[word]
            self._use(kind)
            name = f"{word.removeprefix('s3:')}-{number}"
            candidate = kind(self.state, Path(name), self.world.layout)
            times = self._saves(candidate, memory=number == 0)
            if self.world.loads:
                times |= self._load(candidate, "load", memory=number == 0)
        self.barrier()
        if self.world.rank == 0:
            remove(name)
        self.settle()
        return times

    def _limits(self) -> dict[str, float]:
        times = self._bare().measure(self.seconds, forget)
        self.settle()
        return times

    def _bare(self) -> Limits:
        path = Path(self.world.folder, f"limit-{self.world.rank}")
        share = -(-self.state.stored // self.world.ranks)
        return Limits(list(self.state.tensors.values()), share, path)

    def _stalls(self) -> dict[str, float]:
        folder = Path(self.world.folder, "stalls")
        candidate = CANDIDATES["shardckpt"](self.state, folder, self.world.layout)
        self._prepare(candidate)
        bare = self._bare()
        with bare.buffer() as memory:
            times, measured = measure_stalls(self, candidate, lambda: bare.copy(memory), self.world.stalls)
        candidate.close()
        self._remove(folder)
        everyone: list[list[Measured]] = [[]] * self.world.ranks
        dist.all_gather_object(everyone, measured, group=self.control)
        return times | {"slow": slow_saves_table(everyone)}

    def _first(self) -> dict[str, float]:
        folder = Path(self.world.folder, "first")
        bare = self._bare()
        with bare.buffer() as memory:
            bare.copy(memory)
            times = {"copy": self.seconds(lambda: bare.copy(memory))}
        made = itertools.count()

        def make(word: str) -> Candidate:
            return CANDIDATES[word](self.state, folder / str(next(made)), self.world.layout)

        times |= measure_first(self, list(FIRST), make, _FIRST_STEPS)
        self._remove(folder)
        return times

    def _training(self, word: str) -> dict[str, float]:
        folder = Path(self.world.folder, f"training-{word}")
        candidate = CANDIDATES[word](self.state, folder, self.world.layout)
        self._prepare(candidate)
        save_and_wait(candidate, 1)
        self.settle()
        times = measure_training(self, candidate, self.world.window)
        candidate.close()
        self._remove(folder)
        return times

    def _profile(self) -> dict[str, float]:
        """Two saves and two loads of shardckpt; the mean over the ranks that did a thing."""
        folder = Path(self.world.folder, "profile")
        candidate = CANDIDATES["shardckpt"](self.state, folder, self.world.layout)
        self._prepare(candidate)
        profile = Profile()
        for step, name in enumerate(("first save", "steady save"), start=1):
            self.settle()
            with profile.phase("save", name):
                self.seconds(partial(save_and_wait, candidate, step))
        candidate.close()
        for name, cold in (("load, cold", True), ("load, warm", False)):
            self._cache(folder, cold=cold)
            self.state.wipe()
            with profile.phase("load", name):
                self.seconds(candidate.load)
            self.state.check()
        self._remove(folder)
        everyone: list[dict[str, float]] = [{}] * self.world.ranks
        dist.all_gather_object(everyone, profile.results, group=self.control)
        keys = dict.fromkeys(key for results in everyone for key in results)  # rank 0 alone commits
        return {key: statistics.mean(of[key] for of in everyone if key in of) for key in keys}

    def _saves(self, candidate: Candidate, *, memory: bool) -> dict[str, float]:
        self._memory("save", begin=True, wanted=memory)
        self._prepare(candidate)
        last = 2 if candidate.again else 1
        times = self._save(candidate, 1, "first_", spoil=memory and last == 1)
        if candidate.again:
            times |= self._save(candidate, 2, "", spoil=memory)
        self._memory("save", begin=False, wanted=memory)
        if candidate.recalls and not memory:
            times |= self._two_in_flight(candidate)
        if candidate.recalls and self.world.loads:
            times |= self._recall(candidate)
        candidate.close()
        gc.collect()
        return times

    def _two_in_flight(self, candidate: Candidate) -> dict[str, float]:
        """A save while the one before is still written; until both are durable."""
        self.settle()

        def save_twice() -> None:
            for wait in [candidate.save(3), candidate.save(4)]:
                wait()

        return {"pair_durable": self.seconds(save_twice)}

    def _prepare(self, candidate: Candidate) -> None:
        candidate.prepare()
        if candidate.prepares:
            time.sleep(_FIRST_STEPS)
        self.settle()

    def _recall(self, candidate: Candidate) -> dict[str, float]:
        """Load from memory what this job has saved."""
        tiers: list[str] = []
        self.state.wipe()
        seconds = self.seconds(lambda: tiers.append(candidate.recall()))
        self.state.check()
        if tiers != ["memory"]:
            print(f"rank {self.world.rank} recalled from {tiers}, not from memory", file=sys.stderr)
        return {"recall" if tiers == ["memory"] else "recall_elsewhere": seconds}

    def _save(self, candidate: Candidate, step: int, prefix: str, *, spoil: bool) -> dict[str, float]:
        """A save; with `spoil` the state is destroyed as soon as it may change, for a load to show the truth."""
        self.settle()
        self.barrier()
        cpu, started = time.process_time(), time.perf_counter()
        wait = candidate.save(step)
        stalled = time.perf_counter()
        if spoil:
            self.barrier()
            self.state.wipe()
        wait()
        written = time.perf_counter()
        candidate.sync()
        durable = time.perf_counter()
        times = self.slowest([stalled - started, written - started, durable - started])
        names = (f"{prefix}stall", f"{prefix}written", f"{prefix}durable")
        return dict(zip(names, times, strict=True)) | {f"{prefix}cpu": self._cpu_since(cpu)}

    def _loads(self, candidate: Candidate, *, memory: bool) -> dict[str, float]:
        times = {}
        for name, cold in (("cold", True), ("warm", False)):
            self._cache(candidate.folder, cold=cold)
            times |= self._load(candidate, name, memory=memory and cold)
        gc.collect()
        return times

    def _load(self, candidate: Candidate, name: str, *, memory: bool) -> dict[str, float]:
        self.state.wipe()
        self._memory("load", begin=True, wanted=memory)
        cpu = time.process_time()
        times = {name: self.seconds(candidate.load), f"{name}_cpu": self._cpu_since(cpu)}
        self._memory("load", begin=False, wanted=memory)
        self.state.check()
        return times

    def seconds(self, function: Callable[[], object]) -> float:
        """How long it takes, all ranks starting together, until the last has done it."""
        self.barrier()
        started = time.perf_counter()
        function()
        return self.slowest([time.perf_counter() - started])[0]

    def slowest(self, times: list[float]) -> list[float]:
        """The largest of all ranks, of each."""
        tensor = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return [float(value) for value in tensor]

    def _cpu_since(self, before: float) -> float:
        """The CPU time of all ranks' processes; `before` is what this one had used at the start."""
        return self.total([time.process_time() - before])[0]

    def total(self, numbers: list[float]) -> list[float]:
        """The sum over all ranks, of each."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor]

    def barrier(self) -> None:
        """Return when all ranks are here."""
        self.slowest([0.0])

    def report(self, **event: Any) -> None:
        """Tell the bench, if this is rank 0."""
        if self.world.rank == 0:
            os.write(self.world.report, (json.dumps(event) + "\n").encode())

    def _memory(self, what: str, *, begin: bool, wanted: bool) -> None:
        if wanted:
            self.barrier()
            self.report(event="memory", what=what, begin=begin)
            time.sleep(_PAUSE)

    def _cache(self, folder: Path, *, cold: bool) -> None:
        """Have nothing, or everything, of these files in the page cache."""
        if self.world.rank == 0:
            for path in folder.rglob("*"):
                if path.is_file():
                    forget(path) if cold else remember(path)
        if cold:
            self._touch_free_memory()
        self.barrier()

    def settle(self) -> None:
        """Nothing is left to write back from what went before."""
        self.barrier()
        if self.world.rank == 0:
            os.sync()
        self._touch_free_memory()
        self.barrier()

    def _touch_free_memory(self) -> None:
        if self._timed:  # else it would be taken for the candidate's
            touch_free_memory(2 * self.state.stored // self.world.ranks)

    def _remove(self, folder: Path) -> None:
        self.barrier()
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.settle()


def save_and_wait(candidate: Candidate, step: int) -> None:
    """A whole save."""
    candidate.save(step)()


def forget(path: Path) -> None:
    """Drop a file, which is on the disk already, from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def remember(path: Path) -> None:
    """Have all of a file in the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 << 20)
        while file.readinto(buffer):
            pass


def main() -> None:
    world = World(**json.loads(sys.argv[1]))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{world.store}",
        rank=world.rank,
        world_size=world.ranks,
        timeout=timedelta(seconds=90),
    )
    try:
        Bench(world).run()
    except CandidateError:
        os._exit(1)  # its groups may be in no state to be taken down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
