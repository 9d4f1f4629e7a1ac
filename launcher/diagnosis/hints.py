"""Hints: what a user may do about a failure. Pure.

A hint follows from evidence alone: none names the network of a job on one host, or full memory where an
allocation failed for another reason.
"""

from __future__ import annotations

import re

from launcher.diagnosis.reports import Death

__all__ = ["hint_for"]

_LATE = "another rank did not come to this collective in time; --hang-timeout tells where each is"
_LOST_PEER = "no rank failed by itself before that: "
_AT_ONE_HOST = f"{_LOST_PEER}what the others wrote is in their logs"
_BETWEEN_HOSTS = f"{_LOST_PEER}look at the others' logs, and at the network between the nodes"

# Patterns are compiled when they are used: most agents never need them, and all pay for their start.
_HINTS = (
    (
        r"DataLoader worker .* killed by signal: Bus|insufficient shared memory",
        "/dev/shm is full, or too small for what DataLoader workers hand over: fewer workers, or a larger one",
    ),
    (
        r"DataLoader worker .* killed by signal: Kill",
        "something killed a DataLoader worker: the kernel does when memory runs out, and its log says so (dmesg)",
    ),
    (r"DataLoader worker .* exited unexpectedly", "a DataLoader worker died: its own words are in the log"),
    (r"CUDA out of memory|OutOfMemoryError|CUDA_ERROR_OUT_OF_MEMORY", "the GPU's memory is full"),
    (
        r"uncorrectable ECC|GPU is lost|fallen off the bus",
        "the GPU, or its driver, reports a hardware error: see nvidia-smi and dmesg",
    ),
    (r"invalid device ordinal", "fewer GPUs are visible than this rank needs"),
    (
        r"no CUDA-capable device|device\(s\) is/are busy or unavailable",
        "the GPU is missing, or held by others",
    ),
    (
        r"re-initialize CUDA in forked",
        "CUDA was used before the fork: not in a preloaded module, or --cold",
    ),
    (
        r"CUDA error: |device-side assert",
        "the line may be a later one than the guilty: CUDA_LAUNCH_BLOCKING=1",
    ),
    (r"NCCL error|nccl\w+Error|unhandled (system|cuda) error", "NCCL_DEBUG=WARN tells more"),
    (
        r"\bMemoryError\b|DefaultCPUAllocator: can't allocate",
        "more memory was asked for at once than could be had; a limit may be set (`ulimit -v`)",
    ),
    (r"inotify watch limit", "raise fs.inotify.max_user_watches, or watch fewer files"),
    (r"No space left on device", "the file system of that file is full, or has no inodes left: df, df -i"),
    (r"Disk quota exceeded", "the user's quota there is used up: quota -s"),
    (r"Too many open files in system", "the machine's limit of open files is reached: fs.file-max"),
    (r"Too many open files", "raise `ulimit -n`"),
    (r"Address already in use", "another process has the port"),
)


def hint_for(death: Death, *, is_peer_loss: bool, is_timeout: bool, ranks: int, hosts: int) -> str | None:
    """What to do about the failure that began with `death`, in a line; None if nothing is known.

    Args:
        is_peer_loss: its last words say that a peer went away, or did not come to a collective.
        is_timeout: they say that a peer did not come in time.
        ranks: number of ranks of the job that failed or ended.
        hosts: number of hosts that it ran on.
    """
    if is_peer_loss and ranks > 1:
        if is_timeout:
            return _LATE
        return _BETWEEN_HOSTS if hosts > 1 else _AT_ONE_HOST
    words = "\n".join((death.error or "", *death.lines[-3:]))
    return next((hint for pattern, hint in _HINTS if re.search(pattern, words, re.IGNORECASE)), None)
