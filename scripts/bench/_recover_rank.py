"""A rank of scripts/bench/recover: restores, trains, saves once, is ended; its next life restores and checks.

    _recover_rank.py {shardckpt,dcp} RUN LOG GIGABYTES

Appends lines of JSON to LOG: what happened when, in seconds of CLOCK_MONOTONIC. A step changes a part of every
tensor by a rule that does not depend on the number of ranks, and its loss is a sum over that part, so that both
tell whether the state is the right one. A life that has restored ends after a few steps, having compared all of
the state with what it must be.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

begun = time.monotonic()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from _kit.state import build_objects, fill, local_tensors, make_optimizer_state  # noqa: E402

__all__ = ["SAVE_STEP", "Job"]

SAVE_STEP = 5
STEPS_AFTER = 3
_STRIDE = 4096
_NEVER = 10**9


class Ours:
    """shardckpt, from where it is nearest."""

    def __init__(self, folder: Path, objects: dict[str, Any]) -> None:
        import shardckpt

        self._objects = objects
        self._manager = shardckpt.Checkpointer(folder, every_steps=_NEVER)

    def restore(self) -> tuple[int, str]:
        """The step and the tier; 0 if there is nothing."""
        loaded = self._manager.restore(self._objects)
        return (loaded.step, loaded.tier) if loaded else (0, "")

    def step(self, step: int) -> None:
        self._manager.step(step, self._objects)

    def save(self, step: int) -> Callable[[], object]:
        return self._manager.save(step, self._objects).wait

    def close(self) -> None:
        self._manager.close()


class Peer:
    """DCP, asynchronous in the mode with the shorter stall, to the local disk."""

    def __init__(self, folder: Path, objects: dict[str, Any]) -> None:
        from _peers.dcp import DcpThread

        state: Any = SimpleNamespace(**objects)
        self._folder = folder
        self._dcp = DcpThread(state, folder, "fsdp")
        self._dcp.prepare()

    def restore(self) -> tuple[int, str]:
        steps = [int(path.parent.name.removeprefix("step-")) for path in self._folder.glob("*/.metadata")]
        if not steps:
            return 0, ""
        self._dcp.load()
        return max(steps), "local"

    def step(self, step: int) -> None:
        """It has nothing to do between saves."""

    def save(self, step: int) -> Callable[[], object]:
        return self._dcp.save(step)

    def close(self) -> None:
        self._dcp.close()


class Job:
    """The training job of one rank."""

    def __init__(self, kind: str, run: Path, log: Path, gigabytes: float) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.note("begun", when=begun)
        dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.note("joined")
        self.model, self.optimizer = build_objects(gigabytes, "fsdp")
        dist.barrier()  # so that a restore is timed from when all are ready
        self.note("built")
        objects = {"model": self.model, "optimizer": self.optimizer}
        self.saver = {"shardckpt": Ours, "dcp": Peer}[kind](run / "bench", objects)

    def run(self) -> None:
        """Train; in the first life until killed, or asked to leave."""
        step, tier = self.saver.restore()
        self.note("restored", step=step, tier=tier)
        first_life = step == 0
        if first_life:
            make_optimizer_state(self.optimizer)
        self.tensors = local_tensors(self.model, self.optimizer)
        if first_life:
            for name, (tensor, start) in self.tensors.items():
                fill(tensor, name, start)
        last = _NEVER if first_life else step + STEPS_AFTER
        while step < last:
            step += 1
            loss = self._train(step)
            self.note("step", step=step, loss=loss)
            if first_life and step == SAVE_STEP:
                self.saver.save(step)()
                dist.barrier()  # on every rank, so that it cannot be killed with less
                self.note("durable", step=step)
            else:
                self.saver.step(step)
        if not first_life:
            self._copy_bare("copied, fresh", buffer := self._buffer())
            self._copy_bare("copied", buffer)
        self.note("checked", wrong=self._wrong(step))
        dist.barrier()
        self.saver.close()
        dist.destroy_process_group()

    def _buffer(self) -> mmap.mmap:
        """Memory for a copy of this rank's tensors, which nothing has touched yet."""
        memory = mmap.mmap(-1, sum(t.nbytes for t, _ in self.tensors.values()), mmap.MAP_PRIVATE)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _copy_bare(self, what: str, memory: mmap.mmap) -> None:
        """The limit: copy this rank's tensors, while all others do, with nothing around it."""
        dist.barrier()
        began = time.monotonic()
        target = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for tensor, _ in self.tensors.values():
            ctypes.memmove(target, tensor.data_ptr(), tensor.nbytes)
            target += tensor.nbytes
        self.note(what, seconds=time.monotonic() - began)

    def note(self, event: str, when: float | None = None, **more: Any) -> None:
        """A line in the log."""
        line = {"event": event, "when": when or time.monotonic(), "pid": os.getpid(), **more}
        os.write(self._log, (json.dumps(line) + "\n").encode())

    def _train(self, step: int) -> int:
        total = torch.zeros(1, dtype=torch.int64)
        for tensor, start in self.tensors.values():
            part = _part(tensor, start, step)
            part += 1
            if part.numel() and (self.rank == 0 or tensor.dim()):  # scalars are on every rank
                total += part.sum(dtype=torch.int64)
        dist.all_reduce(total)
        return int(total)

    def _wrong(self, step: int) -> int:
        """How many of this rank's tensors are not what so many steps make of the first content."""
        wrong = 0
        for name, (tensor, start) in self.tensors.items():
            wanted = torch.empty_like(tensor)
            fill(wanted, name, start)
            for number in range(1, step + 1):
                _part(wanted, start, number).add_(1)
            wrong += not torch.equal(_integers(wanted), _integers(tensor))
        return wrong


def _part(tensor: torch.Tensor, start: int, step: int) -> torch.Tensor:
    """What a step changes of a tensor: its elements are at the same places whatever the world size."""
    return _integers(tensor)[-(start + step) % _STRIDE :: _STRIDE]


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.int32)


def main() -> None:
    kind, run, log, gigabytes = sys.argv[1:]
    torch.set_num_threads(1)
    with torch.no_grad():
        Job(kind, Path(run), Path(log), float(gigabytes)).run()


if __name__ == "__main__":
    main()
