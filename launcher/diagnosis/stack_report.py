"""Reads the stacks of workers: where each of them is, and which ranks wait for which. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.formatting import name_ranks

__all__ = ["Frame", "RankStack", "Thread", "locate_child", "parse_dump", "read_stack", "summarize"]

_MAX_CHILDREN_SHOWN = 3

# Patterns are compiled when they are used: most agents never need them, and all pay for their start.
_LIBRARY = r"/lib(64)?/python\d[.\d]*/|^<frozen "
_TORCH_OR_STDLIB = r"/python\d[.\d]*/(?!(site|dist)-packages/)|-packages/torch/|^<frozen "
_OWN = tuple(
    f"{Path(__file__).resolve().parents[1].with_name(name)}/" for name in ("launcher", "shardckpt")
)

_COLLECTIVE = (
    r"(all_gather|all_reduce|all_to_all|barrier|broadcast|gather|monitored_barrier|permute_tensor|reduce"
    r"|reduce_scatter|scatter|send|recv|isend|irecv|batch_isend_irecv)(_\w+)?|new_(sub)?groups?(_\w+)?"
    r"|split_group|init_process_group|destroy_process_group|init_device_mesh|wait_tensor"
)
"""Public functions of torch.distributed and its functional collectives that wait for other ranks."""

_BLOCKING_FILES = (
    r"/torch/distributed/(distributed_c10d|utils|rendezvous|_functional_collectives|nn/functional)\.py$"
)
_LIBRARY_LABELS = (
    ("/torch/distributed/fsdp/", "FSDP"),
    ("/torch/distributed/_composable/fsdp/", "FSDP"),
    ("/torch/distributed/tensor/", "DTensor"),
    ("/torch/distributed/_tensor/", "DTensor"),
    ("/torch/distributed/checkpoint/", "DCP"),
    ("/torch/distributed/pipelining/", "pipeline"),
    ("/torch/distributed/optim/", "ZeRO"),
    ("/torch/nn/parallel/", "DDP"),
    ("/deepspeed/", "DeepSpeed"),
    (_OWN[1], "shardckpt"),
)
_NATIVE_WAITS = (
    (r"c10d::Reducer::", "all_reduce (DDP)"),
    (r"\bnccl(Comm\w+|[A-Z]\w+)", "NCCL"),
    (r"c10d::\w*Store::", "the store"),
    (r"c10d::Work::wait|c10d::ProcessGroup\w*::", "Work.wait"),
    (r"\bcu(da)?(Stream|Device|Event|Ctx)Synchronize", "a CUDA synchronization"),
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One call on a stack. `file` is a library, and `line` 0, for native code."""

    name: str
    file: str
    line: int
    short_file: str = ""

    @property
    def is_native(self) -> bool:
        return self.line == 0

    @property
    def is_users(self) -> bool:
        """True if it is in the user's code: not in a library, in Python or in this project."""
        return not (self.is_native or re.search(_LIBRARY, self.file) or self.file.startswith(_OWN))

    @property
    def place(self) -> str:
        """`train.py:88 in load_batch`"""
        return f"{self.short_file or self.file}:{self.line} in {self.name.replace('.<locals>', '')}"


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread's stack, innermost frame first."""

    name: str
    tid: int
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class RankStack:
    """Where one worker is."""

    rank: int
    pid: int
    where: str | None = None  # the innermost frame of the user's code: "train.py:88 in load_batch"
    source: tuple[str, int] | None = None  # the file and line of that frame
    code: str | None = None  # the text of that line
    inside: str | None = None  # the innermost frame of a library that the user's code has called
    collective: str | None = None  # the collective in which it waits: "all_reduce", "all_gather (FSDP)"
    halt: str | None = None  # why it cannot go on whatever the others do: "stopped by a signal", "dead"
    kernel: str | None = None  # its state in the kernel: "asleep in futex_wait_queue"
    trouble: str | None = None  # why its stack is not known
    children: tuple[str, ...] = ()  # where the processes that it has started are in the user's code


def parse_dump(text: str) -> tuple[Thread, ...]:
    """The threads in the output of `py-spy dump --json`, the main thread first.

    Raises:
        ValueError: `text` is no such output.
    """
    try:
        dumped = json.loads(text)
        if not isinstance(dumped, list):
            raise TypeError(f"expected a list, found {type(dumped).__name__}")
        threads = [_parse_thread(thread) for thread in dumped]
        pid = dumped[0]["pid"] if dumped else 0
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a dump of py-spy: {error!r}") from None
    return tuple(sorted(threads, key=lambda thread: (thread.tid != pid, thread.tid)))


def _parse_thread(thread: Mapping[str, Any]) -> Thread:
    frames = tuple(
        Frame(
            name=frame["name"],
            file=frame["filename"],
            line=0 if frame["module"] else frame["line"],
            short_file=frame["short_filename"] or "",
        )
        for frame in thread["frames"]
    )
    return Thread(thread["thread_name"] or "", thread["os_thread_id"] or 0, frames)


def read_stack(rank: int, pid: int, threads: Sequence[Thread]) -> RankStack:
    """Where a worker is, from the stacks of its threads, the main thread's first."""
    if not threads:
        return RankStack(rank, pid, trouble="it runs no Python code")
    main = threads[0].frames
    collective = _collective(main)
    if collective is None and _is_in_backward(main):
        # Autograd has threads of its own for each device, and runs hooks there.
        collective = next(filter(None, (_collective(thread.frames) for thread in threads[1:])), None)
    users = _users_frame(main)
    innermost = next((frame for frame in main if not frame.is_native), None)
    return RankStack(
        rank,
        pid,
        where=users.place if users else None,
        source=(users.file, users.line) if users else None,
        inside=innermost.place if innermost and innermost is not users else None,
        collective=collective,
    )


def _users_frame(frames: Sequence[Frame]) -> Frame | None:
    """The innermost frame of the user's code; without one, of the library nearest to it."""
    python = [frame for frame in frames if not frame.is_native]
    for accept in (
        lambda frame: frame.is_users,
        lambda frame: not re.search(_TORCH_OR_STDLIB, frame.file) and not frame.file.startswith(_OWN),
    ):
        found = next(filter(accept, python), None)
        if found is not None:
            return found
    return next(iter(python), None)


def _is_in_backward(frames: Sequence[Frame]) -> bool:
    return any(frame.name == "_engine_run_backward" for frame in frames)


def _collective(frames: Sequence[Frame]) -> str | None:
    """The public function of torch.distributed that a thread is in, with the library that called it."""
    last = None
    for number, frame in enumerate(frames):
        if frame.is_users:
            break
        if "/torch/distributed/" in frame.file and re.fullmatch(_COLLECTIVE, frame.name):
            last = number
    if last is not None:
        return frames[last].name + _label(frames[last:])
    innermost = next((frame for frame in frames if not frame.is_native), None)
    if innermost is not None and re.search(_BLOCKING_FILES, innermost.file):
        return innermost.name + _label(frames)
    native = [frame.name for frame in frames if frame.is_native]
    for pattern, name in _NATIVE_WAITS:
        if any(re.search(pattern, called) for called in native):
            return name
    return None


def _label(frames: Iterable[Frame]) -> str:
    """` (FSDP)`: the library between a collective and the user's code."""
    for frame in frames:
        if frame.is_users:
            break
        for part, label in _LIBRARY_LABELS:
            if part in frame.file:
                return f" ({label})"
    return ""


def locate_child(threads: Sequence[Thread]) -> str | None:
    """Where a process that a worker has started is in the user's code; None if it is elsewhere.

    A forked process has the frames of its parent below its own, which do not count.
    """
    for frame in threads[0].frames if threads else ():
        if frame.file.endswith("multiprocessing/process.py"):
            break
        if frame.is_users:
            return frame.place
    return None


def summarize(stacks: Mapping[int, RankStack], steps: Mapping[int, int | None]) -> tuple[str, ...]:
    """Which ranks are behind and where, and which wait for them, a line for each group of ranks.

    Ranks in a collective wait for those that are in none, or are stopped, stuck in the kernel or dead.

    Args:
        stacks: where each rank is.
        steps: the step that each has reported last.
    """
    view = _View(stacks, steps)
    halted = [rank for rank, stack in stacks.items() if stack.halt]
    blind = [rank for rank, stack in stacks.items() if stack.trouble and rank not in halted]
    seen = [rank for rank in stacks if rank not in halted and rank not in blind]
    waiting = [rank for rank in seen if stacks[rank].collective]
    free = [rank for rank in seen if not stacks[rank].collective]
    lines = view.blind(blind)
    if waiting and (halted or free):
        suspects = halted + free
        lines += view.suspects(halted, waiting) + view.suspects(free, waiting)
        pronoun = "it" if len(suspects) == 1 else "them"
        lines += view.each(waiting, lambda group: view.waits(group, f" for {pronoun}"))
    elif waiting:
        lines += view.waiting(waiting)
    else:
        lines += view.suspects(halted, free) + view.each(free, view.is_at)
    return tuple(lines)


class _View:
    """Sentences about groups of ranks that are at the same place."""

    def __init__(self, stacks: Mapping[int, RankStack], steps: Mapping[int, int | None]) -> None:
        self._stacks = stacks
        self._steps = steps

    def groups(self, ranks: Iterable[int]) -> list[list[int]]:
        """Groups of ranks at the same place, those with the lowest step first."""
        by_place: dict[tuple[object, ...], list[int]] = {}
        for rank in sorted(ranks):
            stack = self._stacks[rank]
            place = (stack.halt, stack.collective, stack.where, stack.kernel if stack.trouble else None)
            by_place.setdefault((self._steps.get(rank), *place, stack.trouble), []).append(rank)
        return sorted(by_place.values(), key=self._progress)

    def _progress(self, group: Sequence[int]) -> tuple[float, int]:
        step = self._steps.get(group[0])
        return (float("inf") if step is None else step, len(group))

    def each(self, ranks: Iterable[int], sentence: Callable[[list[int]], str]) -> list[str]:
        return [sentence(group) for group in self.groups(ranks)]

    def suspects(self, ranks: Sequence[int], others: Sequence[int]) -> list[str]:
        """Lines about the ranks that `others` wait for."""
        lines = []
        furthest = max((step for rank in others if (step := self._steps.get(rank)) is not None), default=0)
        for group in self.groups(ranks):
            first = self._stacks[group[0]]
            step = self._steps.get(group[0])
            if first.halt:
                what = first.halt
            elif step is not None and step < furthest:
                what = "behind"
            else:
                what = "in no collective"
            details = ", ".join(filter(None, (self._step(group), self._place(first))))
            lines.append(f"{_are(group)} {what}: {details}" if details else f"{_are(group)} {what}")
            for rank in group:
                shown = self._stacks[rank].children[:_MAX_CHILDREN_SHOWN]
                lines += [f"  rank {rank} has {child}" for child in shown]
        return lines

    def waiting(self, ranks: Sequence[int]) -> list[str]:
        """Lines about ranks that are all in a collective."""
        groups = self.groups(ranks)
        most = max(groups, key=len)
        lines = []
        for group in groups:
            stack, usual = self._stacks[group[0]], self._stacks[most[0]]
            if len(most) * 2 > len(ranks) and stack.collective != usual.collective:
                odd = f"{_are(group)} in {stack.collective} while the others are in {usual.collective}"
                lines.append(f"{odd}{self._at_step(group)}{self._called(stack)}")
            else:
                lines.append(self.waits(group, ""))
        if len(most) * 2 <= len(ranks):
            lines.append("they wait for each other")
        return lines

    def waits(self, group: Sequence[int], for_whom: str) -> str:
        stack = self._stacks[group[0]]
        verb = "wait" if len(group) > 1 else "waits"
        where = f"in {stack.collective}{self._at_step(group)}{self._called(stack)}"
        return f"{name_ranks(group)} {verb}{for_whom} {where}"

    def is_at(self, group: Sequence[int]) -> str:
        place = ", ".join(filter(None, (self._step(group), self._place(self._stacks[group[0]]))))
        return f"{name_ranks(group)}: {place}"

    def blind(self, ranks: Sequence[int]) -> list[str]:
        """Lines about ranks whose stacks are not known: why, and what else is known of them."""
        by_reason: dict[str, list[int]] = {}
        for rank in sorted(ranks):
            by_reason.setdefault(self._stacks[rank].trouble or "", []).append(rank)
        lines = []
        for reason, group in by_reason.items():
            lines.append(f"no stacks of {name_ranks(group)}: {reason}")
            for alike in self.groups(group):
                known = ", ".join(filter(None, (self._step(alike), self._stacks[alike[0]].kernel)))
                lines += [f"  {name_ranks(alike)}: {known}"] if known else []
        return lines

    def _step(self, group: Sequence[int]) -> str:
        step = self._steps.get(group[0])
        return "" if step is None else f"step {step}"

    def _at_step(self, group: Sequence[int]) -> str:
        step = self._step(group)
        return f" at {step}" if step else ""

    def _called(self, stack: RankStack) -> str:
        return f", called at {stack.where}" if stack.where else ""

    def _place(self, stack: RankStack) -> str:
        if stack.where is None:
            return ""
        if stack.collective:
            return f"in {stack.collective}{self._called(stack)}"
        code = f" ({stack.code})" if stack.code else ""
        inside = f", inside {stack.inside}" if stack.inside else ""
        return f"in {stack.where}{code}{inside}"


def _are(ranks: Sequence[int]) -> str:
    return f"{name_ranks(ranks)} {'are' if len(ranks) > 1 else 'is'}"
