"""Whole jobs with real processes: restarts, deaths of every kind, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.kit.job import LAUNCH, Job, lines_told, read_until, wait_for_death

# A worker that tells its pid through a named pipe, then does what the argument says.
WORKER = """
    import os, signal, subprocess, sys, time

    mode, fifo = sys.argv[1:3]
    pids = [os.getpid()]
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "family":
        # A child, a grandchild in a session of its own whose parent ends, all deaf to SIGTERM.
        deaf = "trap '' TERM; echo $$; exec sleep 1000"
        child = subprocess.Popen(["sh", "-c", deaf], stdout=subprocess.PIPE, text=True)
        daemon = f"setsid sh -c \\"{deaf.replace('$$', chr(92) + '$$')}\\" &"
        middle = subprocess.Popen(["sh", "-c", daemon], stdout=subprocess.PIPE, text=True)
        pids += [int(child.stdout.readline()), int(middle.stdout.readline())]
    with open(fifo, "w") as file:
        file.write(" ".join(map(str, [os.environ["RANK"], os.getppid(), *pids])) + chr(10))
    while True:
        signal.pause()
    """


class Running:
    """A started job whose workers have all reported."""

    def __init__(self, job: Job, *options: str, mode: str = "wait", nproc: int = 2) -> None:
        self.fifo = job.path / "fifo"
        if not self.fifo.exists():
            job.fifo()
        script = job.script(WORKER)
        words = [f"--nproc={nproc}", *options, script, mode, str(self.fifo)]
        self.process = job.start(*words)
        self.nproc = nproc
        self.pids: dict[int, list[int]] = {}
        self.zygote = 0
        self.wait_for_workers()

    def wait_for_workers(self) -> None:
        """Wait until the workers of a round have told their pids."""
        for line in lines_told(self.fifo, self.nproc):
            rank, self.zygote, *pids = map(int, line.split())
            self.pids[rank] = pids

    def everyone(self) -> list[int]:
        return [self.zygote, *(pid for pids in self.pids.values() for pid in pids)]


def test_all_ranks_run_and_finish(job: Job) -> None:
    script = job.script("import os, sys; print('hello', os.environ['RANK']); sys.stderr.write('e')")
    done = job.run("--nproc=3", script)
    assert done.code == 0
    assert sorted(done.out.splitlines()) == [f"[{rank}] hello {rank}" for rank in range(3)]
    assert done.err.splitlines()[0] == "launch: round 1: 3 workers, output in runs/train/logs/round-0001"
    assert sorted(done.err.splitlines()[1:-1]) == ["[0] e", "[1] e", "[2] e"]
    assert re.fullmatch(r"launch: finished in \d+ s", done.err.splitlines()[-1])
    assert not (job.path / "runs/train/verdicts.jsonl").exists()


FLAKY = """
    import os, sys
    number, rank = int(os.environ["LAUNCH_ROUND"]), int(os.environ["RANK"])
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    print(number, rank, restarts)
    if rank == 1 and number < int(sys.argv[1]):
        raise ValueError(f"boom {number}")
    """


@pytest.mark.parametrize("options", [[], ["--cold"]])
def test_a_failure_begins_a_new_round(job: Job, options: list[str]) -> None:
    """Files of each round stay; the verdict is printed and recorded; counting goes on later."""
    script = job.script(FLAKY)
    done = job.run("--nproc=2", *options, script, "3")
    assert done.code == 0
    assert job.log(1, number=1) == "1 1 0\n"
    assert job.log(1, number=3) == "3 1 2\n"
    assert "ValueError: boom 2" in job.log(1, "err", number=2)
    assert re.search(r"rank 1 failed first, at [\d:.]+: ValueError: boom 1 \(exit code 1\)", done.err)
    assert "restarting in 0.5 s: 2 of at most 3 restarts" in done.err
    assert re.fullmatch(r"launch: finished in \d+ s: 2 restarts", done.err.splitlines()[-1])
    verdicts = (job.path / "runs/train/verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["cause"] for line in verdicts] == [
        "ValueError: boom 1 (exit code 1)",
        "ValueError: boom 2 (exit code 1)",
    ]
    assert job.run("--nproc=2", *options, script, "3").code == 0
    assert job.log(0, number=4) == "4 0 0\n"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import sys; sys.exit(7)", 7),
        ("raise RuntimeError", 1),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os.kill(os.getpid(), 15)", 143),
        ("import ctypes; ctypes.string_at(0)", 139),
    ],
)
def test_the_exit_code_is_the_workers(job: Job, source: str, code: int) -> None:
    done = job.run("--max-restarts=1", job.script(source))
    assert done.code == code
    assert f"giving up: 1 restart used up; exit code {code}" in done.err
    assert sorted(path.name for path in (job.path / "runs/train/logs").iterdir()) == [
        "round-0001",
        "round-0002",
    ]


def test_a_command_that_cannot_be_executed(job: Job) -> None:
    """Found only by executing it: an interpreter that does not exist."""
    script = job.path / "tool"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = job.run("--max-restarts=0", "--", "./tool")
    assert done.code == 127
    assert "launch: ./tool: No such file or directory" in done.err


def test_kill_9_of_a_worker(job: Job) -> None:
    running = Running(job, nproc=3)
    first = dict(running.pids)
    os.kill(first[1][0], signal.SIGKILL)
    running.wait_for_workers()
    for pids in first.values():
        wait_for_death(pids[0])
    running.process.send_signal(signal.SIGTERM)
    done = job.end(running.process)
    assert done.code == 143
    assert re.search(r"rank 1 failed first, at [\d:.]+: killed by SIGKILL", done.err)
    assert "stopped: ranks 0, 2" in done.err


def test_kill_9_of_the_zygote(job: Job) -> None:
    """Its workers die with it, what they started too, and a new zygote starts a new round."""
    running = Running(job, "--grace=0.1", mode="family")
    before = running.everyone()
    os.kill(running.zygote, signal.SIGKILL)
    running.wait_for_workers()
    for pid in before:
        wait_for_death(pid)
    assert running.zygote not in before
    running.process.send_signal(signal.SIGQUIT)
    done = job.end(running.process)
    assert done.code == 131
    assert "the zygote was lost, and all workers with it: killed by SIGKILL" in done.err


@pytest.mark.parametrize("options", [[], ["--cold"]])
def test_kill_9_of_the_agent(job: Job, options: list[str]) -> None:
    running = Running(job, *options, mode="family")
    running.process.kill()
    for pid in running.everyone():
        wait_for_death(pid)


def test_kill_9_of_agent_and_zygote_together(job: Job) -> None:
    """Nobody is left to clean up, so the kernel kills the workers."""
    running = Running(job)
    os.kill(running.process.pid, signal.SIGSTOP)
    os.kill(running.zygote, signal.SIGKILL)
    running.process.kill()
    for pid in running.everyone():
        wait_for_death(pid)


def test_deaths_are_told_in_their_order(job: Job) -> None:
    """Even if the zygote was not running while they happened."""
    running = Running(job, "--max-restarts=0", nproc=4)
    os.kill(running.zygote, signal.SIGSTOP)
    for rank in (2, 0, 3):
        pid = running.pids[rank][0]
        os.kill(pid, signal.SIGKILL)
        wait_for_death(pid)
    os.kill(running.zygote, signal.SIGCONT)
    err = job.end(running.process).err
    assert re.search(r"rank 2 failed first, at [\d:.]+: killed by SIGKILL", err)


def test_kill_9_of_the_agent_while_the_zygote_imports(job: Job) -> None:
    """A zygote that is deaf for a while dies with the agent all the same."""
    fifo = job.fifo()
    job.script(
        f"import os, time\nopen({str(fifo)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)",
        "slow.py",
    )
    process = job.start("--preload", "slow", job.script(""))
    zygote = int(fifo.read_text())
    process.kill()
    wait_for_death(zygote)


def test_ctrl_c_while_the_zygote_imports(job: Job) -> None:
    fifo = job.fifo()
    job.script(f"import time\nopen({str(fifo)!r}, 'w').close()\ntime.sleep(1000)", "slow.py")
    process = job.start("--preload", "slow", job.script(""))
    fifo.read_text()
    # The round must have begun, or the interrupt would find nothing to stop.
    assert process.stderr is not None
    assert "round 1" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert job.end(process).code == 130


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stop_leaves_nothing(job: Job, signum: int, code: int) -> None:
    running = Running(job)
    running.process.send_signal(signum)
    done = job.end(running.process)
    assert done.code == code
    name = signal.Signals(signum).name
    assert f"launch: {name}: stopping; workers have 15 s to end, or until another {name}" in done.err
    assert f"launch: stopped by {name}; nothing is left running" in done.err
    assert "failed" not in done.err


def test_nohup_is_respected(job: Job) -> None:
    script = job.script(WORKER)
    fifo = job.fifo()
    words = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    running = subprocess.Popen(
        [*words, *LAUNCH, script, "wait", str(fifo)],
        cwd=job.path,
        env=job.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    job.started.append(running)
    fifo.read_text()
    running.send_signal(signal.SIGHUP)
    running.send_signal(signal.SIGTERM)
    assert job.end(running).code == 143


@pytest.mark.parametrize("mode", ["deaf", "family"])
def test_deaf_workers_cost_the_grace_and_no_more(job: Job, mode: str) -> None:
    """The whole tree of a worker, daemons included, gets SIGTERM and then SIGKILL."""
    running = Running(job, "--grace=0.2", mode=mode)
    running.process.send_signal(signal.SIGTERM)
    done = job.end(running.process)
    assert done.code == 143
    assert "launch: killing what has not ended" in done.err
    for pid in running.everyone():
        wait_for_death(pid)


def test_insisting_kills_at_once(job: Job) -> None:
    running = Running(job, "--grace=1000", mode="deaf")
    running.process.send_signal(signal.SIGINT)
    read_until(running.process, "SIGINT: stopping")
    running.process.send_signal(signal.SIGINT)
    assert job.end(running.process).code == 130


def test_a_failure_stops_the_families_of_the_others(job: Job) -> None:
    running = Running(job, "--grace=0.1", "--max-restarts=0", mode="family")
    os.kill(running.pids[0][0], signal.SIGKILL)
    done = job.end(running.process)
    assert done.code == 137
    for pid in running.everyone():
        wait_for_death(pid)


def test_victims_speak_to_their_logs_only(job: Job) -> None:
    """After a failure the terminal shows it and its verdict, not what the other ranks say about it."""
    fifo = job.fifo()
    source = """
        import os, signal, sys
        if os.environ["RANK"] == "1":
            open(sys.argv[1]).read()
            raise ValueError("the cause")
        def end(*_):
            sys.stderr.write("lost my peer\\n")
            sys.exit(1)
        signal.signal(signal.SIGTERM, end)
        open(sys.argv[1], "w").close()
        signal.pause()
        """
    done = job.run("--nproc=2", "--max-restarts=0", job.script(source), str(fifo))
    assert "the cause" in done.err
    assert "lost my peer" not in done.err
    assert job.log(0, "err") == "lost my peer\n"


def test_what_finished_workers_leave_behind_is_ended(job: Job) -> None:
    """Also if it holds on to the worker's stdout; it is named, a line each, and has the grace to end in order."""
    script = job.script(
        """
        import os, signal, subprocess, sys
        last = "import signal, sys, time\\n"
        last += "signal.signal(15, lambda *_: sys.exit(open('uploaded', 'w').write('all'))); "
        last += "print('ready', flush=True); time.sleep(1000)"
        child = subprocess.Popen(
            [sys.executable, "-c", last], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        child.stdout.readline()
        subprocess.Popen(["sh", "-c", "setsid sleep 1000 & sleep 0.05"])
        if os.fork() == 0:
            signal.pause()
        print("done")
        """
    )
    done = job.run(script)
    assert done.code == 0
    assert done.out == "[0] done\n"
    assert "3 processes left behind by ranks, told to end (SIGTERM), within 15 s (--grace):" in done.err
    assert re.search(
        r"  pid \d+ of rank 0: \S+python\S* -c import signal, sys, time signal.signal", done.err
    )
    assert re.search(r"  pid \d+ of rank 0: \S+python\S* -u train.py", done.err), done.err
    assert re.search(r"  pid \d+ of rank 0: sleep 1000", done.err)
    assert (job.path / "uploaded").read_text() == "all"


def test_helpers_that_end_with_their_rank_are_not_worth_a_word(job: Job) -> None:
    done = job.run(job.script("import subprocess; subprocess.Popen(['sleep', '0.1'])"))
    assert (done.code, "left behind" in done.err) == (0, False)


def test_what_is_left_behind_and_deaf_is_killed(job: Job) -> None:
    script = job.script(
        """
        import subprocess
        deaf = "trap '' TERM; echo; while :; do sleep 1; done"
        child = subprocess.Popen(["sh", "-c", deaf], stdout=subprocess.PIPE)
        child.stdout.readline()
        """
    )
    done = job.run("--grace=0.3", script)
    assert done.code == 0
    assert "that ranks left behind, which SIGTERM did not end:" in done.err


def test_sigusr1_does_no_harm(job: Job) -> None:
    """Not even when a scheduler sends it to every process of the job but the workers."""
    running = Running(job)
    for pid in (running.process.pid, running.zygote):
        for signum in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, signum)
    os.kill(running.zygote, signal.SIGTERM)
    os.kill(running.pids[0][0], signal.SIGKILL)
    running.wait_for_workers()
    running.process.send_signal(signal.SIGTERM)
    done = job.end(running.process)
    assert done.code == 143
    assert "rank 0 failed first" in done.err


def test_a_gone_reader_does_not_end_the_job(job: Job) -> None:
    """`launch … | head`: the output goes on into the files, the job to its end."""
    read_end, write_end = os.pipe()
    script = job.script(
        "import sys\nfor i in range(20000): print('line', i)\nsys.stderr.write('last words')"
    )
    process = job.start(script, stdout=write_end)
    os.close(write_end)
    assert os.read(read_end, 10).startswith(b"[0] line 0")
    os.close(read_end)
    done = job.end(process)
    assert done.code == 0
    assert "stdout has no reader any more; the job goes on" in done.err
    assert "[0] last words" in done.err
    assert job.log(0).endswith("line 19999\n")


def test_all_readers_gone(job: Job) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    script = job.script("print('x' * 100000)\nraise SystemExit(5)")
    process = job.start("--max-restarts=1", script, stdout=write_end, stderr=write_end)
    os.close(write_end)
    assert job.end(process).code == 5
    assert len(job.log(0, number=2)) == 100001


def test_a_slow_reader_does_not_slow_the_workers(job: Job) -> None:
    """They write to files: here they finish although nobody reads a single byte until then."""
    fifo = job.fifo()
    script = job.script(f"print('x' * 3_000_000)\nopen({str(fifo)!r}, 'w').write('finished')")
    process = job.start(script)
    assert fifo.read_text() == "finished"
    done = job.end(process)
    assert done.code == 0
    assert done.out.count("x") == 3_000_000


def test_two_jobs_in_one_run_directory(job: Job) -> None:
    running = Running(job)
    done = job.run(job.script("print('second')", "other.py"), "--x")
    assert done.code == 0  # another directory
    second = job.run("--run-dir=runs/train", "other.py")
    assert second.code == 69
    assert f"in use by another launch (pid {running.process.pid})" in second.err
    running.process.send_signal(signal.SIGTERM)
    assert job.end(running.process).code == 143


def test_the_port_of_a_round(job: Job) -> None:
    """Rank 0 can listen on it, nobody gets it by chance, the next round has another, and this is let go."""
    script = job.script(
        """
        import os, socket
        port = int(os.environ["MASTER_PORT"])
        zygote = open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()
        fds = f"/proc/{zygote[1]}/fd"  # of the agent
        print(port, sum("socket:" in os.path.realpath(f"{fds}/{fd}") for fd in os.listdir(fds)))
        with socket.create_server(("127.0.0.1", port)) as server:
            with socket.create_connection(("127.0.0.1", port)):
                server.accept()
        raise SystemExit(int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == 0)
        """
    )
    assert job.run(script).code == 0
    (first, held), (second, still_held) = (job.log(0, number=number).split() for number in (1, 2))
    assert first != second
    assert int(held) == int(still_held) > 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = job.run(f"--master-port={port}", "--run-dir=new", script)
    assert done.code == 69
    assert f"port {port} is in use" in done.err
    assert not (job.path / "new").exists()


BAD = [
    (["--nproc=0", "train.py"], 2, "--nproc: expected a number of workers"),
    (["nope.py"], 2, "script nope.py does not exist"),
    (["-m", "nope"], 2, "-m nope: no such module"),
    (["--config=bad.yaml", "train.py"], 2, "bad.yaml:1: unknown option nprok: did you mean nproc?"),
    (["--nnodes=2", "train.py"], 2, "2 nodes need a place to meet"),
    (["--master-addr=no.such.host.invalid", "train.py"], 2, "cannot be resolved"),
    (["--run-dir=train.py/x", "train.py"], 73, "cannot be written"),
    (["--", "nope"], 127, "command nope not found"),
]


@pytest.mark.parametrize(("argv", "code", "message"), BAD)
def test_bad_input_is_one_line_and_changes_nothing(
    job: Job, argv: list[str], code: int, message: str
) -> None:
    job.script("")
    (job.path / "bad.yaml").write_text("nprok: 3\n")
    done = job.run(*argv)
    assert done.code == code
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert sorted(path.name for path in job.path.iterdir()) == ["bad.yaml", "train.py"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["closed/x.py"], 2, "script closed/x.py cannot be read: check the permissions of its folders"),
        (["--", "closed/x"], 127, "command closed/x not found: check it and PATH"),
        (["--", "nope"], 127, "command nope not found: check it and PATH"),
        (["status", "closed/x"], 69, "closed/x is closed to this user: ask as the user whose job it is"),
        (
            ["--ckpt", "closed/x", "closed/x.py"],
            2,
            "script closed/x.py cannot be read: check the permissions of its folders",
        ),
    ],
)
def test_folders_that_are_closed_to_this_user(job: Job, argv: list[str], code: int, message: str) -> None:
    """PATH may name some, too. Without capabilities root is a user like others."""
    closed = job.path / "closed"
    closed.mkdir(mode=0)
    job.environment["PATH"] = f"{closed}:{job.environment['PATH']}"
    powerless = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*powerless, *LAUNCH, *argv],
        cwd=job.path,
        env=job.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, f"launch: {message}\n")


def test_steps_are_in_the_verdict(job: Job) -> None:
    script = job.script("import launcher; launcher.report(41); launcher.report(42); 1 / 0")
    done = job.run("--max-restarts=0", script)
    assert "ZeroDivisionError: division by zero (exit code 1)" in done.err
    assert "step 42 reached" in done.err


GLOO = """
    import os, sys, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    print("sum", total.item(), flush=True)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()
    dist.destroy_process_group()
    """


@pytest.mark.parametrize("options", [[], ["--master-port=PORT", "--standalone"]])
def test_collectives_work_again_after_a_restart(job: Job, options: list[str]) -> None:
    """No key of the dead round is seen by the next, on a new port or on the old one."""
    job.use_torch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [option.replace("PORT", port) for option in options]
    done = job.run("--nproc=3", *words, job.script(GLOO))
    assert done.code == 0, done.err
    assert job.log(1, number=1) == "sum 6.0\n"  # the others may not have got that far
    assert [job.log(rank, number=2) for rank in range(3)] == ["sum 6.0\n"] * 3
    assert re.search(r"rank 1 failed first, at [\d:.]+: killed by SIGKILL", done.err)


RECORD = """
    from torch.distributed.elastic.multiprocessing.errors import record
    @record
    def main():
        raise RuntimeError("recorded")
    main()
    """


def test_the_error_file_of_record_is_read(job: Job) -> None:
    job.use_torch()
    done = job.run("--max-restarts=0", job.script(RECORD))
    assert done.code == 1
    verdict = json.loads((job.path / "runs/train/verdicts.jsonl").read_text())
    assert verdict["cause"] == "RuntimeError: recorded (exit code 1)"
    assert re.search(r"in main\n.*recorded", "\n".join(verdict["lines"]), re.DOTALL)
    error = Path(job.path, "runs/train/logs/round-0001/rank-00000.error.json")
    assert "recorded" in error.read_text()


@pytest.mark.parametrize(
    ("source", "error", "code"),
    [
        ("x = = 3", "SyntaxError: invalid syntax", 1),
        ("import nosuchmodule.part", "ModuleNotFoundError: No module named 'nosuchmodule'", 1),
        (
            "import argparse; argparse.ArgumentParser().parse_args(['--x'])",
            "unrecognized arguments: --x",
            2,
        ),
    ],
)
def test_what_fails_each_time_is_not_tried_again(job: Job, source: str, error: str, code: int) -> None:
    done = job.run("--nproc=3", job.script(source))
    assert done.code == code
    assert error in done.err
    assert f"giving up: no other try, since every rank fails so at its start; exit code {code}" in done.err
    assert not (job.path / "runs/train/logs/round-0002").exists()
