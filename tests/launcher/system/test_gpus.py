"""Processes that hold GPUs."""

from __future__ import annotations

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
    (tmp_path / "proc/11").mkdir()  # another user's: its open files are not visible
    (tmp_path / "proc/self").symlink_to("10")
    return tmp_path


def test_who_holds_what(machine: Path) -> None:
    assert find_gpu_holders(machine) == [
        GpuHolder(9, "python train.py", "/dev/nvidia0"),
        GpuHolder(9, "python train.py", "/dev/nvidia1"),
        GpuHolder(10, "python train.py", "/dev/nvidia0"),
    ]


def test_on_a_machine_without_gpus_no_process_is_read(machine: Path) -> None:
    """Files that are open in processes do not count then."""
    for name in ("nvidia0", "nvidia1"):
        (machine / "dev" / name).unlink()
    assert find_gpu_holders(machine) == []
    assert find_gpu_holders(machine / "nowhere") == []
