"""What a job on one node goes through and survives: hangs, crash loops, dead devices, preemption, scaling.

Workers are Python scripts with a stand-in for torch that keep the worker contract by themselves.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher.cli import ask as client
from launcher.errors import UsageError
from tests.kit.job import LAUNCH, PATIENCE, Ended, Job, read_until, until

# Says who it is and makes steps, until a file says that it is enough, or it is asked to drain.
STEPS = """
    import json, os, sys, time

    def tell(step, drains=True):
        facts = json.dumps({"drains": drains, "first_step": time.time()})
        with open(os.environ["LAUNCH_PROGRESS_FILE"], "wb", buffering=0) as file:
            file.write(f"{step:20d} {time.time():20.6f}\\n{facts:<469}\\n".encode())

    def is_asked_to_drain():
        with open(os.environ["LAUNCH_DRAIN_FILE"]) as file:
            request = file.read()
        if request:
            print("asked", json.loads(request)["tiers"], flush=True)
        return request

    names = ("LAUNCH_ROUND", "RANK", "WORLD_SIZE", "LAUNCH_SLOT", "TORCHELASTIC_RESTART_COUNT")
    number, rank, world, slot, restarts = (int(os.environ[name]) for name in names)
    print(number, rank, world, slot, restarts, flush=True)
    """

FOREVER = """
    step = 0
    while not os.path.exists("finish"):
        step += 1
        tell(step)
        if is_asked_to_drain():
            sys.exit(75)
        time.sleep(0.02)
    """


def has_started(job: Job, number: int, world: int) -> list[str]:
    """Wait for the first lines of all workers of a round."""

    def look() -> list[str]:
        logs = [job.log(rank, number=number) for rank in range(world) if _exists(job, number, rank)]
        is_whole = len(logs) == world and all("\n" in log for log in logs)
        return [log.splitlines()[0] for log in logs] if is_whole else []

    return until(look)


def _exists(job: Job, number: int, rank: int) -> bool:
    return (job.path / f"runs/train/logs/round-{number:04d}/rank-{rank:05d}.out").exists()


def ask(job: Job, *words: str) -> Ended:
    done = subprocess.run(
        [*LAUNCH, *words],
        cwd=job.path,
        env=job.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def wait_for_steps(job: Job, beyond: int = 0) -> int:
    """The step of its workers, when the agent knows that they make steps, and so that they drain."""

    def look() -> int:
        status = json.loads(ask(job, "status", "train", "--json").out or "{}")
        step = int(status.get("step") or 0)
        return step if step > beyond else 0

    return until(look)


def journal(job: Job, event: str) -> list[dict[str, object]]:
    lines = (job.path / "runs/train/events.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["event"] == event]


# -- hangs


def test_a_hang_is_diagnosed_and_ended(job: Job) -> None:
    """Before anything is killed all stacks are taken; then the job starts again."""
    script = job.script(
        STEPS
        + """
    def wait_for_peer():
        while True:
            time.sleep(0.1)

    for step in range(1, 4):
        tell(step)
    if restarts == 0:
        wait_for_peer()
    """
    )
    done = job.run("--nproc=2", "--hang-timeout=1", script)
    assert done.code == 0
    assert re.search(r"no progress for \d s: looking where the workers are", done.err)
    assert "wait_for_peer" in done.err
    for rank in (0, 1):
        stack = job.path / f"runs/train/stacks/round-0001/rank-{rank:05d}.txt"
        assert "wait_for_peer" in stack.read_text()
    [hang] = journal(job, "hang")
    assert "step 3" in str(hang["summary"])


def test_a_hang_that_comes_back(job: Job) -> None:
    script = job.script(STEPS + "tell(1)\n    while True: time.sleep(1)\n    ")
    done = job.run("--hang-timeout=0.5", "--max-restarts=0", script)
    assert done.code == 76
    assert "giving up" in done.err


def test_a_hang_before_the_first_step(job: Job) -> None:
    """A restore tells how it gets on, so one that does not is found, and named; a slow one goes on."""
    script = job.script(
        STEPS
        + """
    def restoring(what):
        facts = {"world": 2, "steps": True, "alive": time.time(), "phase": what}
        with open(os.environ["LAUNCH_PROGRESS_FILE"], "wb", buffering=0) as file:
            file.write(f"{-1:20d} {time.time():20.6f}\\n{json.dumps(facts):<469}\\n".encode())

    for _ in range(8):
        restoring("restore")
        time.sleep(0.25)
    if rank == 1:
        restoring("restore, load_state_dict of 'data'")
    while True:
        time.sleep(1)
    """
    )
    done = job.run("--nproc=2", "--hang-timeout=1", "--max-restarts=0", script)
    assert done.code == 76
    assert "rank 0 in restore\n  rank 1 in restore, load_state_dict of 'data'\n" in done.err
    assert "hung after" in done.err
    [failure] = journal(job, "failure")
    assert float(str(failure["seconds"])) > 2


def test_workers_that_report_nothing_are_left_alone(job: Job) -> None:
    script = job.script("import time; time.sleep(2.5); print('done')")
    done = job.run("--hang-timeout=0.5", script)
    assert (done.code, job.log()) == (0, "done\n")


# -- crash loops and budgets


def test_a_crash_loop_is_ended(job: Job) -> None:
    """The same error at the same step three times, although a hundred restarts are allowed."""
    script = job.script(STEPS + "tell(1200)\n    raise ValueError(f'no such sample {time.time()}')\n    ")
    done = job.run("--max-restarts=100", script)
    assert done.code == 77
    assert "failed with the same error 3 times at step 1200" in done.err
    assert len(journal(job, "round_started")) == 3


def test_progress_refills_the_budget(job: Job) -> None:
    script = job.script(
        STEPS
        + """
    tell(10 * restarts + 10)
    if restarts < 5:
        raise ValueError("flaky")
    """
    )
    done = job.run("--max-restarts=1", script)
    assert done.code == 0
    assert re.search(r"finished in \d+ s: step \d+; 5 restarts", done.err)


# -- devices


def test_a_dead_device_is_left_out(job: Job) -> None:
    """8 -> 7, here 3 -> 2; local ranks are numbered anew. It is tried again when the user scales.

    Users, too, may give up devices.
    """
    script = job.script(
        STEPS + "if slot == 1 and not os.path.exists('repaired'): raise OSError('device lost')" + FOREVER
    )
    process = job.start("--nproc=2:3", script)
    lines = has_started(job, 3, 2)
    assert lines == ["3 0 2 0 2", "3 1 2 2 2"]
    wait_for_steps(job)
    (job.path / "repaired").touch()
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (1064, 1064))
    with pytest.raises(
        UsageError, match=r"nproc: 501 workers need 1066 open files, and 1064 .* at most 500"
    ):
        list(client.ask(job.path / "runs/train", "scale", 501))
    assert ask(job, "scale", "train", "3").code == 0
    assert has_started(job, 4, 3) == ["4 0 3 0 2", "4 1 3 1 2", "4 2 3 2 2"]
    wait_for_steps(job)
    assert "from 0 to 2, found 5" in ask(job, "scale", "train", "2", "--without", "5").err
    assert ask(job, "scale", "train", "2", "--without=0").code == 0
    assert has_started(job, 5, 2) == ["5 0 2 1 2", "5 1 2 2 2"]
    (job.path / "finish").touch()
    done = job.end(process)
    assert done.code == 0
    assert "slot 1 left out, since its worker fails at the start; going on with 2 of 3" in done.err


def test_too_few_devices_end_the_job(job: Job) -> None:
    script = job.script(STEPS + "if slot == 0 or restarts > 1: raise OSError('device lost')")
    done = job.run("--nproc=1:2", "--max-restarts=50", "--crash-loop=0", script)
    assert done.code == 1
    assert "giving up: 0 of its devices are left, and it needs 1" in done.err


# -- what users and schedulers ask for


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_job_saves_and_can_be_resumed(job: Job, signum: int) -> None:
    script = job.script(STEPS + FOREVER)
    process = job.start("--nproc=2", script)
    has_started(job, 1, 2)
    wait_for_steps(job)
    process.send_signal(signum)
    done = job.end(process)
    assert done.code == 75
    assert "saved at step" in done.err
    assert "asked durable" in job.log()
    assert len(journal(job, "drained")) == 1
    assert journal(job, "job_ended")[0]["exit_code"] == 75
    assert "exit code 75" in ask(job, "status", "train").out


def test_workers_that_do_not_save_in_time(job: Job) -> None:
    """The grace is for all of it; what was saved before still stands, so the job can be resumed."""
    script = job.script(STEPS + "tell(1)\n    while True: time.sleep(1)\n    ")
    process = job.start("--grace=2", script)
    wait_for_steps(job)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    done = job.end(process)
    assert (done.code, time.monotonic() - began < 10) == (75, True)
    assert "stopped at step 1: nothing was saved since this launch began" in done.err


def test_a_save_before_the_end_is_no_hang(job: Job) -> None:
    """However long it takes: who leaves has the grace."""
    script = job.script(STEPS + FOREVER.replace("sys.exit(75)", "time.sleep(3); sys.exit(75)"))
    process = job.start("--hang-timeout=1", script)
    wait_for_steps(job)
    process.send_signal(signal.SIGTERM)
    done = job.end(process)
    assert done.code == 75
    assert "saved at step" in done.err
    assert journal(job, "hang") == []


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_second_signal_ends_it_at_once(job: Job, is_asked: bool) -> None:
    """As `launch stop --now` does."""
    script = job.script(STEPS + "tell(1)\n    while True: time.sleep(1)\n    ")
    process = job.start("--grace=60", script)
    wait_for_steps(job)
    if is_asked:
        assert ask(job, "stop", "train", "--now").code == 0
    else:
        process.send_signal(signal.SIGTERM)
        until(lambda: journal(job, "drain_requested"))
        process.send_signal(signal.SIGTERM)
    assert job.end(process).code == 143


def test_a_notice_before_there_is_a_checkpointer_is_kept(job: Job) -> None:
    """Then the job saves at its first step boundary, and can be resumed."""
    fifo = job.fifo()
    begin = "\n    open('fifo', 'w').write('here'); open('fifo').read()"
    process = job.start("--grace=60", job.script(STEPS + begin + FOREVER))
    fifo.read_text()
    process.send_signal(signal.SIGUSR1)
    read_until(process, "SIGUSR1")
    fifo.write_text("go on")
    done = job.end(process)
    assert done.code == 75
    assert "saved at step" in done.err
    assert "asked durable" in job.log()


@pytest.mark.parametrize("is_known", ["the script", "the journal", "nothing"])
def test_sigterm_before_there_is_a_checkpointer(job: Job, is_known: str) -> None:
    """A job that makes checkpoints, or has made some, is to be started again; others end as with torchrun."""
    fifo = job.fifo()
    comment = "# Checkpointer" if is_known == "the script" else ""
    script = job.script(f"import os; open('fifo', 'w').write('here'); open('fifo').read() {comment}")
    if is_known == "the journal":
        (job.path / "runs/train").mkdir(parents=True)
        (job.path / "runs/train/events.jsonl").write_text('{"time": 1, "event": "persisted", "step": 3}\n')
    process = job.start(script)
    fifo.read_text()
    process.send_signal(signal.SIGTERM)
    assert job.end(process).code == (143 if is_known == "nothing" else 75)


def test_sigterm_after_a_notice_does_not_cut_the_save_short(job: Job) -> None:
    """Schedulers send SIGUSR1, and SIGTERM some time later."""
    fifo = job.fifo()
    save = "open('fifo', 'w').write('saving'); open('fifo').read(); sys.exit(75)"
    process = job.start("--grace=60", job.script(STEPS + FOREVER.replace("sys.exit(75)", save)))
    wait_for_steps(job)
    process.send_signal(signal.SIGUSR1)
    fifo.read_text()
    process.send_signal(signal.SIGTERM)
    read_until(process, "SIGTERM")
    fifo.write_text("saved")
    assert job.end(process).code == 75


def test_a_user_who_stops_a_job_is_told_so(job: Job) -> None:
    process = job.start(job.script(STEPS + FOREVER))
    wait_for_steps(job)
    assert ask(job, "stop", "train").code == 0
    done = job.end(process)
    assert done.code == 75
    assert "launch stop: saving at the next step boundary" in done.err
    assert "SIGTERM" not in done.err
    assert "stopped by `launch stop`" in str(journal(job, "job_ended")[0]["reason"])


def test_sigusr1_without_a_checkpointer(job: Job) -> None:
    """Nobody can answer it, perhaps ever, and it is no reason to end."""
    fifo = job.fifo()
    script = job.script("import os; open('fifo', 'w').write('here'); open('fifo').read()")
    process = job.start(script)
    fifo.read_text()
    process.send_signal(signal.SIGUSR1)
    line = read_until(process, "SIGUSR1")
    assert "SIGUSR1: no worker has a Checkpointer yet; as soon as one has, the job saves and ends" in line
    fifo.write_text("end")
    assert job.end(process).code == 0


def test_a_restart_that_a_user_asks_for(job: Job) -> None:
    """It costs no restart, and the state goes on from memory."""
    process = job.start("--nproc=2", "--max-restarts=0", job.script(STEPS + FOREVER))
    has_started(job, 1, 2)
    wait_for_steps(job)
    assert ask(job, "restart", "train").code == 0
    assert has_started(job, 2, 2) == ["2 0 2 0 0", "2 1 2 1 0"]
    assert "asked memory" in job.log()
    (job.path / "finish").touch()
    assert job.end(process).code == 0


NEVER = """
    tell(1)
    while restarts == 0 and number == 1: time.sleep(1)
    """


def test_a_restart_that_nobody_answers(job: Job) -> None:
    """Asked for again, it does not wait for a step boundary, and still costs no restart."""
    process = job.start("--max-restarts=0", job.script(STEPS + NEVER))
    wait_for_steps(job)
    assert "next step boundary" in ask(job, "restart", "train").out
    until(lambda: ask(job, "stacks", "train").out)  # also while it waits
    assert "which do not answer" in ask(job, "restart", "train").out
    done = job.end(process)
    assert done.code == 0
    assert len(journal(job, "round_started")) == 2


def test_a_drain_that_hangs(job: Job) -> None:
    """Workers that go on without ever looking at the request: --hang-timeout is for that too."""
    script = job.script(
        STEPS
        + """
    step = 0
    while restarts == 0:
        tell(step := step + 1)
        time.sleep(0.02)
    """
    )
    process = job.start("--hang-timeout=1", script)
    wait_for_steps(job)
    ask(job, "restart", "train")
    done = job.end(process)
    assert done.code == 0
    assert re.search(r"workers have not saved and ended for \d s", done.err)
    assert len(journal(job, "hang")) == 1


def test_preempted_while_a_restart_hangs(job: Job) -> None:
    process = job.start("--grace=2", job.script(STEPS + NEVER))
    wait_for_steps(job)
    ask(job, "restart", "train")
    until(lambda: journal(job, "drain_requested"))
    process.send_signal(signal.SIGTERM)
    assert job.end(process).code == 75
    assert json.loads((job.path / "runs/train/drain").read_text())["tiers"] == "durable"


def test_one_leaves_by_itself(job: Job) -> None:
    """The others cannot be asked to follow: they have the grace to do it, and then the round is over."""
    script = job.script(
        STEPS + "if number == 2: sys.exit(0)\n    while rank: time.sleep(1)\n    sys.exit(75)\n    "
    )
    assert job.run("--nproc=2", "--grace=0.5", script).code == 0


def test_workers_that_cannot_be_asked(job: Job) -> None:
    """As on a full disk: the job ends all the same."""
    process = job.start(job.script(STEPS + NEVER))
    wait_for_steps(job)
    request = job.path / "runs/train/drain"
    request.unlink()
    request.mkdir()
    process.send_signal(signal.SIGTERM)
    done = job.end(process)
    assert done.code == 75
    assert "workers cannot be asked to save, and are stopped" in done.err


@pytest.mark.parametrize("failure", ["raise RuntimeError", "import os; os.kill(os.getppid(), 9)"])
def test_the_timeline_of_a_recovery(job: Job, failure: str) -> None:
    """From a rank's failure, and from the loss of the zygote, after which there is nothing to stop."""
    script = job.script(STEPS + f"if restarts == 0: {failure}" + FOREVER)
    process = job.start("--nproc=2", script)
    has_started(job, 2, 2)
    [timeline] = until(lambda: journal(job, "recovered"))
    assert 0 <= float(str(timeline["stopped"])) <= float(str(timeline["forked"]))
    assert float(str(timeline["forked"])) <= float(str(timeline["first_step"]))
    wait_for_steps(job, beyond=wait_for_steps(job))
    assert len(journal(job, "recovered")) == 1
    (job.path / "finish").touch()
    assert job.end(process).code == 0


def test_the_drain_file_is_empty_again_in_the_next_round(job: Job) -> None:
    process = job.start(job.script(STEPS + FOREVER))
    wait_for_steps(job)
    ask(job, "restart", "train")
    has_started(job, 2, 1)
    assert Path(job.path / "runs/train/drain").read_bytes() == b""
    (job.path / "finish").touch()
    assert job.end(process).code == 0
    assert os.listdir(job.path / "runs/train").count("control.json") == 0  # noqa: PTH208
