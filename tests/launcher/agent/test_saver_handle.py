"""The agent and its saver: one that is started when it is needed, outlives workers, and is waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.cli.ask import ask
from tests.kit.job import Job, read_until, wait_for_death

PERSISTING = {"event": "persisting", "step": 7, "tier": "remote", "done": 1_258_291, "total": 2 << 20}
PERSISTED = {"event": "persisted", "step": 7, "tier": "remote", "url": "s3://bucket/run", "seconds": 0.25}
FAILED = {"event": "failed", "step": 7, "tier": "remote", "url": "s3://bucket/run", "error": "no space"}

# A worker that gives the saver its first argument as an order, tells the saver's pid, and waits.
WAIT = """
    import json, os, shardckpt, signal, sys
    pid = shardckpt.tell(**json.loads(sys.argv[1]))
    open(sys.argv[2], "w").write(f"{pid} {os.getpid()} {os.getppid()}")
    signal.pause()
    """

# ... and finishes.
FINISH = "import json, shardckpt, sys; print(shardckpt.tell(**json.loads(sys.argv[1])))"


def saver_log(job: Job) -> Path:
    return job.path / "runs/train/logs/saver.log"


def start_waiting(job: Job, *options: str, **order: object) -> tuple[subprocess.Popen[str], list[int]]:
    """A job with a worker that waits, and the pids of its saver, its worker and its zygote."""
    fifo = job.fifo("pids")
    process = job.start(*options, job.script(WAIT), json.dumps(order), str(fifo))
    return process, [int(pid) for pid in fifo.read_text().split()]


def test_a_job_that_does_not_ask_for_a_saver_has_none(job: Job) -> None:
    script = job.script(
        "import os; print(os.environ['LAUNCH_SAVER']); "
        "1 // (int(os.environ['TORCHELASTIC_RESTART_COUNT']) + int(os.environ['RANK']))"
    )
    assert job.run("--nproc=2", script).code == 0
    names = {job.log(rank, number=number).strip() for rank in range(2) for number in (1, 2)}
    names.discard("")  # of the rank that the other's failure stopped before it got that far
    assert re.fullmatch(r"launch-saver-[0-9a-f]{16}", names.pop())
    assert not names  # one for the whole job
    assert not saver_log(job).exists()


def test_what_a_saver_is_given(job: Job) -> None:
    """Two sockets, a log, a session of its own, and no signal that could end it before it ignores them."""
    done = job.run(job.script(FINISH), "{}")
    assert (done.code, done.err.count("launch:")) == (0, 2)
    about = json.loads(saver_log(job).read_text())
    assert about["descriptors"] == sorted(about["given"])
    assert about["leads its session"]
    assert about["stdin"] == "/dev/null"
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} <= set(about["blocked"])


def test_the_end_of_a_job_waits_for_what_is_not_durable(job: Job) -> None:
    order = {"now": [PERSISTING], "then": [PERSISTING, PERSISTED]}
    done = job.run(job.script(FINISH), json.dumps(order))
    assert done.code == 0
    assert done.err.splitlines()[1:-1] == [
        "launch: persisting step 7: 1.2 of 2.0 MiB (remote)",
        "launch: persisted step 7 to s3://bucket/run in 0.2 s",
    ]
    end = done.err.splitlines()[-1]
    assert re.fullmatch(r"launch: finished in \d+ s: last checkpoint step 7 \(remote\)", end)


@pytest.mark.parametrize("victim", ["os.getpid()", "os.getppid()"], ids=["worker", "zygote"])
def test_a_saver_outlives_workers_and_zygotes(job: Job, victim: str) -> None:
    """Also when a new zygote clears away what the dead one has left."""
    script = job.script(
        f"""
        import os, shardckpt, signal
        print(shardckpt.tell(), flush=True)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] < "2":
            os.kill({victim}, 9)
            signal.pause()
        """
    )
    done = job.run(script)
    assert done.code == 0, done.err
    assert job.log(number=1) == job.log(number=2) == job.log(number=3) != ""
    assert "saver was lost" not in done.err


def test_kill_9_of_the_saver(job: Job) -> None:
    """One line says what is lost; workers go on, and the next to connect finds a new saver."""
    order = json.dumps({"now": [PERSISTING]})
    script = job.script(
        f"""
        import os, shardckpt
        pids = [shardckpt.tell(**{order!s})]
        os.kill(pids[0], 9)
        while len(pids) < 2:
            try:
                pids.append(shardckpt.tell())
            except (EOFError, ConnectionError):  # it was not quite dead
                pass
        print(len(set(pids)))
        """
    )
    done = job.run(script)
    assert done.code == 0
    assert done.out == "[0] 2\n"
    said = done.err.splitlines()
    assert len(said) == 3
    assert re.fullmatch(
        r"launch: the saver was lost: killed by SIGKILL \(.*\); the snapshots in memory are gone, and of "
        r"step 7: 1\.2 of 2\.0 MiB \(remote\) what is missing; checkpoints that are committed are safe; "
        r"log: runs/train/logs/saver\.log",
        said[1],
    )


def test_what_lies_in_the_current_directory_is_not_the_savers(job: Job) -> None:
    for name in ("json.py", "shardckpt.py"):
        job.script("raise SystemExit('not meant for the saver')", name)
    assert job.run(job.script(FINISH, "code/train.py"), "{}").code == 0
    assert "not meant" not in saver_log(job).read_text()


def test_a_job_that_waits_for_its_saver_can_be_asked(job: Job) -> None:
    before = job.fifo("before")
    process = job.start(job.script(FINISH), json.dumps({"before": str(before), "then": [PERSISTING]}))
    read_until(process, "1.2 of 2.0 MiB")
    [answer] = ask(job.path / "runs/train", "status")
    assert answer["status"]["phase"] == "persisting"
    before.write_text("go on")
    assert job.end(process).code == 0


def test_a_job_does_not_wait_for_a_dead_saver(job: Job) -> None:
    process, (saver, _, _) = start_waiting(job, now=[PERSISTING])
    os.kill(saver, signal.SIGKILL)
    read_until(process, "the saver was lost")
    process.send_signal(signal.SIGINT)
    assert job.end(process).code == 130


def test_a_saver_that_cannot_run_is_not_started_for_ever(job: Job) -> None:
    job.environment["BROKEN_SAVER"] = "1"
    script = job.script(
        """
        import shardckpt
        try:
            shardckpt.tell()
        except (EOFError, ConnectionResetError):
            print("gone")
        try:
            shardckpt.tell()
        except ConnectionRefusedError:
            print("refused")
        """
    )
    done = job.run(script)
    assert done.code == 0
    assert done.out == "[0] gone\n[0] refused\n"
    assert done.err.count("the saver was lost: exit code 1") == 3
    assert done.err.count("it keeps ending: no saver is started for this job any more") == 1
    assert saver_log(job).read_text() == "this saver is broken\n" * 3


@pytest.mark.parametrize(
    ("order", "worker", "code", "message"),
    [
        (
            {"then": [FAILED], "code": 1},
            0,
            74,
            "step 7 is not durable in s3://bucket/run: no space; log: runs/train/logs/saver.log",
        ),
        ({"then": [FAILED], "code": -9}, 0, 74, "the saver was lost: killed by SIGKILL"),
        (
            {"then": [FAILED, PERSISTING, {**FAILED, "again": True}], "code": -9},
            0,
            74,
            "the snapshots in memory are gone; checkpoints that are committed are safe",
        ),
        (
            {"then": [FAILED], "code": 1},
            5,
            5,
            "step 7 is not durable in s3://bucket/run: no space; log: runs/train/logs/saver.log",
        ),
    ],
)
def test_a_drain_that_fails(
    job: Job, order: dict[str, object], worker: int, code: int, message: str
) -> None:
    """Is seen in the exit code, unless the workers' own failure is. What has failed twice is told once."""
    script = job.script(FINISH + f"; sys.exit({worker})")
    done = job.run("--max-restarts=0", script, json.dumps(order))
    assert done.code == code
    assert done.err.count("launch: step 7 did not become durable in s3://bucket/run: no space\n") == 1
    assert message in done.err.splitlines()[-1]


def test_saves_that_fail_of_the_same_are_told_in_few_words(job: Job) -> None:
    """But where each was to be, and what has failed first, in full."""
    full = [
        {**FAILED, "step": step, "error": f"/b/step-{step}: no space for {step} bytes"} for step in (7, 8)
    ]
    done = job.run("--max-restarts=0", job.script(FINISH), json.dumps({"then": full, "code": 1}))
    assert (
        "launch: step 7 did not become durable in s3://bucket/run: /b/step-7: no space for 7 b" in done.err
    )
    assert "launch: step 8 did not become durable in s3://bucket/run either: the same error, 2 " in done.err


@pytest.mark.parametrize(
    ("timeout", "code", "message"),
    [
        ("0.1", 74, "the saver is not done after 0.1 s (--drain-timeout); not persisted yet: step 7: "),
        ("0", 0, "not waiting for the saver, as --drain-timeout 0 says; not persisted yet: step 7: "),
    ],
)
def test_waiting_is_bounded(job: Job, timeout: str, code: int, message: str) -> None:
    """The saver goes on, and ends by itself."""
    fifo = job.fifo()
    order = {"now": [PERSISTING], "then": [PERSISTING], "before": str(fifo)}
    done = job.run(f"--drain-timeout={timeout}", job.script(FINISH), json.dumps(order))
    assert done.code == code
    assert message in done.err
    pid = int(done.out.removeprefix("[0] "))
    assert f"it goes on in the background (pid {pid})" in done.err
    fifo.write_text("")  # blocks unless the saver is there and reads
    wait_for_death(pid)


def test_a_saver_that_is_stopped_is_named_and_not_waited_for_longer(job: Job) -> None:
    """A job that has finished is not started again for it. Once it goes on, it ends by itself."""
    stop = "; os.kill(pid, signal.SIGSTOP); print(pid)"
    script = job.script(
        "import json, os, shardckpt, signal, sys; pid = shardckpt.tell(**json.loads(sys.argv[1]))" + stop
    )
    done = job.run("--drain-timeout=0.2", script, json.dumps({"now": [PERSISTING], "then": []}))
    pid = int(done.out.removeprefix("[0] "))
    assert done.code == 74
    told = f"the saver (pid {pid}) is stopped by a signal (SIGSTOP), and is not done after 0.2 s"
    assert told in done.err
    assert f"`kill -CONT {pid}` has it go on" in done.err
    events = [json.loads(line) for line in (job.path / "runs/train/events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "job_ended"
    assert told in events[-1]["reason"]
    assert sum(event["event"] == "round_started" for event in events) == 1
    os.kill(pid, signal.SIGCONT)
    wait_for_death(pid)


def test_a_stop_ends_the_workers_and_then_waits(job: Job) -> None:
    process, _ = start_waiting(job, then=[PERSISTED])
    process.send_signal(signal.SIGTERM)
    done = job.end(process)
    assert done.code == 143
    assert done.err.splitlines()[-2:] == [
        "launch: stopped by SIGTERM; no worker is left running",
        "launch: persisted step 7 to s3://bucket/run in 0.2 s",
    ]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_stop_ends_the_wait(job: Job, is_stopped: bool) -> None:
    """Whether it is the first that the job gets or the second."""
    fifo = job.fifo()
    order: dict[str, object] = {"then": [PERSISTING], "before": str(fifo)}
    if is_stopped:
        process, _ = start_waiting(job, **order)
        process.send_signal(signal.SIGINT)
    else:
        process = job.start(job.script(FINISH), json.dumps(order))
    read_until(process, "persisting step 7")
    process.send_signal(signal.SIGINT)
    done = job.end(process)
    assert done.code == 130
    assert "SIGINT: not waiting for the saver any longer; not persisted yet: step 7: 1.2 of 2.0" in done.err
    pid = int(re.findall(r"\(pid (\d+)\)", done.err)[0])
    fifo.write_text("")
    wait_for_death(pid)


def test_kill_9_of_the_agent(job: Job) -> None:
    """The saver does not die with it: it hears of it, and ends by itself when it is done."""
    fifo = job.fifo()
    process, pids = start_waiting(job, then=[PERSISTING], before=str(fifo))
    process.kill()
    process.wait()
    fifo.write_text("")
    for pid in pids:
        wait_for_death(pid)


# Two ranks whose steps are snapshots in memory and nothing else; `then` is what happens after the first.
TRAIN = """
    import os, signal, sys
    import torch, torch.distributed as dist
    from shardckpt import Checkpointer

    def children(pid):
        return set(map(int, open(f"/proc/{pid}/task/{pid}/children").read().split()))

    def saver():
        zygote = os.getppid()
        agent = int(open(f"/proc/{zygote}/stat").read().rpartition(")")[2].split()[1])
        (pid,) = children(agent) - {zygote}
        return pid

    dist.init_process_group("gloo")
    rank, then = dist.get_rank(), sys.argv[1]
    state = {"x": torch.zeros(1000)}
    checkpointer = Checkpointer(every_steps=1, url_every_steps=1000)
    loaded = checkpointer.restore(state)
    step = 1 if loaded is None else loaded.step + 1
    checkpointer.step(step, state).wait("memory")
    print(step, saver(), loaded and loaded.tier, flush=True)
    dist.barrier()
    if then == "wait":
        with open(sys.argv[2], "w") as fifo:
            fifo.write(f"{os.getpid()} {os.getppid()} {saver()} ")
        signal.pause()
    if then == "kill rank 1" and rank == 1 and loaded is None:
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "kill the saver":
        old = os.pidfd_open(saver())
        dist.barrier()
        if rank == 0:
            signal.pidfd_send_signal(old, signal.SIGKILL)
        import select
        select.select([old], [], [])
        checkpointer.step(step + 1, state).wait("memory")
        print(step + 1, saver(), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    """


def train(job: Job, then: str, *options: str) -> subprocess.Popen[str]:
    job.use_torch()
    return job.start("--nproc=2", *options, job.script(TRAIN), then, str(job.path / "fifo"))


def checkpoints(job: Job) -> list[int]:
    """Steps of the checkpoints that exist."""
    paths = (job.path / "runs/train/checkpoints").glob("attempt-*/step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in paths)


def test_snapshots_outlive_a_worker_and_are_durable_at_the_end(job: Job) -> None:
    done = job.end(train(job, "kill rank 1"))
    assert done.code == 0, done.err
    first, second = job.log(0, number=1).split(), job.log(0, number=2).split()
    assert first == ["1", first[1], "None"]
    assert second == ["2", first[1], "memory"]  # the same saver
    assert checkpoints(job) == [2]
    assert re.fullmatch(
        r"launch: persisted step 2 to \S*/runs/train/checkpoints/\S+ in \d+\.\d s",
        done.err.splitlines()[-2],
    )
    end = done.err.splitlines()[-1]
    assert re.search(
        r"finished in .*: step 2; last checkpoint step 2 \(local\); 1 restart(, \S+ s lost)?$", end
    )


def test_trainers_go_on_with_another_saver(job: Job) -> None:
    done = job.end(train(job, "kill the saver"))
    assert done.code == 0, done.err
    first, second = job.log(0).splitlines()
    assert first.split()[1] != second.split()[1]
    assert done.err.count("the saver was lost: killed by SIGKILL") == 1
    assert "round 2" not in done.err
    assert checkpoints(job) == [2]


@pytest.mark.parametrize(
    ("options", "signum", "code"),
    [((), signal.SIGINT, 130), (("--drain-timeout=0",), signal.SIGINT, 130), ((), signal.SIGKILL, -9)],
    ids=["stop", "stop and do not wait", "kill the agent"],
)
def test_what_is_in_memory_becomes_durable(
    job: Job, options: tuple[str, ...], signum: int, code: int
) -> None:
    """However a job is ended; with `launch` or after it."""
    fifo = job.fifo()
    process = train(job, "wait", *options)
    pids: list[int] = []
    while len(pids) < 6:
        pids += map(int, fifo.read_text().split())
    process.send_signal(signum)
    done = job.end(process)
    assert done.code == code, done.err
    if not options and code > 0:
        assert checkpoints(job) == [1]
        assert "launch: persisted step 1 to " in done.err, done.err + saver_log(job).read_text()
    for pid in pids:
        wait_for_death(pid)
    assert checkpoints(job) == [1], done.err
