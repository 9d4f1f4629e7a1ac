"""Jobs under a real Slurm on this host, where its daemons are installed (Debian: slurm-wlm, munge)."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.job import LAUNCH, Job
from tests.kit.launching import ROOT

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
PATIENCE = 60.0  # seconds; far more than anything here takes

pytestmark = pytest.mark.skipif(
    not all(shutil.which(name, path=PATH) for name in DAEMONS), reason="Slurm is not installed"
)

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
KillWait=2
JobRequeue=1
ReturnToService=2
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""
"""Nodes are named by their addresses, so that the first one is found by its name. A job that is put back
into the queue waits there for cred_expire, which cannot be shorter."""

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN\n"


class Slurm:
    """Two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        names, host, folder = ("127.0.0.1", "127.0.0.2"), socket.gethostname().split(".")[0], self.folder
        port, *ports = free_ports(1 + len(names))
        nodes = "".join(
            NODE.format(name=name, host=host, port=port) for name, port in zip(names, ports, strict=True)
        )
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, port=port, user=getpass.getuser(), folder=folder, nodes=nodes)
        )
        for name in ("state", *(f"spool.{name}" for name in names)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        munge = {"key": key, "socket": folder / "munge.socket", "pid": folder / "munge.pid"}
        files = [f"--{name}-file={path}" for name, path in munge.items() if name != "socket"]
        files += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
        self.serve("munged", "--foreground", "--force", f"--socket={munge['socket']}", *files)
        wait_until(munge["socket"].exists)
        self.serve("slurmctld", "-D", "-c")
        for name in names:
            self.serve("slurmd", "-D", "-N", name)
        wait_until(lambda: self("sinfo", "-h", "-N", "-o", "%t").stdout.split() == ["idle"] * len(names))

    def serve(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.variables, stdout=log, stderr=subprocess.STDOUT)
            )

    def stop(self) -> None:
        """Also what a test that failed has left behind."""
        if self("squeue", "-h").stdout:
            self("scancel", "--user", getpass.getuser())
            wait_until(lambda: not self("squeue", "-h").stdout)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(PATIENCE)

    def __call__(
        self, *command: str, job: Job | None = None, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's, in the job's folder and environment."""
        return subprocess.run(
            command,
            cwd=job.path if job else self.folder,
            env={**(job.environment if job else {}), **self.variables},
            input=text,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def test_one_launch_on_each_node_is_one_job(slurm: Slurm, job: Job) -> None:
    """Nodes, endpoint and rendezvous id come from Slurm alone."""
    job.use_torch()
    worker = "echo $RANK of $WORLD_SIZE in $TORCHELASTIC_RUN_ID"
    ended = slurm(
        *("srun", "-N2", "--ntasks-per-node=1", *LAUNCH, "--nproc=2", "--", "sh", "-c", worker), job=job
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == [
        f"[{rank}] {rank} of 4 in slurm-1.0-0" for rank in range(4)
    ]


def test_several_launches_on_a_node_are_refused(slurm: Slurm, job: Job) -> None:
    ended = slurm("srun", "-N1", "-n2", *LAUNCH, "--", "true", job=job)
    assert ended.returncode == 2
    assert "expected 1 on each node, found 2: one launch starts all workers of its node" in ended.stderr


def test_the_example_saves_is_requeued_and_resumes(slurm: Slurm, job: Job) -> None:
    """Only a checkpoint that a rank saved because of the signal ends the job, after the requeue.

    Slurm sends --signal to every process of the step, workers included.
    """
    job.use_torch()
    job.script("""
        import time, torch, torch.distributed, shardckpt

        torch.distributed.init_process_group("gloo")
        state = {"weights": torch.ones(4)}
        with shardckpt.Checkpointer(every_steps=1_000_000) as checkpoints:
            at = checkpoints.restore(state)
            step = at.step if at else 0
            while at is None:
                step += 1
                if step == 3:
                    print("under way", flush=True)
                time.sleep(0.01)
                checkpoints.step(step, state)
            print(f"resumed at {step}", flush=True)
        torch.distributed.destroy_process_group()
        """)
    example = (ROOT / "configs/slurm.sbatch").read_text()
    without_gpus = "".join(line for line in example.splitlines(True) if "gpus-per-node" not in line)
    options = ("--parsable", "--nodes=1", "--time=5", "--output=terminal.txt")
    number = slurm("sbatch", *options, job=job, text=without_gpus).stdout.strip()
    terminal = job.path / "terminal.txt"
    wait_until(lambda: terminal.exists() and "under way" in terminal.read_text())
    assert slurm("scancel", "--signal=USR1", number).returncode == 0
    wait_until(lambda: "resumed at" in terminal.read_text())
    wait_until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", number).stdout)
    assert "Restarts=1 " in slurm("scontrol", "show", "job", number).stdout
    assert "killed by" not in terminal.read_text()
