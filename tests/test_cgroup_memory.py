"""The memory that control groups leave: made-up machines of both versions, and a real group."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cgroup_memory import memory_groups, memory_room
from tests.kit.machines import OWN, Machine, memory_cgroup

GIB = 1 << 30
MIB = 1 << 20
LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}
USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
TOP = {1: "sys/fs/cgroup/memory", 2: "sys/fs/cgroup"}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.room(50 * GIB)
    return made


def group(machine: Machine, version: int, path: str, limit: str, usage: int, stat: str = "") -> None:
    (machine.version_1 if version == 1 else machine.version_2)()
    machine.write(f"{TOP[version]}{path}/{LIMITS[version]}", f"{limit}\n")
    machine.write(f"{TOP[version]}{path}/{USAGE[version]}", f"{usage}\n")
    machine.write(f"{TOP[version]}{path}/memory.stat", stat)


def free(machine: Machine) -> int:
    room = memory_room(root=machine.root)
    assert room is not None
    return room.free


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("path", [OWN, "/slurm", ""])
def test_a_limit_on_any_group_around_the_process_binds(machine: Machine, version: int, path: str) -> None:
    """As Slurm and systemd set them, not only at the top of what is mounted."""
    for other in (OWN, "/slurm", ""):
        group(machine, version, other, "max" if version == 2 else "9223372036854771712", 2 * GIB)
    group(machine, version, path, str(8 * GIB), 5 * GIB)
    room = memory_room(root=machine.root)
    assert room is not None
    assert (room.free, room.total) == (3 * GIB, 8 * GIB)
    assert str(room) == (
        f"3.0 GiB of memory is left of the cgroup limit of 8.0 GiB ({machine.root}/{TOP[version]}{path})"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_counts_which_need_not_be_the_smallest(machine: Machine, version: int) -> None:
    group(machine, version, "/slurm", str(20 * GIB), 19 * GIB)
    group(machine, version, OWN, str(8 * GIB), 2 * GIB)
    assert free(machine) == 1 * GIB


def test_without_limits_the_machine_is_what_there_is(machine: Machine) -> None:
    group(machine, 2, OWN, "max", 5 * GIB)
    room = memory_room(root=machine.root)
    assert str(room) == "50.0 GiB of memory is left of the machine's 64.0 GiB"
    machine.room(GIB // 10)
    assert free(machine) // GIB == 0


def test_nothing_is_known_of_nothing(tmp_path: Path) -> None:
    assert memory_room(root=tmp_path) is None
    assert memory_groups(tmp_path) == ()


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_is_not_used_memory(machine: Machine, version: int) -> None:
    """Whether it was read once or often; but a mapped file is, and memory without a file."""
    old = "total_" if version == 1 else ""
    mapped = "total_mapped_file" if version == 1 else "file_mapped"
    cache = f"{old}inactive_file {4 * GIB}\n{old}active_file {2 * GIB}\n"
    group(machine, version, OWN, str(8 * GIB), 7 * GIB, f"inactive_file 1\nactive_file 1\n{cache}")
    assert free(machine) == 7 * GIB
    group(machine, version, OWN, str(8 * GIB), 7 * GIB, f"{cache}{mapped} {GIB}\n")
    assert free(machine) == 6 * GIB
    group(machine, version, OWN, str(8 * GIB), 7 * GIB, f"{cache}{mapped} {GIB}\n{old}shmem {GIB}\n")
    assert free(machine) == 7 * GIB, "what is mapped is no file"
    group(machine, version, OWN, str(8 * GIB), 7 * GIB, f"{cache}{mapped} {9 * GIB}\n")
    assert free(machine) == 5 * GIB


def test_where_the_kernel_throttles_is_a_bound_but_no_limit(machine: Machine) -> None:
    """memory.high: nothing is killed for it, but all of the group would crawl."""
    group(machine, 2, OWN, str(8 * GIB), 2 * GIB)
    machine.write(f"sys/fs/cgroup{OWN}/memory.high", f"{3 * GIB}\n")
    assert free(machine) == 1 * GIB
    assert memory_groups(machine.root)[0].limit == 8 * GIB


def test_more_than_the_limit_leaves_nothing(machine: Machine) -> None:
    group(machine, 2, OWN, str(GIB), 2 * GIB)
    assert free(machine) == 0


def test_mount_points_with_blanks(machine: Machine) -> None:
    machine.version_2()
    mounted = machine.root / "proc/self/mountinfo"
    mounted.write_text(mounted.read_text().replace("/sys/fs/cgroup rw", "/my\\040groups rw"))
    machine.write(f"my groups{OWN}/memory.max", f"{8 * GIB}\n")
    machine.write(f"my groups{OWN}/memory.current", f"{GIB}\n")
    assert free(machine) == 7 * GIB


def test_a_real_nested_group_that_has_read_a_file(tmp_path: Path) -> None:
    """Its limit is on the group around; what is read into the page cache takes nothing from it."""
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.write(bytes(150 * MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or this group would pay for it
    with memory_cgroup(200 * MIB) as path:
        inner = path / "task_0"
        inner.mkdir()
        script = f"""
            from pathlib import Path
            Path({str(inner / "cgroup.procs")!r}).write_text("0")
            from cgroup_memory import memory_room
            before = memory_room()
            for _ in range(3):
                with open({str(big)!r}, "rb") as file:
                    while file.read(1 << 20):
                        pass
            cache = int(Path({str(path / "memory.usage_in_bytes")!r}).read_text())
            after = memory_room()
            held = bytearray(50 << 20)
            print(before.total, cache, before.free, after.free, memory_room().free, before.group.path)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        finally:
            inner.rmdir()
    total, used, before, after, last = map(int, output[:5])
    assert total == 200 * MIB
    assert Path(output[5]) == path
    if used < 100 * MIB:
        pytest.skip("the file system has no page cache, or another group pays for it")
    assert abs(before - after) < 30 * MIB
    assert after - last >= 49 * MIB
