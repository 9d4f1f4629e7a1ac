"""Processes that hold GPUs open, to be named when a device is not free after a job's end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GpuHolder", "find_gpu_holders"]

_DEVICE = r"nvidia\d+"  # nvidiactl and nvidia-uvm are open also without any GPU's memory


@dataclass(frozen=True, order=True, slots=True)
class GpuHolder:
    """A process that has a GPU's device file open."""

    pid: int
    command: str
    device: str  # "/dev/nvidia0"


def find_gpu_holders(root: Path = Path("/")) -> list[GpuHolder]:
    """The processes that hold GPUs, one entry for each GPU, by pid.

    Processes of other users are visible to root only. On a machine without GPUs no process is read.

    Args:
        root: where /proc and /dev are.
    """
    if not any(re.fullmatch(_DEVICE, name) for name in _names(root / "dev")):
        return []
    found = set()
    for name in filter(str.isdigit, _names(root / "proc")):
        process = root / "proc" / name
        for device in _open_devices(process):
            found.add(GpuHolder(int(name), _command(process), device))
    return sorted(found)


def _open_devices(process: Path) -> Iterator[str]:
    for fd in _names(process / "fd"):
        try:
            target = (process / "fd" / fd).readlink().as_posix()
        except OSError:
            continue  # closed meanwhile
        directory, _, name = target.rpartition("/")
        if directory == "/dev" and re.fullmatch(_DEVICE, name):
            yield target


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 - names are all that is needed, of many directories
    except OSError:
        return []


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""
