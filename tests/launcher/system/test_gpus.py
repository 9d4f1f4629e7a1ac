"""Who holds a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.system.gpus import GpuHolder, find_gpu_holders


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with two GPUs, and processes that have files open."""
    devices = {10: ["nvidiactl", "nvidia0", "null"], 9: ["nvidia1", "nvidia1", "nvidia0"], 8: ["nvidiactl"]}
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / "dev" / name).touch()
    for pid, names in devices.items():
        (tmp_path / f"proc/{pid}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/cmdline").write_bytes(b"python\0train.py\0")
        for fd, name in enumerate(names):
            (tmp_path / f"proc/{pid}/fd/{fd}").symlink_to(f"/dev/{name}")
    (tmp_path / "proc/9/fd/7").symlink_to("socket:[12]")
    (tmp_path / "proc/9/fd/8").symlink_to("/home/me/nvidia0")
    (tmp_path / "proc/11").mkdir()  # somebody else's: what it has open is not to be seen
    (tmp_path / "proc/self").symlink_to("10")
    return tmp_path


def test_who_holds_what(machine: Path) -> None:
    assert find_gpu_holders(machine) == [
        GpuHolder(9, "python train.py", "/dev/nvidia0"),
        GpuHolder(9, "python train.py", "/dev/nvidia1"),
        GpuHolder(10, "python train.py", "/dev/nvidia0"),
    ]


def test_without_gpus_no_process_is_looked_at(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1"):
        (machine / "dev" / name).unlink()
    looked: list[str] = []
    listed = os.listdir
    monkeypatch.setattr("os.listdir", lambda path: looked.append(str(path)) or listed(path))
    assert find_gpu_holders(machine) == []
    assert looked == [str(machine / "dev")]
    assert find_gpu_holders(machine / "nowhere") == []
