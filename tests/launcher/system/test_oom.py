"""Was it the kernel's out-of-memory killer? With real kills where cgroups can be made, and made-up machines."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.system.oom import OomWatch
from tests.kit.machines import OWN, Machine, memory_cgroup


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_is_known_of_nothing(tmp_path: Path) -> None:
    watch = OomWatch(tmp_path)
    watch.mark()
    assert watch.explain(1) is None


@pytest.mark.parametrize("path", [OWN, "/slurm", "/"])
def test_counters_of_version_2(machine: Machine, path: str) -> None:
    """A counter of the own cgroup or of one around it has risen; the smallest limit is told."""
    machine.version_2()
    machine.events(2, path)
    machine.write("sys/fs/cgroup/slurm/memory.max", f"{32 << 30}\n")
    machine.write("sys/fs/cgroup/slurm/job_1/memory.max", "max\n")
    watch = OomWatch(machine.root)
    assert watch.explain(1) is None
    machine.events(3, path)
    assert watch.explain(1) == "killed by the kernel, out of memory (cgroup limit 32.0 GiB)"
    watch.mark()
    assert watch.explain(1) is None


def test_a_group_kill_counts(machine: Machine) -> None:
    machine.version_2()
    machine.events(0)
    watch = OomWatch(machine.root)
    machine.events(0, group_kills=1)
    assert watch.explain(1) == "killed by the kernel, out of memory (the machine's 64.0 GiB)"


def test_in_a_container_the_mount_shows_a_part(machine: Machine) -> None:
    """The path in /proc/self/cgroup is the host's, but what is mounted begins at the container's."""
    machine.version_2("/docker/abc", mounted="/docker/abc")
    machine.events(0, "")
    watch = OomWatch(machine.root)
    machine.events(1, "")
    assert watch.explain(1) is not None


def test_a_cgroup_out_of_sight(machine: Machine) -> None:
    machine.version_2("/../../other")
    machine.events(0, "")
    watch = OomWatch(machine.root)
    machine.events(1, "")
    assert watch.explain(1) is not None


def test_counters_of_version_1(machine: Machine) -> None:
    machine.version_1()
    control = f"sys/fs/cgroup/memory{OWN}/memory.oom_control"
    machine.write(control, "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    machine.write(f"sys/fs/cgroup/memory{OWN}/memory.limit_in_bytes", f"{1 << 30}\n")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    watch = OomWatch(machine.root)
    machine.write(control, "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert watch.explain(1) == "killed by the kernel, out of memory (cgroup limit 1.0 GiB)"


def test_the_machine_ran_out(machine: Machine) -> None:
    """That somebody was killed on the machine is a hint, not more."""
    watch = OomWatch(machine.root)
    machine.write("proc/vmstat", "oom_kill 8\n")
    assert (watch.explain(1) or "").startswith("probably killed by the kernel")


KILLED = "Killed process 1234 (python) total-vm:99kB, anon-rss:1000000kB, file-rss:1kB, shmem-rss:500000kB, UID:0"


def test_the_kernel_log_names_the_process(machine: Machine) -> None:
    machine.in_first_namespace()
    machine.log(f"Out of memory: {KILLED.replace('1234', '77')}")
    watch = OomWatch(machine.root)
    assert watch.explain(77) is None, "that was before"
    machine.write("proc/vmstat", "oom_kill 7\n")
    machine.log("python invoked oom-killer: gfp_mask=0xcc0", f"Memory cgroup out of memory: {KILLED}")
    # A kernel's log is never shortened: this one has to be as long as before, at least.
    machine.log("x" * 500, f"Memory cgroup out of memory: {KILLED}")
    for _ in range(2):
        text = watch.explain(1234)
        assert text == "killed by the kernel, out of memory (the machine's 64.0 GiB; it held 1.4 GiB)"
    assert watch.explain(123) is None
    watch.mark()
    assert watch.explain(1234) is None


def test_numbers_in_the_log_mean_nothing_in_another_namespace(machine: Machine) -> None:
    machine.log("")
    watch = OomWatch(machine.root)
    machine.log("x" * 500, f"Out of memory: {KILLED}")
    assert watch.explain(1234) is None


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A real memory cgroup of version 1 with a limit of 64 MiB."""
    with memory_cgroup(64 << 20) as path:
        yield path


def test_a_real_kill(cgroup: Path) -> None:
    """One process eats more than its cgroup may have; another is killed by somebody."""
    script = f"""
        import signal, subprocess, sys
        from pathlib import Path
        Path({str(cgroup / "cgroup.procs")!r}).write_text("0")
        from launcher.system.oom import OomWatch
        watch = OomWatch()
        plain = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        plain.kill()
        plain.wait()
        print(watch.explain(plain.pid))
        watch.mark()
        eats = "open('/proc/self/oom_score_adj', 'w').write('1000'); bytearray(256 << 20)"
        eater = subprocess.Popen([sys.executable, "-c", eats])
        print(eater.wait() == -signal.SIGKILL, watch.explain(eater.pid))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    plain, eater = result.stdout.splitlines()
    assert plain == "None"
    assert eater.startswith("True killed by the kernel, out of memory (cgroup limit 64.0 MiB")
