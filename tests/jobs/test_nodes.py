"""Jobs of several nodes: two or three agents on one machine, with a rendezvous on the loopback interface.

Workers are plain programs that follow the worker contract themselves, so that only the members need torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kit.job import PATIENCE, Ended, Job, until, wait_for_death

# Reports steps, answers drain requests, and fails if its node's test asks for that.
WORKER = """
    import json, os, sys, time

    rank, local, node = (os.environ[name] for name in ("RANK", "LOCAL_RANK", "NODE"))
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    job = os.path.dirname(os.path.abspath(__file__))

    def tell(step):
        facts = json.dumps({"drains": os.environ.get("DRAINS") != "no", "first_step": time.time()})
        with open(os.environ["LAUNCH_PROGRESS_FILE"], "r+b" if step > 1 else "wb", buffering=0) as file:
            file.write(f"{step:20d} {time.time():20.6f}\\n{facts:<469}\\n".encode())

    def exists(name):
        return os.path.exists(os.path.join(job, name))

    print(os.environ["LAUNCH_ROUND"], rank, os.environ["WORLD_SIZE"], restarts, node, flush=True)
    step = 0
    while not exists("finish"):
        if exists(f"fail-{node}-{local}-{restarts}"):
            raise ValueError(f"boom {restarts}")
        with open(os.environ["LAUNCH_DRAIN_FILE"]) as file:
            if file.read():
                sys.exit(75)
        step = min(step + 1, int(os.environ.get("STEPS", "1000000")))
        tell(step)
        time.sleep(0.02)
    """


class Line(NamedTuple):
    """What a worker prints when it starts."""

    round: int
    rank: int
    world: int
    restarts: int
    node: str

    @classmethod
    def of(cls, text: str) -> Line | None:
        if not text.endswith("\n"):
            return None
        *numbers, node = text.split()
        return cls(*map(int, numbers), node)  # type: ignore[call-arg]


class Nodes:
    """Agents of one job, each with a name, and all in one run directory."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.use_torch()
        self.port = unused_port()
        self.script = job.script(WORKER, "work.py")
        self.agents: dict[str, subprocess.Popen[str]] = {}

    def start(
        self,
        name: str,
        *options: str,
        nodes: str = "2",
        nproc: int = 2,
        args: Sequence[str] = (),
        **environ: str,
    ) -> None:
        self.agents[name] = self.job.start(
            f"--nnodes={nodes}",
            f"--rdzv-endpoint=127.0.0.1:{self.port}",
            "--rdzv-id=test",
            f"--nproc={nproc}",
            "--run-dir=run",
            *options,
            "--",
            sys.executable,
            self.script,
            *args,
            env={**self.job.environment, "NODE": name, **environ},
        )

    def touch(self, name: str) -> None:
        (self.job.path / name).touch()

    def finish(self) -> dict[str, Ended]:
        self.touch("finish")
        return self.end()

    def end(self) -> dict[str, Ended]:
        return {name: self.job.end(process) for name, process in self.agents.items()}

    def gather(self, *names: str, workers: int = 2, after: int = 0) -> list[Line]:
        """Wait for a round of these nodes alone, numbered above `after`, and return what its workers say."""

        def look() -> list[Line]:
            for path in sorted(self.job.path.glob("run/logs/round-*"), reverse=True):
                lines = [Line.of(log.read_text()) for log in sorted(path.glob("rank-*.out"))]
                said = [line for line in lines if line is not None]
                is_whole = len(said) == len(names) * workers and len(said) == len(lines)
                if is_whole and {line.node for line in said} == set(names) and said[0].round > after:
                    return said
            return []

        return until(look)

    def events(self, name: str) -> list[dict[str, object]]:
        """The journal of the agent called `name`."""
        pid = self.agents[name].pid
        for path in self.job.path.glob("run/nodes/*/events.jsonl"):
            events = [json.loads(line) for line in path.read_text().splitlines()]
            if any(event.get("pid") == pid for event in events):
                return events
        return []


@pytest.fixture
def nodes(job: Job) -> Iterator[Nodes]:
    """What serves the store may outlive its agent for some seconds, but no longer."""
    yield Nodes(job)
    if all(process.poll() is not None for process in job.started):
        until(lambda: not job.left_over())


def test_a_failure_on_one_node_restarts_all(nodes: Nodes) -> None:
    """One verdict, one count of restarts, and one end. Progress would refill the budget.

    Arguments may differ, but users are told.
    """
    nodes.start("a", "--max-restarts=1", STEPS="1")
    nodes.start("b", "--max-restarts=1", STEPS="1", args=["--lr", "0.2"])
    first = nodes.gather("a", "b")
    assert sorted(line.rank for line in first) == [0, 1, 2, 3]
    assert {(line.round, line.world, line.restarts) for line in first} == {(1, 4, 0)}
    nodes.touch("fail-b-1-0")
    second = nodes.gather("a", "b", after=1)
    assert {(line.round, line.world, line.restarts) for line in second} == {(2, 4, 1)}
    nodes.touch("fail-a-0-1")
    ends = nodes.end()
    assert [end.code for end in ends.values()] == [1, 1]
    for end in ends.values():
        assert "giving up: 1 restart used up" in end.err
        assert re.search(r"rank \d on \S+ failed first, at [\d:.]+: ValueError: boom 0", end.err)
        assert re.search(r"node \d \(\S+\) has other arguments: ", end.err)
    assert re.search(r"work.py --lr 0.2; here: .*work.py\n", ends["a"].err)


def test_the_loss_of_a_node(nodes: Nodes) -> None:
    """The job goes on with the others, and takes the node in again at a step boundary."""
    nodes.start("a", nodes="1:2")
    nodes.start("b", nodes="1:2")
    nodes.gather("a", "b")
    nodes.agents["b"].kill()
    alone = nodes.gather("a")[0].round
    lost = next(event for event in nodes.events("a") if event["event"] == "node_lost")
    assert "was killed" in str(lost["why"])
    nodes.start("c", nodes="1:2")
    nodes.gather("a", "c", after=alone)
    ends = nodes.finish()
    assert (ends["a"].code, ends["c"].code) == (0, 0)
    assert "round ended at a step boundary: taking in the nodes that wait" in ends["a"].err
    assert "1 of at most" not in ends["a"].err  # neither cost a restart


def test_the_loss_of_the_node_at_the_endpoint(nodes: Nodes) -> None:
    """The member that serves the store outlives its agent while other nodes use the store."""
    nodes.start("a", nodes="1:2")
    until(lambda: "serving" if port_is_open(nodes.port) else "")
    nodes.start("b", nodes="1:2")
    number = nodes.gather("a", "b")[0].round
    nodes.agents["a"].kill()
    nodes.gather("b", after=number)
    assert nodes.finish()["b"].code == 0


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_open(port: int) -> bool:
    return any(line.split()[1].endswith(f":{port:04X}") for line in listening())


def listening() -> list[str]:
    tables = [Path("/proc/net/tcp").read_text(), Path("/proc/net/tcp6").read_text()]
    return [line for table in tables for line in table.splitlines()[1:] if line.split()[3] == "0A"]


def test_a_suspended_node_is_lost_and_comes_back(nodes: Nodes) -> None:
    nodes.start("a", nodes="1:2")
    until(lambda: port_is_open(nodes.port))  # or the frozen node may be the one that serves the store
    nodes.start("b", nodes="1:2")
    number = nodes.gather("a", "b")[0].round
    frozen = processes_of(nodes.job, nodes.agents["b"].pid)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    nodes.gather("a", after=number)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    nodes.gather("a", "b", after=number)
    assert [end.code for end in nodes.finish().values()] == [0, 0]


def test_a_suspended_launch_is_lost(nodes: Nodes) -> None:
    """Its workers go on undisturbed until a round fails and its report is needed."""
    nodes.start("a", "--grace=1", nodes="1:2")
    until(lambda: port_is_open(nodes.port))
    nodes.start("b", "--grace=1", nodes="1:2")
    number = nodes.gather("a", "b")[0].round
    nodes.agents["b"].send_signal(signal.SIGSTOP)
    nodes.touch("fail-a-0-0")
    alone = nodes.gather("a", after=number)[0].round
    lost = next(event for event in nodes.events("a") if event["event"] == "node_lost")
    assert "its launch has said nothing for" in str(lost["why"])
    nodes.agents["b"].send_signal(signal.SIGCONT)
    nodes.gather("a", "b", after=alone)
    assert [end.code for end in nodes.finish().values()] == [0, 0]


def processes_of(job: Job, agent: int) -> list[int]:
    """The agent and everything that it has started, member and workers included."""
    name = next(
        variable
        for variable in Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
        if variable.startswith(b"NODE=")
    )
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if name in variables and f"LAUNCH_TEST_MARK={job.mark}".encode() in variables:
            found.append(int(path.name))
    return found


@pytest.mark.parametrize(("least", "goes_on"), [(1, True), (2, False)])
def test_a_node_that_is_told_to_leave(nodes: Nodes, least: int, goes_on: bool) -> None:
    """It saves and ends with 75; the others go on if they are enough."""
    nodes.start("a", nodes=f"{least}:2")
    nodes.start("b", nodes=f"{least}:2")
    number = nodes.gather("a", "b")[0].round
    until(lambda: knows_that_workers_drain(nodes, "b"))
    nodes.agents["b"].send_signal(signal.SIGTERM)
    if goes_on:
        nodes.gather("a", after=number)
        nodes.touch("finish")
    ends = nodes.end()
    assert (ends["a"].code, ends["b"].code) == (0 if goes_on else 75, 75)
    assert "saved at step" in ends["b"].err


def knows_that_workers_drain(nodes: Nodes, name: str) -> bool:
    """Whether the agent has looked at its workers' progress since they report it."""
    for record in nodes.job.path.glob("run/nodes/*/control.json"):
        if json.loads(record.read_text())["pid"] == nodes.agents[name].pid:
            done = subprocess.run(
                [sys.executable, "-m", "launcher", "status", "--json", str(record.parent)],
                capture_output=True,
                text=True,
                env=nodes.job.environment,
                timeout=PATIENCE,
            )
            return done.returncode == 0 and json.loads(done.stdout)["step"] is not None
    return False


def test_ctrl_c_on_one_node_ends_the_job(nodes: Nodes) -> None:
    nodes.start("a")
    nodes.start("b")
    nodes.gather("a", "b")
    nodes.agents["b"].send_signal(signal.SIGINT)
    assert [end.code for end in nodes.end().values()] == [130, 130]


def test_too_few_nodes(nodes: Nodes) -> None:
    """A team that has lost a node waits for another one, and ends when none comes."""
    conf = "--rdzv-conf=join_timeout=3"
    nodes.start("a", conf)
    nodes.start("b", conf)
    nodes.gather("a", "b")
    nodes.agents["b"].kill()
    end = nodes.job.end(nodes.agents.pop("a"))
    assert end.code == 78
    assert "1 of at least 2 nodes" in end.err


def test_preempted_while_it_waits_for_nodes(nodes: Nodes) -> None:
    """There is no team yet and nothing to save; earlier checkpoints can be resumed."""
    nodes.start("a")
    nodes.start("b")
    nodes.gather("a", "b")
    until(lambda: knows_that_workers_drain(nodes, "a"))
    nodes.agents["b"].kill()
    err = nodes.agents["a"].stderr
    assert err is not None
    lines = iter(err.readline, "")
    waits = [next(line for line in lines if "waiting for 2 nodes" in line) for _ in range(2)]
    nodes.agents["a"].send_signal(signal.SIGTERM)
    end = nodes.job.end(nodes.agents.pop("a"))
    assert (len(waits), end.code) == (2, 75), end.err
    assert "start it again to go on" in end.err


def test_a_node_that_cannot_write(nodes: Nodes) -> None:
    """It reports why and ends; the others go on without it."""
    (nodes.job.path / "run/ranks").mkdir(parents=True)
    (nodes.job.path / "run/ranks/rank-00002").touch()  # where a directory should be
    nodes.start("a", nodes="1:2")
    nodes.start("b", nodes="1:2")
    until(lambda: any(agent.poll() is not None for agent in nodes.agents.values()))
    [name] = [name for name, agent in nodes.agents.items() if agent.poll() is None]
    nodes.gather(name, after=1)
    ends = nodes.finish()
    ended = ends.pop(name)
    [failed] = ends.values()
    assert (ended.code, failed.code) == (0, 73)
    assert "cannot be written (File exists: " in failed.err.splitlines()[-1]
    assert "is lost" in ended.err
    ended_with = [event["exit_code"] for other in ends for event in nodes.events(other)[-1:]]
    assert ended_with == [73]


def test_an_endpoint_that_refuses(nodes: Nodes) -> None:
    nodes.start("a", "--rdzv-conf=is_host=false,read_timeout=3")
    end = nodes.end()["a"]
    assert end.code == 69
    assert f"127.0.0.1:{nodes.port}" in end.err.splitlines()[-1]
    assert "Traceback" not in end.err


def test_two_jobs_with_one_id(nodes: Nodes) -> None:
    other = nodes.job.script(textwrap.dedent(WORKER), "other.py")
    nodes.start("a")
    nodes.script = other
    nodes.start("b")
    ends = nodes.end()
    assert [end.code for end in ends.values()] == [2, 2]
    assert all("--rdzv-id" in end.err.splitlines()[-1] for end in ends.values())


def test_kill_9_of_the_member(nodes: Nodes) -> None:
    """The node's member is replaced; the other nodes see a lost node."""
    nodes.start("a", nodes="1:2")
    until(lambda: port_is_open(nodes.port))
    nodes.start("b", nodes="1:2")
    number = nodes.gather("a", "b")[0].round
    [member] = [
        pid
        for pid in processes_of(nodes.job, nodes.agents["b"].pid)
        if b"launcher.rendezvous.member" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(member, signal.SIGKILL)
    wait_for_death(member)
    nodes.gather("a", "b", after=number)
    assert [end.code for end in nodes.finish().values()] == [0, 0]
