"""How much memory the saver takes for snapshots, by what made-up machines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shardckpt.huge_pages import map_shared
from shardckpt.saver.buffers import Pressure, SnapshotMemory, empty
from tests.kit.machines import OWN, Machine, memory_cgroup

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """With a limit of 4 GiB on a group around the process, and none of it used."""
    made = Machine(tmp_path)
    made.room(50 * GIB)
    made.version_2()
    made.write("sys/fs/cgroup/slurm/memory.max", f"{4 * GIB}\n")
    made.events(0)
    use(made, 0)
    return made


def use(machine: Machine, usage: int) -> None:
    machine.write("sys/fs/cgroup/slurm/memory.current", f"{usage}\n")


def test_memory_within_the_limits(machine: Machine) -> None:
    descriptor, size = SnapshotMemory(machine.root).allocate(3 * MIB)
    with os.fdopen(descriptor) as file:
        assert size == 4 * MIB
        assert os.fstat(file.fileno()).st_blocks * 512 == size


def test_more_than_a_nested_group_leaves_is_refused(machine: Machine) -> None:
    """And some is left to training, which the kernel would kill else."""
    use(machine, 4 * GIB - 100 * MIB)
    with pytest.raises(
        MemoryError, match=r"0\.1 GiB of memory is left of the cgroup limit of 4\.0 GiB \(.*slurm"
    ):
        SnapshotMemory(machine.root).allocate(64 * MIB)
    SnapshotMemory(machine.root).allocate(32 * MIB)


def test_memory_that_runs_out_meanwhile_is_noticed(machine: Machine) -> None:
    """Before all of it is taken: what was taken is given back."""

    class Racing(SnapshotMemory):
        def _check(self, more: int, size: int) -> None:
            super()._check(more, size)
            use(machine, 4 * GIB)  # training has taken it

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(MemoryError, match=r"0\.0 GiB"):
        Racing(machine.root).allocate(200 * MIB)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_spare_snapshots_leave_more_than_the_first(machine: Machine) -> None:
    memory = SnapshotMemory(machine.root)
    use(machine, 2 * GIB)
    assert memory.lacking(1 * GIB) == ""
    assert "and one more takes 1.9 GiB" in memory.lacking(1900 * MIB)
    machine.write("sys/fs/cgroup/slurm/memory.max", "max\n")
    assert memory.lacking(1900 * MIB) == ""
    assert "the machine" in memory.lacking(49 * GIB)


def test_pressure(machine: Machine) -> None:
    memory = SnapshotMemory(machine.root)
    assert memory.pressure(GIB) is Pressure.NONE
    use(machine, 4 * GIB - 60 * MIB)
    assert memory.pressure(GIB) is Pressure.SHORT
    machine.write("sys/fs/cgroup/slurm/memory.stat", f"inactive_file {GIB}\n")
    assert memory.pressure(GIB) is Pressure.NONE, "the kernel takes cache back"
    machine.events(1, OWN)
    assert memory.pressure(GIB) is Pressure.KILLED
    assert memory.pressure(GIB) is Pressure.NONE, "that was before"


def test_little_memory_is_no_matter_however_little_is_left(machine: Machine) -> None:
    """What would not help anyone is neither refused nor given back."""
    memory = SnapshotMemory(machine.root)
    use(machine, 4 * GIB - 40 * MIB)
    assert memory.pressure(4 * MIB) is Pressure.NONE
    assert memory.lacking(4 * MIB) == ""
    os.close(memory.allocate(4 * MIB)[0])
    assert memory.pressure(GIB) is Pressure.SHORT
    with pytest.raises(MemoryError):
        memory.allocate(8 * MIB)


def test_a_real_limit_is_refused_rather_than_died_of() -> None:
    """On the group around the process's own, as Slurm and systemd have it."""
    script = """
        import sys
        from pathlib import Path
        Path(sys.argv[1], "cgroup.procs").write_text("0")
        from shardckpt.saver.buffers import SnapshotMemory
        memory = SnapshotMemory()
        memory.allocate(100 << 20)
        memory.allocate(150 << 20)
    """
    with memory_cgroup(250 * MIB) as path:
        inner = path / "task_0"
        inner.mkdir()
        command = [sys.executable, "-c", textwrap.dedent(script), str(inner)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            inner.rmdir()
    assert re.search(
        rf"MemoryError: 0\.\d GiB of memory is left of the cgroup limit of .*{path}", result.stderr
    )


def test_given_back_though_it_is_mapped() -> None:
    descriptor, size = SnapshotMemory().allocate(4 * MIB)
    mapping = map_shared(descriptor, size)
    mapping[:4] = b"data"
    empty(descriptor, size)
    assert os.fstat(descriptor).st_blocks == 0
    assert mapping[:4] == bytes(4)
    mapping.release()
    os.close(descriptor)
