"""The nodes that scripts/soak runs a job on: their network, their agents, their processes, and what they leave.

Nodes are network namespaces on a switch, a bridge in a namespace of its own, so that a cable can be pulled
without the node's own interface noticing. All of that needs root; one node alone also goes without.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "LAUNCH",
    "MARK",
    "Network",
    "Node",
    "Traces",
    "found",
    "kill_all",
    "marked_environment",
    "networked",
    "no_network",
    "send",
    "traces_of",
]

MARK = "SHARDCKPT_SOAK"
"""The variable that holds a text of a soak's own, in its processes and whatever they start."""

LAUNCH = (sys.executable, "-m", "launcher")
_PORT = 29400
_GONE_SECONDS = 20.0


def found(mark: str) -> Iterator[int]:
    """The processes that have the mark, and have not ended."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:
            pass


def kill_all(mark: str) -> list[int]:
    """Kill what has the mark, also what that still starts. Returns what does not die."""
    deadline = time.monotonic() + _GONE_SECONDS
    while (left := list(found(mark))) and time.monotonic() < deadline:
        for pid in left:
            send(pid, signal.SIGKILL)
        time.sleep(0.01)
    return left


def send(pid: int, signum: int) -> bool:
    """Whether there was such a process to signal."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True)
class Network:
    """What `ip` made: one namespace for each node, and one for the switch. None of them for a node alone."""

    name: str = ""
    nodes: int = 1

    def prefix(self, node: int) -> tuple[str, ...]:
        """What runs a command on a node."""
        return ("ip", "netns", "exec", f"{self.name}-{node}") if self.name else ()

    def options(self, node: int) -> tuple[str, ...]:
        """Of `launch` on this node."""
        if self.nodes == 1:
            return ()
        rendezvous = (f"--rdzv-endpoint={self.address(0)}:{_PORT}", f"--rdzv-id={self.name}")
        return (f"--nnodes=1:{self.nodes}", *rendezvous, f"--local-addr={self.address(node)}")

    def environment(self) -> Mapping[str, str]:
        return {"GLOO_SOCKET_IFNAME": "eth0" if self.name else "lo"}

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{node + 1}"

    def pull_cable(self, node: int) -> None:
        """What the node sends from now on is lost, and it hears nothing."""
        _ip("-n", f"{self.name}-sw", "link", "set", f"port{node}", "nomaster")

    def plug_cable(self, node: int) -> None:
        _ip("-n", f"{self.name}-sw", "link", "set", f"port{node}", "master", "bridge")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def no_network() -> Iterator[Network]:
    """The network that is there, for one node."""
    yield Network()


@contextmanager
def networked(nodes: int) -> Iterator[Network]:
    """Nodes that reach each other and nobody else, until the context ends. Needs root."""
    network = Network(f"soak-{secrets.token_hex(3)}", nodes)
    switch = f"{network.name}-sw"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for node in range(nodes):
            name = f"{network.name}-{node}"
            _ip("netns", "add", name)
            _ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{node}",
                "netns",
                switch,
            )
            _ip("-n", switch, "link", "set", f"port{node}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{network.address(node)}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", name, "link", "set", interface, "up")
        yield network
    finally:
        for name in [switch, *(f"{network.name}-{node}" for node in range(nodes))]:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


@dataclass
class Node:
    """One `launch` of a job, started again as often as need be.

    Attributes:
        codes: the exit codes of the agents that have ended, in order; minus the signal that killed one.
    """

    number: int
    network: Network
    words: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    agent: subprocess.Popen[bytes] | None = None
    codes: list[int] = field(default_factory=list)

    def start(self) -> None:
        with (self.folder / f"terminal-{self.number}.txt").open("ab") as terminal:
            self.agent = subprocess.Popen(
                [
                    *self.network.prefix(self.number),
                    *LAUNCH,
                    *self.network.options(self.number),
                    *self.words,
                ],
                cwd=self.folder,
                env={**self.environment, "SOAK_NODE": str(self.number)},
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=terminal,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code of an agent that has ended since the last call; it is no longer there then."""
        if self.agent is None or self.agent.poll() is None:
            return None
        code = self.agent.returncode
        self.agent = None
        self.codes.append(code)
        return code

    @property
    def is_up(self) -> bool:
        return self.agent is not None and self.agent.poll() is None

    def ask(self, verb: str, *words: str) -> int:
        """The exit code of `launch verb RUN words`, as a user of this node would run it."""
        command = [*self.network.prefix(self.number), *LAUNCH, verb, str(self.folder / "run"), *words]
        try:
            done = subprocess.run(
                command, env=self.environment, timeout=60, check=False, capture_output=True, cwd=self.folder
            )
        except subprocess.TimeoutExpired:
            return 124
        return done.returncode

    def processes(self, role: str) -> list[int]:
        """Pids of "agent", "zygote", "worker", "saver" or "member" of this node, as they are now."""
        if self.agent is None:
            return []
        if role == "agent":
            return [self.agent.pid]
        children = {pid: _command(pid) for pid in _children(self.agent.pid)}
        named = {name: [p for p, line in children.items() if text in line] for name, text in _NAMES.items()}
        if role in named:
            return named[role]
        zygotes = [pid for pid in children if not any(pid in pids for pids in named.values())]
        return zygotes if role == "zygote" else [worker for pid in zygotes for worker in _children(pid)]


_NAMES = {"saver": "shardckpt.saver", "member": "launcher.rendezvous.member"}


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Traces:
    """What processes may leave in the system when they have ended."""

    shared_memory: frozenset[str]
    sockets: frozenset[str]

    def beyond(self, before: Traces) -> list[str]:
        """What is here that was not there before."""
        return sorted((self.shared_memory - before.shared_memory) | (self.sockets - before.sockets))


def traces_of(network: Network, nodes: int) -> Traces:
    """Files in /dev/shm; abstract sockets of savers and agents, and TCP sockets that somebody still holds.

    Sockets are looked at in networks of the soak's own only: elsewhere they may be anybody's.
    """
    sockets: set[str] = set()
    for node in range(nodes if network.name else 0):
        prefix = network.prefix(node)
        for name in ("/proc/net/unix", "/proc/net/tcp", "/proc/net/tcp6"):
            text = subprocess.run([*prefix, "cat", name], check=True, capture_output=True, text=True).stdout
            lines = [line.split() for line in text.splitlines()[1:]]
            if name == "/proc/net/unix":
                sockets |= {line[7] for line in lines if len(line) > 7 and line[7].startswith("@launch")}
            else:
                waiting = {
                    "06",
                    "04",
                    "05",
                    "09",
                    "0B",
                }  # nobody holds these; the kernel forgets them by itself
                sockets |= {f"{name} {line[1]} {line[2]}" for line in lines if line[3] not in waiting}
    return Traces(frozenset(path.name for path in Path("/dev/shm").iterdir()), frozenset(sockets))


def marked_environment(mark: str, network: Network) -> dict[str, str]:
    """What the agents of a soak find in their environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM_"))}
    return {**kept, **network.environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: mark}
