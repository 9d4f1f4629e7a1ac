"""What stacks say: where ranks are, and who waits for whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.diagnosis.stack_report import (
    Frame,
    RankStack,
    Thread,
    locate_child,
    parse_dump,
    read_stack,
    summarize,
)
from launcher.system import processes

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
