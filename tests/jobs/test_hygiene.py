"""Whatever happens to a job's processes: nothing of it is left, in bounded time, with the right exit code.

test_job.py has the deaths of agent, zygote and workers; here is what processes do to evade their end, and
what happens to the terminal. The `job` fixture asserts that nothing is left.
"""

from __future__ import annotations

import ctypes
import os
import pty
import select
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.job import LAUNCH, PATIENCE, Job, lines_told, wait_for_death
from tests.kit.mounts import Mount

WAITS = """
    import os, signal, sys
    open("fifo", "w").write(f"{os.getpid()} {os.getppid()}\\n")
    while True: signal.pause()
    """


def state(pid: int) -> str:
    """One letter, as in `ps`."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while state(pid) != wanted:
        assert time.monotonic() < deadline, f"process {pid} is {state(pid)}, not {wanted}"
        time.sleep(0.002)


def pids_told(fifo: Path, count: int) -> list[list[int]]:
    """Lines of numbers from `count` processes."""
    return [[int(word) for word in line.split()] for line in lines_told(fifo, count)]


def stop(job: Job, process: subprocess.Popen[str]) -> tuple[int, float]:
    """Its exit code after SIGINT, and the seconds that it took."""
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    return job.end(process).code, time.monotonic() - started


# Processes that evade their end.

DAEMON = """
    import os, signal, sys
    def daemonize():
        if os.fork(): os._exit(0)
        os.setsid()
        if os.fork(): os._exit(0)
        os.chdir("/"); os.umask(0)
        for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(one, signal.SIG_IGN)
        os.closerange(0, 3)
    fifo = os.open("fifo", os.O_WRONLY)
    if sys.argv[1] == os.environ["RANK"]:
        daemonize()
    os.write(fifo, f"{os.getpid()} {os.getppid()}\\n".encode()); os.close(fifo)
    while True: signal.pause()
    """


def test_a_worker_that_becomes_a_daemon_has_finished(job: Job) -> None:
    """Its rank ended with 0, and the round with the other rank; the daemon ends with the round."""
    fifo = job.fifo()
    process = job.start("--nproc=2", "--grace=0.2", "--max-restarts=0", job.script(DAEMON), "0")
    daemon, other = sorted(pids_told(fifo, 2), key=lambda pids: os.getsid(pids[0]) == pids[0])
    assert daemon[0] != os.getsid(daemon[0])
    os.kill(other[0], signal.SIGKILL)
    assert job.end(process).code == 137
    wait_for_death(daemon[0])


def test_a_daemon_is_gone_before_the_next_round_begins(job: Job) -> None:
    fifo = job.fifo()
    source = """
        import os, signal, subprocess
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            deaf = "trap '' TERM HUP; echo $$ > pid; exec sleep 1000"
            subprocess.run(["setsid", "--fork", "sh", "-c", deaf])
            open("fifo", "w").close()
            signal.pause()
        print(os.path.exists("/proc/" + open("pid").read().strip()))
        """
    process = job.start("--grace=0.1", job.script(source))
    fifo.read_text()
    while not (job.path / "pid").exists() or not (job.path / "pid").read_text():
        pass
    (worker,) = (
        int(pid) for pid in _below(process.pid) if os.getsid(int(pid)) == int(pid) and _is_leaf(pid)
    )
    os.kill(worker, signal.SIGKILL)
    assert job.end(process).code == 0
    assert job.log(0, number=2) == "False\n"


@pytest.mark.parametrize("whom", ["worker", "child", "both"])
def test_stopped_processes_end_too(job: Job, whom: str) -> None:
    """SIGSTOP keeps a process from seeing SIGTERM, not from ending."""
    fifo = job.fifo()
    source = """
        import os, signal
        child = os.fork()
        if child:
            open("fifo", "w").write(f"{os.getpid()} {child}\\n")
        while True: signal.pause()
        """
    process = job.start("--grace=0.3", job.script(source))
    ((worker, child),) = pids_told(fifo, 1)
    for pid in {"worker": [worker], "child": [child], "both": [worker, child]}[whom]:
        os.kill(pid, signal.SIGSTOP)
        wait_for_state(pid, "T")
    code, seconds = stop(job, process)
    assert code == 130
    assert seconds < 10


VFORK = """
    import ctypes, os, signal, sys
    signal.signal(signal.SIGTERM, lambda *_: None)
    libc = ctypes.PyDLL(None)
    open("fifo", "w").write(f"{os.getpid()}\\n")
    if libc.vfork() == 0:
        libc.sleep(1000)
        libc._exit(0)
    """


def test_uninterruptible_sleep_that_sigkill_ends(job: Job) -> None:
    """As in NFS and most drivers: here the parent of a vfork, which sees no handler run."""
    fifo = job.fifo()
    process = job.start("--grace=0.2", job.script(VFORK))
    ((worker,),) = pids_told(fifo, 1)
    wait_for_state(worker, "D")
    code, seconds = stop(job, process)
    assert code == 130
    assert seconds < 10


@contextmanager
def deaf_file_system(folder: Path, mount: Mount) -> Iterator[threading.Event]:
    """A FUSE file system at `folder` that takes its first request and never answers, until the context ends.

    Whoever has asked sleeps, from the first signal on uninterruptibly: it does not even die of SIGKILL.
    The event is set when somebody has.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    mount("fuse", folder, options)

    asked = threading.Event()

    def serve() -> None:
        """Answer INIT (opcode 26) with version 7.31, take what comes next, and be silent."""
        request = os.read(device, 1 << 17)
        _, opcode, unique = struct.unpack_from("=IIQ", request)
        assert opcode == 26
        body = struct.pack("=IIIIHHIIHH32x", 7, 31, 65536, 0, 12, 10, 65536, 1, 32, 0)
        os.write(device, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)
        os.read(device, 1 << 17)
        asked.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        libc.umount2(str(folder).encode(), 2)  # MNT_DETACH; what waits gets ENOTCONN when the device closes
        thread.join(PATIENCE)
        os.close(device)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_uninterruptible_sleep_that_nothing_ends(job: Job, mounts: Mount) -> None:
    """A hung file system or driver: `launch` gives up on the process, and says so, in bounded time."""
    fifo = job.fifo()
    folder = job.path / "deaf"
    folder.mkdir()
    source = """
        import os, signal
        open("fifo", "w").write(f"{os.getpid()}\\n")
        os.stat("deaf/file")
        """
    with deaf_file_system(folder, mounts) as asked:
        process = job.start("--grace=0.1", job.script(source))
        ((worker,),) = pids_told(fifo, 1)
        assert asked.wait(PATIENCE)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            took = time.monotonic() - started
            left = state(worker)
    wait_for_death(worker)
    assert left == "D"  # or the test has tested nothing
    assert took < 15
    assert process.returncode == 130
    assert "nothing is left running" not in err
    assert f"pid {worker} is in uninterruptible sleep" in err


def test_a_chain_of_forks(job: Job) -> None:
    """Each process forks the next and ends, forever, so that nobody finds it where it was."""
    fifo = job.fifo()
    source = """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            while True:
                time.sleep(0.002)
                if os.fork(): os._exit(0)
        open("fifo", "w").close()
        while True: signal.pause()
        """
    process = job.start("--grace=0.1", job.script(source))
    fifo.read_text()
    code, seconds = stop(job, process)
    assert code == 130
    assert seconds < 15


def test_a_stopped_agent_goes_on(job: Job) -> None:
    """Ctrl-Z and fg: what happened meanwhile is dealt with."""
    fifo = job.fifo()
    process = job.start("--nproc=2", job.script(WAITS))
    first = pids_told(fifo, 2)
    process.send_signal(signal.SIGSTOP)
    wait_for_state(process.pid, "T")
    os.kill(first[0][0], signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    pids_told(fifo, 2)
    assert stop(job, process)[0] == 130


DATA_LOADER = """
    import os, time, torch
    from torch.utils.data import DataLoader, Dataset
    class Slow(Dataset):
        def __len__(self): return 4
        def __getitem__(self, i):
            if i == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                open("fifo", "w").write(f"{os.getpid()} {os.getppid()}\\n")
                time.sleep(1000)
            return i
    if __name__ == "__main__":
        for batch in DataLoader(Slow(), num_workers=2, batch_size=1):
            print(batch.item(), flush=True)
    """


def test_kill_9_of_a_data_loader_s_worker(job: Job) -> None:
    """The rank fails, its other children go with it, and the next round is whole.

    What torch says of it differs: it raises from a signal handler, wherever the rank is just then.
    """
    job.use_torch()
    fifo = job.fifo()
    process = job.start(job.script(DATA_LOADER))
    ((child, _),) = pids_told(fifo, 1)
    os.kill(child, signal.SIGKILL)
    done = job.end(process)
    assert done.code == 0, done.err
    assert job.log(0, number=2) == "0\n1\n2\n3\n"


# Terminals and pipes.


class Terminal:
    """`launch` as the leader of a terminal's session, as in a window or over ssh."""

    def __init__(self, job: Job, *words: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(job.path)
            os.execvpe(LAUNCH[0], [*LAUNCH, *words], job.environment)
        self.text = ""
        self.code: int | None = None

    def read_until(self, wanted: str) -> None:
        while wanted not in self.text:
            ready, _, _ = select.select([self.master], [], [], PATIENCE)
            assert ready, self.text
            self.text += os.read(self.master, 4096).decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def hang_up(self) -> None:
        os.close(self.master)
        self.master = -1

    def end(self) -> int:
        """The exit code; minus the signal, if one killed it."""
        pidfd = os.pidfd_open(self.pid)
        deadline = time.monotonic() + PATIENCE
        while not select.select([pidfd], [], [], 0)[0]:
            assert time.monotonic() < deadline, "it goes on"
            if self.master >= 0 and select.select([self.master], [], [], 0.01)[0]:
                self.drain()
            elif self.master < 0:
                select.select([pidfd], [], [], 0.1)
        os.close(pidfd)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def drain(self) -> None:
        try:
            self.text += os.read(self.master, 4096).decode(errors="replace")
        except OSError:  # nobody has the other end any more
            time.sleep(0.01)

    def close(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.master >= 0:
            os.close(self.master)


@contextmanager
def on_a_terminal(job: Job, *words: str) -> Iterator[Terminal]:
    terminal = Terminal(job, *words)
    try:
        yield terminal
    finally:
        terminal.close()


def test_a_terminal_is_closed(job: Job) -> None:
    """The kernel sends SIGHUP, and nothing can be said any more."""
    fifo = job.fifo()
    with on_a_terminal(job, "--nproc=2", job.script(WAITS)) as terminal:
        workers = pids_told(fifo, 2)
        terminal.hang_up()
        assert terminal.end() == 129
        for pids in workers:
            for pid in pids:
                wait_for_death(pid)


def test_ctrl_c_on_a_terminal(job: Job) -> None:
    """Workers are in sessions of their own: only `launch` hears it, and stops them in peace."""
    fifo = job.fifo()
    with on_a_terminal(job, "--nproc=2", job.script(WAITS)) as terminal:
        workers = pids_told(fifo, 2)
        assert {os.getsid(pid) for pid, _ in workers} == {pid for pid, _ in workers}
        terminal.type(b"\x03")
        assert terminal.end() == 130
    assert "KeyboardInterrupt" not in terminal.text


def test_ctrl_c_twice_on_a_terminal(job: Job) -> None:
    fifo = job.fifo()
    source = WAITS.replace("open(", "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(", 1)
    with on_a_terminal(job, "--grace=1000", job.script(source)) as terminal:
        pids_told(fifo, 1)
        terminal.type(b"\x03")
        terminal.read_until("SIGINT")
        terminal.type(b"\x03")
        assert terminal.end() == 130


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("sys.exit(5)", 5), ("os.kill(os.getpid(), 11)", 139)]
)
def test_head(job: Job, ending: str, code: int) -> None:
    """`launch … | head -1`: the job goes on to its end, and its exit code is its own."""
    job.script(f"import os, sys\nfor i in range(5000): print('line', i)\n{ending}")
    command = '"$@" 2>&1 | head -1 > /dev/null; exit ${PIPESTATUS[0]}'
    words = [*LAUNCH, "--max-restarts=0", "train.py"]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *words],
        cwd=job.path,
        env=job.environment,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == code
    assert job.log(0).endswith("line 4999\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(job: Job, closed: str) -> None:
    """Descriptors 0 to 2 are then free for others, who must not get a worker's output."""
    job.script("import sys; print('out'); sys.stderr.write('err'); sys.exit(3)")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *LAUNCH, "--nproc=1", "--max-restarts=1", "train.py"],
        cwd=job.path,
        env=job.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert job.log(0, number=2) + job.log(0, "err", number=2) == "out\nerr"


def _below(pid: int) -> list[str]:
    found: list[str] = []
    level = [str(pid)]
    while level:
        level = [child for one in level for child in _children(one)]
        found += level
    return found


def _children(pid: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def _is_leaf(pid: str) -> bool:
    return not _children(pid) and b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
