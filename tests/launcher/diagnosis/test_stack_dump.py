"""Stacks of processes that really hang."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.diagnosis.stack_dump import StackTaker
from launcher.events import StacksTaken
from launcher.system import processes

PATIENCE = 60.0


class Hung:
    """Starts scripts that print a line of numbers, or an empty one, when they are about to hang."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, script: str, *args: object) -> int:
        (self._path / "train.py").write_text(textwrap.dedent(script))
        process = subprocess.Popen(
            [sys.executable, "train.py", *map(str, args)],
            cwd=self._path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._started.append(process)
        return process.pid

    def wait_until_hung(self) -> list[list[int]]:
        """The numbers that each of them has printed."""
        printed = []
        for process in self._started:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the script has died"
            printed.append([int(number) for number in line.split()])
        return printed

    def end(self) -> None:
        for process in self._started:
            for child in processes.descendant_pids([process.pid]):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.communicate()
        self._started.clear()


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[Hung]:
    hung = Hung(tmp_path)
    try:
        yield hung
    finally:
        hung.end()


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., StacksTaken]:
    def take(
        pids: dict[int, int], steps: dict[int, int | None] | None = None, **options: object
    ) -> StacksTaken:
        taker = StackTaker(**options)  # type: ignore[arg-type]
        try:
            taker.start(pids, steps or {}, tmp_path / "stacks")
            poll = select.poll()
            poll.register(taker.descriptors[0], select.POLLIN)
            assert poll.poll(PATIENCE * 1000)
            (taken,) = taker.receive()
            assert isinstance(taken, StacksTaken)
            assert not taker.is_taking
            assert taker.receive() == []
            return taken
        finally:
            taker.close()

    return take


COLLECTIVE = """\
    import os, sys, torch, torch.distributed as dist
    def load_batch(rank):
        if rank == 1:
            sys.stdin.read()
        return torch.ones(1)
    def main(rank):
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=3)
        batch = load_batch(rank)
        dist.all_reduce(batch)
    pids = []
    for rank in range(3):
        pids.append(os.fork())
        if pids[-1] == 0:
            main(rank)
    print(*pids, flush=True)
    os.wait()
"""


def test_one_rank_loads_data_and_the_others_wait(
    hung: Hung, take: Callable[..., StacksTaken], tmp_path: Path
) -> None:
    hung.start(COLLECTIVE, tmp_path / "store")
    (pids,) = hung.wait_until_hung()
    try:
        for _ in range(20):  # until all have got there
            taken = take(dict(enumerate(pids)), {0: 119, 1: 118, 2: 119})
            if "rank 1 is behind" in taken.summary[0] and "all_reduce" in taken.summary[1]:
                break
    finally:
        hung.end()
    assert taken.summary == (
        "rank 1 is behind: step 118, in train.py:4 in load_batch (sys.stdin.read())",
        "ranks 0, 2 wait for it in all_reduce at step 119, called at train.py:9 in main",
    )
    whole = (Path(taken.directory) / "rank-00001.txt").read_text()
    assert whole.startswith(f"rank 1, process {pids[1]}, step 118: asleep in ")
    assert f"load_batch ({tmp_path / 'train.py'}:4)" in whole
    assert "libc.so" in whole.partition("with native frames:")[2]
    names = sorted(path.name for path in Path(taken.directory).iterdir())
    assert names == [f"rank-{rank:05d}.txt" for rank in range(3)]


DEADLOCK = """\
    import threading
    first = threading.Lock()
    def inner():
        with first:
            pass
    with first:
        print(flush=True)
        inner()
"""


def test_a_deadlock_and_a_stopped_process(hung: Hung, take: Callable[..., StacksTaken]) -> None:
    pids = {0: hung.start(DEADLOCK), 5: hung.start(DEADLOCK)}
    hung.wait_until_hung()
    os.kill(pids[5], signal.SIGSTOP)
    taken = take(pids)
    assert len(taken.summary) == 2
    whole = (Path(taken.directory) / "rank-00005.txt").read_text()
    assert taken.summary[0].startswith("rank 5 is stopped by a signal (SIGSTOP): in train.py:"), whole
    assert taken.summary[1] == "rank 0: in train.py:4 in inner (with first:)"
    assert whole.startswith(f"rank 5, process {pids[5]}: stopped by a signal")


VFORK = """\
    import os, sys
    def spawn():
        print(flush=True)
        reads = (os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)
        os.posix_spawn("/bin/true", ["true"], {}, file_actions=[reads])
    spawn()
"""


def test_uninterruptible_sleep(hung: Hung, take: Callable[..., StacksTaken], tmp_path: Path) -> None:
    """The parent of a vfork cannot be interrupted until its child, here waiting for a file, has gone on."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pid = hung.start(VFORK, fifo)
    hung.wait_until_hung()
    for _ in range(50):
        taken = take({0: pid})
        if "uninterruptible" in taken.summary[0]:
            break
    assert taken.summary[0].startswith("rank 0 is in uninterruptible sleep")
    assert "in train.py:5 in spawn (os.posix_spawn(" in taken.summary[0]
    os.close(os.open(fifo, os.O_WRONLY))


CHILD = """\
    import multiprocessing, sys
    def look_up():
        print(flush=True)
        sys.stdin = open(0)
        sys.stdin.read()
    if __name__ == "__main__":
        child = multiprocessing.get_context("fork").Process(target=look_up)
        child.start()
        child.join()
"""


def test_children_are_looked_at(hung: Hung, take: Callable[..., StacksTaken]) -> None:
    pid = hung.start(CHILD)
    hung.wait_until_hung()
    for _ in range(50):
        taken = take({0: pid})
        whole = (Path(taken.directory) / "rank-00000.txt").read_text()
        if "look_up" in whole:
            break
    assert "its process " in whole
    assert taken.summary[0].startswith("rank 0: in train.py:9 in <module> (child.join()), inside ")


def test_a_command_that_is_not_python(take: Callable[..., StacksTaken], tmp_path: Path) -> None:
    """Then what is looked at is the Python that it runs."""
    (tmp_path / "train.py").write_text("print(flush=True)\ninput()\n")
    shell = subprocess.Popen(
        ["/bin/sh", "-c", f"{sys.executable} {tmp_path / 'train.py'}; true"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    sleeper = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    try:
        assert shell.stdout is not None
        assert shell.stdout.readline()
        taken = take({0: shell.pid, 1: sleeper.pid})
    finally:
        for process in (shell, sleeper):
            process.communicate(b"\n")
    assert taken.summary[0].startswith("no stacks of rank 1: ")
    assert "rank 0: in train.py:2 in <module> (input())" in taken.summary


def test_dead_and_gone(take: Callable[..., StacksTaken]) -> None:
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    taken = take({4: gone.pid})
    assert taken.summary == ("rank 4 is dead",)


def fake(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_it_is_bounded_in_time(hung: Hung, take: Callable[..., StacksTaken], tmp_path: Path) -> None:
    """A py-spy that never ends is given up, and nothing of it is left."""
    pid = hung.start(DEADLOCK)
    hung.wait_until_hung()
    slow = fake(tmp_path / "slow", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    taken = take({0: pid}, {0: 3}, py_spy=slow, timeout=0.2)
    assert taken.summary[0].startswith("no stacks of rank 0: reading them took longer than")
    assert taken.summary[1].startswith("  rank 0: step 3, asleep")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_py_spy(hung: Hung, take: Callable[..., StacksTaken], tmp_path: Path) -> None:
    pid = hung.start(DEADLOCK)
    taken = take({0: pid}, py_spy=str(tmp_path / "nowhere"))
    assert "cannot be started: No such file or directory" in taken.summary[0]


def test_without_permission(hung: Hung, take: Callable[..., StacksTaken], tmp_path: Path) -> None:
    """The kernel refuses: one line says how it would not, and what /proc tells is told."""
    py_spy = Path(sys.executable).with_name("py-spy")
    if os.geteuid() == 0:
        powerless = (
            f"exec setpriv --bounding-set=-all --inh-caps=-all --reuid 65534 --clear-groups {py_spy}"
        )
        pids = {0: hung.start(DEADLOCK), 1: hung.start(DEADLOCK)}
        hung.wait_until_hung()
        if subprocess.run(["setpriv", "--reuid", "65534", py_spy, "-V"], check=False).returncode:
            pytest.skip("another user cannot execute py-spy")
    else:
        powerless, pids = f"exec {py_spy}", {0: 1}
    taken = take(pids, py_spy=fake(tmp_path / "spy", f'{powerless} "$@"'))
    assert (
        "no permission to trace processes: give the container the capability SYS_PTRACE" in taken.summary[0]
    )
    assert len(taken.summary) == 2


def test_close_ends_what_is_under_way(hung: Hung, tmp_path: Path) -> None:
    pid = hung.start(DEADLOCK)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    taker = StackTaker(py_spy=fake(tmp_path / "slow", f"echo $$ > {fifo}; exec sleep 1000"))
    taker.start({0: pid}, {}, tmp_path / "stacks")
    spy = int(fifo.read_text())
    taker.start({0: pid}, {}, tmp_path / "others")  # one at a time
    taker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(spy, 0)
    assert not (tmp_path / "others").exists()


def test_tracing_can_be_allowed_on_every_kernel() -> None:
    """With Yama it changes something; without, it does nothing."""
    code = "from launcher.system import processes; processes.allow_tracing()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
