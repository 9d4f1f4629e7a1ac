"""Leases: a job that is at work in a run says so there, so that a second job finds out before it starts.

`attempt.json` says when the attempt began and for how long that counts; `lease.json` beside it says the same anew
every few seconds. Only the attempt's own job writes there, so no storage needs an atomic operation. A job lives
if its lease *changes* while another job watches it; clocks only spare that wait where a lease is far too old.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shardckpt.environment import JobEnvironment
from shardckpt.errors import FormatError, RunInUseError
from shardckpt.format import records
from shardckpt.storage import Storage

__all__ = ["LEASE", "Holder", "Lease", "Terms", "job_names", "read_lease", "wait_free"]

LEASE = "lease.json"

_LONGEST = 120.0  # seconds that another job's lease is believed to last, whatever it says
_LOOK_EVERY = 1.0


@dataclass(frozen=True)
class Terms:
    """How leases are renewed and judged. Times are in seconds.

    Attributes:
        renew_every: time from one renewal to the next.
        lasts: time without a change after which a lease is over.
        skew: how far the clocks of two hosts may be apart.
    """

    renew_every: float = 10.0
    lasts: float = 30.0
    skew: float = 30.0


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lease.

    Attributes:
        names: of its job. Two holders belong to one job if they have a name in common.
        host: its host's name, for messages.
        machine: equal for two processes only if their process ids are of one space.
        processes: id of each of its processes -> its start time, in ticks since the machine's start.
    """

    names: tuple[str, ...]
    host: str = ""
    machine: str = ""
    processes: dict[str, int] = {}

    @classmethod
    def of_this_process(cls, names: Iterable[str]) -> Holder:
        """This process, as a part of the job with these names."""
        pid, machine = os.getpid(), _machine()
        started = _started(pid)
        own = f"process {machine} {pid} {started}"
        return cls((*names, own), socket.gethostname(), machine, {str(pid): started})

    def with_process(self) -> Holder:
        """The same holder, with this process added."""
        if self.machine != _machine():
            return self
        pid = os.getpid()
        return msgspec.structs.replace(self, processes={**self.processes, str(pid): _started(pid)})

    def is_same_job(self, other: Holder) -> bool:
        """True if the other holder is of this job, in any of its rounds."""
        return bool(set(self.names) & set(other.names))

    @property
    def is_dead(self) -> bool:
        """True if all its processes are known to have ended."""
        if not self.processes or self.machine != _machine():
            return False
        return all(_started(int(pid)) != started for pid, started in self.processes.items())


class Lease(msgspec.Struct, frozen=True):
    """A lease, as it is stored.

    Attributes:
        id: the attempt's.
        holder: the job that holds it.
        renewed: time of the last renewal, in seconds since 1970 by the holder's clock.
        lasts: seconds from one renewal to the next, at most.
        is_over: True once the job has ended.
    """

    id: str
    holder: Holder
    renewed: float
    lasts: float
    is_over: bool = False

    def encode(self) -> bytes:
        """Encode it for the storage."""
        return records.encode({"format": records.FORMAT, **msgspec.to_builtins(self)})


class _Claim(msgspec.Struct):
    """The members of attempt.json that make it an attempt's first lease."""

    id: str
    created: float
    lasts: float = 0.0
    holder: Holder = Holder(())


def read_lease(attempt: Storage, claim: str) -> Lease | None:
    """The lease of the attempt in this folder; `claim` is the name of its claim. None if nobody can hold it."""
    for name in (LEASE, claim):
        try:
            record = records.decode_small(attempt.read(name), name)
            if name == LEASE:
                return msgspec.convert(record, Lease)
            first = msgspec.convert(record, _Claim)
            return Lease(first.id, first.holder, first.created, first.lasts)
        except (FileNotFoundError, FormatError, msgspec.ValidationError):
            continue
    return None


def wait_free(
    attempt: Storage,
    claim: str,
    own: Holder,
    terms: Terms,
    tell: Callable[[str], object] = lambda _text: None,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Return once no other job can be at work in this attempt.

    At once if the attempt is of the same job, if its job has ended, if its processes are known here to be
    dead, or if its lease is so old that no clock explains it. Otherwise this looks whether the lease is
    renewed, for as long as it lasts.

    Raises RunInUseError if it is.
    """
    first = read_lease(attempt, claim)
    if first is None or _is_free(first, own, terms):
        return
    where = f"by a job on {first.holder.host or 'an unknown host'}"
    lasts = min(first.lasts, _LONGEST)
    tell(f"{attempt.url} was begun {where}, which may still be at work: looking for up to {lasts:g} s")
    deadline = time.monotonic() + lasts
    while time.monotonic() < deadline:
        sleep(min(_LOOK_EVERY, lasts / 4))
        now = read_lease(attempt, claim)
        if now is None or now.is_over or now.holder.is_dead:
            return
        if now != first:
            raise RunInUseError(
                f"{attempt.url} is being written {where}, which is at work now: what two jobs save "
                f"into one run gets "
                "in each other's way, and only the newest attempt is resumed. Give this job another "
                "URL (--ckpt, or "
                "Checkpointer's url), or stop the other one. To only read the newest checkpoint, use "
                "shardckpt.load(url, state)."
            )


def job_names(job: JobEnvironment) -> tuple[str, ...]:
    """The names by which the processes of one job, in all its rounds and on all its nodes, know each other."""
    names = [f"saver {job.saver}"] if job.saver else []
    folder = job.run_dir
    if folder:
        names += [f"run directory {key}"] if (key := _key_of(Path(folder))) else []
    if job.rendezvous_id not in ("", "none", Path(folder).name):  # else it is no one job's own
        names.append(f"rendezvous {job.rendezvous_id} {folder}")
    if job.slurm_job:
        names.append(f"slurm {job.slurm_cluster} {job.slurm_job}.{job.slurm_step} {folder}")
    return tuple(names)


def _key_of(folder: Path) -> str:
    """What tells a run directory from all others, whoever starts a job in it: a random text that it keeps."""
    path = folder / "job"
    try:
        with open(path, "x") as file:
            file.write(secrets.token_hex(16))
    except FileExistsError:
        pass
    except OSError:
        return ""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _is_free(lease: Lease, own: Holder, terms: Terms) -> bool:
    if lease.is_over or lease.holder.is_same_job(own) or lease.holder.is_dead:
        return True
    return time.time() - lease.renewed > min(lease.lasts, _LONGEST) + terms.skew


def _machine() -> str:
    """Equal for two processes only if their process numbers are of one space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When a process started, in ticks since the machine's start; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])
