"""What Linux says of a machine and its memory: made up below a directory, or a real control group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["OWN", "Machine", "memory_cgroup"]

OWN = "/slurm/job_1"


class Machine:
    """The files of a kernel below a directory of ours."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal:       67108864 kB\nMemFree: 1 kB\n")
        self.write("proc/vmstat", "nr_free_pages 1\noom_kill 7\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def room(self, available: int, total: int = 64 << 30) -> None:
        """What is free on the whole machine."""
        self.write("proc/meminfo", f"MemTotal: {total >> 10} kB\nMemAvailable: {available >> 10} kB\n")

    def version_2(self, path: str = OWN, mounted: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{path}\n")
        self.write(
            "proc/self/mountinfo",
            "31 23 0:28 / /sys rw - sysfs sysfs rw\n"
            f"41 31 0:38 {mounted} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        )

    def version_1(self) -> None:
        self.write("proc/self/cgroup", f"9:name=systemd:/\n4:cpu,memory:{OWN}\n0::/\n")
        self.write(
            "proc/self/mountinfo",
            "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        )

    def events(self, kills: int, path: str = OWN, group_kills: int = 0) -> None:
        text = f"low 0\nmax 9\noom 3\noom_kill {kills}\noom_group_kill {group_kills}\n"
        self.write(f"sys/fs/cgroup{path}/memory.events", text)

    def in_first_namespace(self) -> None:
        (self.root / "proc/self/ns").mkdir(parents=True, exist_ok=True)
        (self.root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")

    def log(self, *records: str) -> None:
        self.write("dev/kmsg", "")
        with open(self.root / "dev/kmsg", "a") as file:
            file.writelines(f"6,1230,14636153205,-;{record}\n" for record in records)


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A real memory cgroup of version 1 with a limit in bytes, below this process's own. Skips without one."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"), None)
    if own is None:
        pytest.skip("no memory cgroups of version 1")
    path = Path(f"/sys/fs/cgroup/memory{own}") / f"test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error.strerror}")
    try:
        (path / "memory.limit_in_bytes").write_text(str(limit))
        yield path
    finally:
        path.rmdir()
