"""A process of scripts/bench/gpu: one of its parts, reported as lines of JSON in a file.

    _gpu_rank.py {save,reshard,life} SETTINGS

SETTINGS is a `Settings` as JSON. "save" is a job of one process that saves and loads; "reshard" is one rank of
another world, which loads the same checkpoint; "life" is a worker of `launch` that is killed, and its successor.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

begun = time.time()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from _kit.limits import Limits, touch_free_memory  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Shard  # noqa: E402

import shardckpt  # noqa: E402

__all__ = ["Settings"]

_NEVER = 10**9  # steps
_LARGE = 64 << 20  # bytes of most tensors, if there are enough
_BUFFER = 1 << 30
_DISK_SAMPLE = 4 << 30


@dataclass(frozen=True)
class Settings:
    """What a process is to do.

    Attributes:
        log: the file to report in.
        run: the run's folder.
        device: "cuda" or "cpu".
        nbytes: bytes of the state.
        seconds: window of the compute loop.
    """

    log: str
    run: str
    device: str
    nbytes: int
    seconds: float

    def report(self, **event: Any) -> None:
        """Append a line to the log."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (json.dumps(event) + "\n").encode())
        os.close(descriptor)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, function: Callable[[], object]) -> float:
        """How long it takes, with all that it has the device do."""
        self.synchronize()
        started = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - started

    def sizes(self) -> list[int]:
        """Elements of each tensor, float32, an even number: large ones, and up to 64 small ones."""
        large = max(2, min(_LARGE, self.nbytes // 16) // 8 * 2)
        count = max(1, self.nbytes // (4 * large))
        return [*[large] * count, *[1024] * min(count, 64)]

    def tensors(self, share: int = 1) -> dict[str, torch.Tensor]:
        """The state's tensors, or an equal share of each; their content is not set."""
        sizes = enumerate(self.sizes())
        return {f"{number}": torch.empty(size // share, device=self.device) for number, size in sizes}


def expected(number: int, start: int, count: int, device: str) -> torch.Tensor:
    """What the elements from `start` on of tensor `number` are."""
    return (
        torch.arange(start, start + count, device=device).mul_(7).add_(number).remainder_(1 << 20).float()
    )


def fill(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(expected(int(name), 0, tensor.numel(), str(tensor.device)))


def check(tensors: dict[str, torch.Tensor], start: Callable[[torch.Tensor], int] = lambda _: 0) -> None:
    """Raise AssertionError unless each tensor is as `fill` made it."""
    for name, tensor in tensors.items():
        right = expected(int(name), start(tensor), tensor.numel(), str(tensor.device))
        assert torch.equal(tensor, right), f"tensor {name} is not what was saved"


def wipe(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(-1)


def limits(settings: Settings, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of bare copies of the whole state to pinned memory and back; bytes per second of the disk."""
    buffer = torch.empty(min(_BUFFER, settings.nbytes) // 4, pin_memory=settings.device == "cuda")
    buffer.zero_()

    def copy(*, back: bool) -> None:
        end = 0
        for tensor in tensors.values():
            start = end if end + tensor.numel() <= buffer.numel() else 0
            end = start + tensor.numel()
            host = buffer[start:end]
            _ = tensor.copy_(host, non_blocking=True) if back else host.copy_(tensor, non_blocking=True)

    copy(back=False)
    out = settings.timed(lambda: copy(back=False))
    into = settings.timed(lambda: copy(back=True))
    size = min(_DISK_SAMPLE, settings.nbytes)
    disk = Limits([torch.zeros(size // 4)], size, Path(f"{settings.run}.limit"))
    times = disk.measure(settings.timed, lambda _: os.sync())
    return {"out": out, "in": into, "write": size / times["write"], "read": size / times["read_direct"]}


def compute(settings: Settings, goes_on: Callable[[], bool]) -> float:
    """Matrix products per second while `goes_on`."""
    one = torch.ones(4096 if settings.device == "cuda" else 256, device=settings.device)
    one = one.expand(len(one), len(one)).contiguous()
    out = torch.empty_like(one)
    torch.mm(one, one, out=out)
    settings.synchronize()
    count, started = 0, time.perf_counter()
    while goes_on():
        torch.mm(one, one, out=out)
        settings.synchronize()
        count += 1
    return count / (time.perf_counter() - started)


def window(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


def save(settings: Settings) -> None:
    """A job of one process: limits, saves, training while saving, restore from memory and from the disk."""
    tensors = settings.tensors()
    fill(tensors)
    touch_free_memory(min(settings.nbytes, 4 << 30))
    settings.report(event="limits", **limits(settings, tensors))
    fill(tensors)
    settings.synchronize()
    objects = {"tensors": tensors}
    with shardckpt.Checkpointer(settings.run, every_steps=_NEVER, keep_last=1) as manager:
        manager.restore(objects)
        for step, name in enumerate(("first", "second"), start=1):
            started = time.perf_counter()
            handle = manager.save(step, objects)
            stall = time.perf_counter() - started
            if step == 1:
                wipe(tensors)  # for a load to show whether the copy was complete
                settings.synchronize()
            handle.wait()
            settings.report(event=name, stall=stall, durable=time.perf_counter() - started)
            if step == 1:
                report_load(settings, "memory", lambda: manager.restore(objects).tier, tensors)  # type: ignore[union-attr]
        alone = compute(settings, window(settings.seconds))
        handle = manager.save(3, objects)
        meanwhile = compute(settings, lambda: handle.busy)
        handle.wait()
        settings.report(event="training", alone=alone, meanwhile=meanwhile)
    report_load(settings, "disk", lambda: shardckpt.load(settings.run, objects).tier, tensors)


def report_load(
    settings: Settings, name: str, load: Callable[[], str], tensors: dict[str, torch.Tensor]
) -> None:
    wipe(tensors)
    tiers: list[str] = []
    seconds = settings.timed(lambda: tiers.append(load()))
    check(tensors)
    settings.report(event=name, seconds=seconds, tier=tiers[0])


def reshard(settings: Settings) -> None:
    """A rank of another world, whose ranks share the device: half of each tensor, or a third, and so on."""
    dist.init_process_group("gloo")  # NCCL refuses several ranks on one device
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(settings.device, (ranks,))
    local = settings.tensors(ranks)
    sharded = {
        name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
        for name, tensor in local.items()
    }
    settings.synchronize()
    dist.barrier()
    seconds = settings.timed(lambda: shardckpt.load(settings.run, {"tensors": sharded}))
    check(local, lambda tensor: rank * tensor.numel())
    settings.report(event="reshard", seconds=seconds)
    dist.destroy_process_group()


def life(settings: Settings) -> None:
    """A worker: joins, restores what there is, saves, and waits to be killed; its successor ends."""
    is_gpu = settings.device == "cuda"
    dist.init_process_group("nccl" if is_gpu else "gloo")
    total = torch.ones(1, device=settings.device)
    dist.all_reduce(total)
    assert float(total) == dist.get_world_size()
    joined = time.time()
    free = torch.cuda.mem_get_info()[0] if is_gpu else 0
    tensors = settings.tensors()
    with shardckpt.Checkpointer(settings.run, every_steps=_NEVER) as manager:
        started = time.perf_counter()
        loaded = manager.restore({"tensors": tensors})
        settings.synchronize()
        restored = time.perf_counter() - started
        tier = "" if loaded is None else loaded.tier
        if loaded is None:
            fill(tensors)
            settings.synchronize()
            manager.save(1, {"tensors": tensors}).wait()
        check(tensors)
        settings.report(
            event="life",
            pid=os.getpid(),
            begun=begun,
            joined=joined,
            free=free,
            restored=restored,
            tier=tier,
        )
        while loaded is None:
            signal.pause()
    dist.destroy_process_group()


PARTS: dict[str, Callable[[Settings], None]] = {"save": save, "reshard": reshard, "life": life}

if __name__ == "__main__":
    PARTS[sys.argv[1]](Settings(**json.loads(sys.argv[2])))
