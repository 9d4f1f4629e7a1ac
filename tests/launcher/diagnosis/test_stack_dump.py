"""Where ranks are that hang: what stacks say, and stacks of processes that really hang."""

from __future__ import annotations

import json
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
from launcher.diagnosis.stack_report import (
    Frame,
    RankStack,
    Thread,
    locate_child,
    parse_dump,
    read_stack,
    summarize,
)
from launcher.events import StacksTaken
from launcher.system import processes

PATIENCE = 60.0
TORCH = "/venv/lib/python3.11/site-packages/torch"
STDLIB = "/usr/lib/python3.11"


def frame(name: str, file: str = "/home/me/train.py", line: int = 7) -> Frame:
    short = file.partition("site-packages/")[2] or file.rpartition("/")[2]
    return Frame(name, file, line, short)


def native(name: str) -> Frame:
    return Frame(name, f"{TORCH}/lib/libtorch_cpu.so", 0)


C10D = f"{TORCH}/distributed/distributed_c10d.py"
LOGGER = frame("wrapper", f"{TORCH}/distributed/c10d_logger.py", 83)
USER = (frame("main", line=140), frame("<module>", line=200))


def read(*frames: Frame) -> RankStack:
    return read_stack(0, 1, [Thread("MainThread", 1, frames)])


# -- one stack


def test_a_dump_is_parsed() -> None:
    """The main thread comes first, wherever it was; native frames have no line."""

    def dumped(name: str, **fields: object) -> dict[str, object]:
        return {
            "name": name,
            "filename": "/a/b.py",
            "short_filename": "b.py",
            "module": None,
            "line": 3,
            **fields,
        }

    threads = [
        {"pid": 8, "thread_name": None, "os_thread_id": 7, "frames": []},
        {
            "pid": 8,
            "thread_name": "MainThread",
            "os_thread_id": 8,
            "frames": [dumped("f", module="/lib/libc.so"), dumped("g", short_filename=None), dumped("h")],
        },
    ]
    main, other = parse_dump(json.dumps(threads))
    assert (main.name, main.tid, other.name) == ("MainThread", 8, "")
    assert main.frames[0].is_native
    assert not main.frames[1].is_native
    assert [frame.place for frame in main.frames[1:]] == ["/a/b.py:3 in g", "b.py:3 in h"]
    assert parse_dump("[]") == ()
    for garbage in ("", "{}", "[1]", '[{"pid": 1}]', "null"):
        with pytest.raises(ValueError, match=r".+"):
            parse_dump(garbage)


@pytest.mark.parametrize(
    ("frames", "collective"),
    [
        ([frame("all_reduce", C10D), LOGGER], "all_reduce"),
        ([frame("barrier", C10D), LOGGER], "barrier"),
        # The public function that was called, not what it is made of.
        (
            [frame("all_gather", C10D), LOGGER, frame("all_gather_object", C10D), LOGGER],
            "all_gather_object",
        ),
        (
            [
                frame("all_gather_into_tensor", C10D),
                frame("foreach_all_gather", f"{TORCH}/distributed/fsdp/_fully_shard/_fsdp_collectives.py"),
                frame("_pre_forward", f"{TORCH}/distributed/fsdp/_fully_shard/_fsdp_state.py"),
                frame("_call_impl", f"{TORCH}/nn/modules/module.py"),
            ],
            "all_gather_into_tensor (FSDP)",
        ),
        (
            [
                frame("wait_tensor", f"{TORCH}/distributed/_functional_collectives.py"),
                frame("dispatch", f"{TORCH}/distributed/tensor/_dispatch.py"),
            ],
            "wait_tensor (DTensor)",
        ),
        (
            [frame("gather", C10D), frame("save", f"{TORCH}/distributed/checkpoint/utils.py")],
            "gather (DCP)",
        ),
        ([frame("_verify_param_shape", f"{TORCH}/distributed/utils.py")], "_verify_param_shape"),
        (
            [frame("_store_based_barrier", C10D), frame("init_process_group", C10D)],
            "init_process_group",
        ),
        (
            [native("c10d::Reducer::finalize_backward"), frame("backward", f"{TORCH}/_tensor.py")],
            "all_reduce (DDP)",
        ),
        ([native("pthread_cond_wait"), native("c10d::Work::wait")], "Work.wait"),
        ([native("cudaStreamSynchronize")], "a CUDA synchronization"),
        ([], None),
        ([frame("matmul", f"{TORCH}/functional.py")], None),
        # A user's own function of such a name, and a distributed one below the user's, say nothing.
        ([frame("all_reduce", "/home/me/util.py"), frame("barrier", C10D)], None),
        ([frame("plan", f"{TORCH}/distributed/checkpoint/planner.py")], None),
        ([frame("send", "/venv/lib/python3.11/site-packages/urllib3/connection.py")], None),
        # The library between, not the one that runs the user's code.
        (
            [frame("barrier", C10D), *USER, frame("forward", f"{TORCH}/nn/parallel/distributed.py")],
            "barrier",
        ),
    ],
)
def test_the_collective(frames: list[Frame], collective: str | None) -> None:
    assert read(*frames, *USER).collective == collective


def test_collectives_of_the_autograd_thread() -> None:
    """Hooks run there, while the main thread waits in `backward`."""
    main = Thread("MainThread", 1, (frame("_engine_run_backward", f"{TORCH}/autograd/graph.py"), *USER))
    hook = Thread("Dummy-1", 2, (frame("reduce_scatter_tensor", C10D), LOGGER))
    assert read_stack(0, 1, [main, hook]).collective == "reduce_scatter_tensor"
    idle = Thread("MainThread", 1, USER)
    assert read_stack(0, 1, [idle, hook]).collective is None


def test_where_it_is() -> None:
    stack = read(frame("Condition.wait", f"{STDLIB}/threading.py", 327), *USER)
    assert stack.where == "train.py:140 in main"
    assert stack.source == ("/home/me/train.py", 140)
    assert stack.inside == "threading.py:327 in Condition.wait"
    assert read(native("time_sleep"), *USER).inside is None
    in_library = read(
        frame("wait", f"{STDLIB}/threading.py"),
        frame("forward", f"{TORCH}/nn/modules/module.py"),
        frame("step", "/venv/lib/python3.11/site-packages/trainer/loop.py", 5),
        frame("<module>", "<frozen runpy>", 88),
    )
    assert in_library.where == "trainer/loop.py:5 in step"
    assert read_stack(0, 1, []).trouble is not None
    ours = frame("_enter", str(Path(processes.__file__).with_name("hook.py")))
    assert read(ours, *USER).where == "train.py:140 in main"


def test_where_a_child_is() -> None:
    """What a forked process has from its parent does not count."""
    bootstrap = frame("BaseProcess.run", f"{STDLIB}/multiprocessing/process.py", 108)
    loop = frame("_worker_loop", f"{TORCH}/utils/data/_utils/worker.py")
    busy = Thread("MainThread", 1, (frame("__getitem__", "/home/me/data.py", 6), loop, bootstrap, *USER))
    idle = Thread("MainThread", 1, (frame("get", f"{STDLIB}/queue.py"), loop, bootstrap, *USER))
    assert locate_child([busy]) == "data.py:6 in __getitem__"
    assert locate_child([idle]) is None
    assert locate_child([]) is None


# -- many stacks


def at(where: str, **fields: object) -> RankStack:
    return RankStack(0, 1, where=where, **fields)  # type: ignore[arg-type]


def reducing(where: str = "train.py:140 in train", name: str = "all_reduce", **fields: object) -> RankStack:
    return at(where, collective=name, **fields)


LOADING = at("train.py:88 in load_batch", code="time.sleep(9)")
STOPPED = "stopped by a signal (SIGSTOP)"


@pytest.mark.parametrize(
    ("stacks", "steps", "lines"),
    [
        (
            {**{rank: reducing() for rank in range(8)}, 3: LOADING},
            {**dict.fromkeys(range(8), 119), 3: 118},
            [
                "rank 3 is behind: step 118, in train.py:88 in load_batch (time.sleep(9))",
                "ranks 0-2, 4-7 wait for it in all_reduce at step 119, called at train.py:140 in train",
            ],
        ),
        (
            {0: LOADING, 1: at("train.py:3 in f"), 2: reducing(), 3: reducing()},
            {0: 4, 1: 5, 2: 5, 3: 3},
            [
                "rank 0 is behind: step 4, in train.py:88 in load_batch (time.sleep(9))",
                "rank 1 is in no collective: step 5, in train.py:3 in f",
                "rank 3 waits for them in all_reduce at step 3, called at train.py:140 in train",
                "rank 2 waits for them in all_reduce at step 5, called at train.py:140 in train",
            ],
        ),
        (
            {0: LOADING, 1: LOADING, 2: reducing(), 3: reducing(name="barrier")},
            {},
            [
                "ranks 0-1 are in no collective: in train.py:88 in load_batch (time.sleep(9))",
                "rank 2 waits for them in all_reduce, called at train.py:140 in train",
                "rank 3 waits for them in barrier, called at train.py:140 in train",
            ],
        ),
        (
            {0: reducing(), 1: reducing(), 2: reducing("log.py:9 in log", "broadcast")},
            dict.fromkeys(range(3), 5),
            [
                "rank 2 is in broadcast while the others are in all_reduce at step 5, called at log.py:9 in log",
                "ranks 0-1 wait in all_reduce at step 5, called at train.py:140 in train",
            ],
        ),
        (
            {0: reducing(), 1: reducing(name="barrier")},
            {},
            [
                "rank 0 waits in all_reduce, called at train.py:140 in train",
                "rank 1 waits in barrier, called at train.py:140 in train",
                "they wait for each other",
            ],
        ),
        (
            {0: reducing(), 1: reducing()},
            {0: 5, 1: 5},
            ["ranks 0-1 wait in all_reduce at step 5, called at train.py:140 in train"],
        ),
        (
            {0: reducing(), 1: reducing(), 2: reducing()},
            {0: 5, 1: 4, 2: 5},
            [
                "rank 1 waits in all_reduce at step 4, called at train.py:140 in train",
                "ranks 0, 2 wait in all_reduce at step 5, called at train.py:140 in train",
            ],
        ),
        (
            {0: LOADING, 1: LOADING, 2: at("train.py:90 in save", inside="threading.py:3 in wait")},
            {0: 5, 1: 5, 2: None},
            [
                "ranks 0-1: step 5, in train.py:88 in load_batch (time.sleep(9))",
                "rank 2: in train.py:90 in save, inside threading.py:3 in wait",
            ],
        ),
        (
            {0: reducing(), 1: reducing(halt=STOPPED), 2: RankStack(2, 3, halt="dead")},
            {0: 5, 1: 5, 2: 5},
            [
                f"rank 1 is {STOPPED}: step 5, in all_reduce, called at train.py:140 in train",
                "rank 2 is dead: step 5",
                "rank 0 waits for them in all_reduce at step 5, called at train.py:140 in train",
            ],
        ),
        (
            {0: LOADING, 1: at("train.py:3 in f", halt="in uninterruptible sleep in nfs_wait")},
            {},
            [
                "rank 1 is in uninterruptible sleep in nfs_wait: in train.py:3 in f",
                "rank 0: in train.py:88 in load_batch (time.sleep(9))",
            ],
        ),
        (
            {
                0: RankStack(0, 1, trouble="no permission", kernel="asleep in futex_wait"),
                1: RankStack(1, 2, trouble="no permission", kernel="asleep in futex_wait"),
                2: RankStack(2, 3, trouble="no permission", kernel="running"),
            },
            {0: 5, 1: 5},
            [
                "no stacks of ranks 0-2: no permission",
                "  ranks 0-1: step 5, asleep in futex_wait",
                "  rank 2: running",
            ],
        ),
        (
            {0: reducing(), 1: at("train.py:3 in f", children=("process 9 in data.py:6 in __getitem__",))},
            {},
            [
                "rank 1 is in no collective: in train.py:3 in f",
                "  rank 1 has process 9 in data.py:6 in __getitem__",
                "rank 0 waits for it in all_reduce, called at train.py:140 in train",
            ],
        ),
        ({}, {}, []),
    ],
)
def test_the_summary(stacks: dict[int, RankStack], steps: dict[int, int | None], lines: list[str]) -> None:
    assert list(summarize(stacks, steps)) == lines


# -- processes that really hang


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
    taken = take({0: pid}, {0: 3}, py_spy=slow, patience=0.2)
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
