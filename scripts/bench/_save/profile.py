"""Where shardckpt's own time goes in a save and a load: its functions, timed from outside.

The background of a save is seen where it is a thread of the trainers: with SHARDCKPT_SNAPSHOTS=0.
"""

from __future__ import annotations

import functools
import importlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["SPANS", "Profile", "Usage", "profile_table"]


@dataclass(frozen=True)
class Span:
    """A function to time, as "module:attribute"; deeper ones are a part of the one above."""

    what: str
    target: str
    depth: int = 0


@dataclass(frozen=True)
class Usage:
    """What a thread has used so far: seconds by the clock, on a CPU, and ready to run without one; faults."""

    clock: float
    cpu: float
    waiting: float
    faults: float

    @classmethod
    def now(cls) -> Usage:
        """Of the calling thread."""
        with open("/proc/thread-self/schedstat", "rb") as file:
            waiting = int(file.read().split()[1]) / 1e9
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        return cls(time.perf_counter(), time.thread_time(), waiting, float(faults))

    def since(self, before: Usage) -> Usage:
        """What was used since `before`."""
        return Usage(
            self.clock - before.clock,
            self.cpu - before.cpu,
            self.waiting - before.waiting,
            self.faults - before.faults,
        )


SPANS: Mapping[str, tuple[Span, ...]] = {
    "stall": (
        Span("flatten", "shardckpt.saving.session:flatten"),
        Span("plan", "shardckpt.saving.session:SaveSession._plan"),
        Span("agree", "shardckpt.ranks.world:TorchRanks.maximum"),
        Span("replicas", "shardckpt.saving.replica_check:ReplicaCheck.start"),
        Span("buffer", "shardckpt.saving.saver_backend:SaverBackend.begin"),
        Span("copy", "shardckpt.saving.staging:StagingBuffer.fill"),
        Span("hand over", "shardckpt.saving.saver_backend:SaverBackend.submit"),
    ),
    "save": (
        Span("SAVE, foreground", "shardckpt.saving.session:SaveSession.start"),
        Span("flatten", "shardckpt.saving.session:flatten", 1),
        Span("layout", "shardckpt.state.flatten:FlatState.layout", 1),
        Span("committed already?", "shardckpt.run.places:Place.is_committed", 1),
        Span("plan, when fresh", "shardckpt.saving.session:SaveSession._plan", 1),
        Span("plan_save", "shardckpt.saving.session:plan_save", 2),
        Span("buffer", "shardckpt.saving.staging:StagingBuffer.__init__", 2),
        Span("compare replicas", "shardckpt.saving.replica_check:ReplicaCheck.start", 1),
        Span("collectives", "shardckpt.ranks.world:TorchRanks.maximum", 1),
        Span("broadcast", "shardckpt.ranks.world:TorchRanks.broadcast", 1),
        Span("gather", "shardckpt.ranks.world:TorchRanks.gather", 1),
        Span("get a buffer", "shardckpt.saving.saver_backend:SaverBackend.begin", 1),
        Span("plan copies", "shardckpt.saving.staging:Copies.__init__", 1),
        Span("staging copy", "shardckpt.saving.staging:StagingBuffer.fill", 1),
        Span("foreach copy", "torch:_foreach_copy_", 2),
        Span("hand over", "shardckpt.saving.saver_backend:SaverBackend.submit", 1),
        Span("SAVE, background", "shardckpt.saving.thread_backend:persist_save"),
        Span("persist", "shardckpt.run.persist:persist", 1),
        Span("crc32c", "shardckpt.run.pack_writer:crc32c.crc32c", 2),
        Span("write pack", "shardckpt.storage:LocalStorage.write_pack", 2),
        Span("reserve", "shardckpt.storage.direct:_reserve", 3),
        Span("O_DIRECT writes", "shardckpt.storage.direct:_write_all", 3),
        Span("fsync", "os:fsync", 3),
        Span("part and records", "shardckpt.storage:LocalStorage.write", 2),
        Span("commit", "shardckpt.run.persist:commit", 1),
        Span("wait for parts", "shardckpt.run.commit:wait_for_parts", 2),
        Span("assemble", "shardckpt.run.commit:_assemble", 2),
        Span("encode refs", "shardckpt.run.commit:encode_refs", 2),
        Span("encode records", "shardckpt.run.commit:encode_record", 2),
        Span("create manifest", "shardckpt.storage:LocalStorage.create", 2),
    ),
    "load": (
        Span("LOAD", "shardckpt.loading.load:load_place"),
        Span("manifest", "shardckpt.loading.load:shared_manifest", 1),
        Span("read and decode", "shardckpt.loading.load:read_manifest", 2),
        Span("bind targets", "shardckpt.loading.load:bind_state", 1),
        Span("fill", "shardckpt.loading.load:fill", 1),
        Span("plan reads", "shardckpt.loading.fill:plan_reads", 2),
        Span("verify first", "shardckpt.loading.fetch:Fetcher.verify_first", 2),
        Span("load", "shardckpt.loading.fetch:Fetcher.load", 2),
        Span("one request", "shardckpt.loading.fetch:Fetcher._pass_group", 3),
        Span("crc32c", "shardckpt.loading.fetch:crc32c.crc32c", 4),
        Span("read from the cache", "shardckpt.storage.local_file:LocalFile.read_cached", 4),
        Span("read past it", "shardckpt.storage.local_file:LocalFile.read_direct", 4),
        Span("write a chunk", "shardckpt.loading.scatter:ArrayScatter.write", 4),
        Span("agree on what is verified", "shardckpt.loading.fill:agree", 2),
        Span("agree on a step", "shardckpt.ranks.world:agree", 2),
        Span("apply the rest", "shardckpt.state.load_targets:LoadTargets.apply", 1),
    ),
}
"""By phase: the functions, in the order of the table."""


@dataclass
class _Sum:
    calls: int = 0
    busy: float = 0.0  # over all threads
    cpu: float = 0.0
    waiting: float = 0.0
    faults: float = 0.0
    first: float = float("inf")
    last: float = 0.0


class Profile:
    """Times the spans of a phase while it is active, in all threads of this process."""

    def __init__(self) -> None:
        self.results: dict[str, float] = {}

    @contextmanager
    def phase(self, phase: str, name: str) -> Iterator[None]:
        """Time the functions of `phase`, and note their times below `name`."""
        sums = {span.what: _Sum() for span in SPANS[phase]}
        undo = []
        for span in SPANS[phase]:
            try:
                undo.append(_patch(span.target, sums[span.what]))
            except LookupError:
                self.results[f"{name}|{span.what}|missing"] = 1.0
        try:
            yield
        finally:
            for back in reversed(undo):
                back()
        for what, of in sums.items():
            if of.calls:
                values = {"calls": of.calls, "span": of.last - of.first, "busy": of.busy, "cpu": of.cpu}
                values |= {"waiting": of.waiting, "faults": of.faults}
                self.results |= {f"{name}|{what}|{key}": float(value) for key, value in values.items()}


def _patch(target: str, total: _Sum) -> Callable[[], None]:
    """Time a function from now on. Returns what undoes it; LookupError if there is no such function."""
    module, _, path = target.partition(":")
    try:
        holder: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            holder = getattr(holder, parent)
        original = holder.__dict__[name]
    except (ImportError, AttributeError) as error:
        raise LookupError(target) from error

    @functools.wraps(original)
    def timed(*arguments: Any, **named: Any) -> Any:
        started = Usage.now()
        try:
            return original(*arguments, **named)
        finally:
            ended = Usage.now()
            used = ended.since(started)
            total.calls += 1
            total.busy += used.clock
            total.cpu += used.cpu
            total.waiting += used.waiting
            total.faults += used.faults
            total.first, total.last = min(total.first, started.clock), max(total.last, ended.clock)

    setattr(holder, name, timed)
    return lambda: setattr(holder, name, original)


def profile_table(values: Mapping[str, float]) -> str:
    """One block for each phase that was timed."""
    names = list(dict.fromkeys(key.split("|")[0] for key in values))
    lines = []
    for name in names:
        phase = "save" if "save" in name else "load"
        lines.append(f"{name:32}{'calls':>8}{'span ms':>10}{'busy ms':>10}{'CPU ms':>10}")
        for span in SPANS[phase]:
            key = f"{name}|{span.what}|"
            if f"{key}calls" in values:
                cells = [f"{'  ' * (span.depth + 1) + span.what:32}{values[f'{key}calls']:8.0f}"]
                cells += [f"{1e3 * values[key + what]:10.1f}" for what in ("span", "busy", "cpu")]
                lines.append("".join(cells))
            elif f"{key}missing" in values:
                lines.append(f"{'  ' * (span.depth + 1) + span.what:32}  no function {span.target}")
        lines.append("")
    return "\n".join(lines)
