"""The messages between trainers and their node's saver: typed, over a unix socket of one user.

The socket's name is abstract, so no file is left behind whatever dies; both ends check that the other one is of
the same user. Memory travels as file descriptors.
"""

from __future__ import annotations

import math

import msgspec

from shardckpt.run.attempts import Attempt
from shardckpt.run.save_info import SaveInfo
from shardckpt.run.tiers import Tier

__all__ = [
    "VERSION",
    "Abandon",
    "Attach",
    "Attached",
    "Begin",
    "Bye",
    "ChunkTable",
    "Claimed",
    "Contents",
    "Detach",
    "Find",
    "Found",
    "GiveBack",
    "GivenBack",
    "Hello",
    "Note",
    "Outcome",
    "Ping",
    "Pong",
    "Request",
    "Reserve",
    "Reserved",
    "Snapshot",
    "Stage",
    "Start",
    "Welcome",
]


VERSION = 3
"""Raised with each change of a message: a trainer finds no saver of another version that its run has left."""


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A save of which this saver holds the packs of `ranks`."""

    info: SaveInfo
    ranks: list[int]


# -- from a trainer


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message -> Welcome.

    Attributes:
        run: the run's URL.
        tiers: its durable tiers; the last one is the run itself.
        snapshots: how many snapshots may be held in memory.
        commit_timeout: seconds without any progress of another rank after which a save has failed.
        outage_timeout: seconds that a save waits for a storage that is out of reach, `commit_timeout` at most.
    """

    run: str
    tiers: list[Tier]
    snapshots: int
    commit_timeout: float
    outage_timeout: float = math.inf


class Start(msgspec.Struct, tag=True, frozen=True):
    """This trainer's next saves belong to this attempt.

    Attributes:
        attempt: as all of its job's ranks know it.
        claims: True if this saver is to claim it -> Claimed, each time that something is known.
        name: of the attempt's folder, if it is claimed already.
    """

    attempt: Attempt
    claims: bool
    name: str = ""


class ChunkTable(msgspec.Struct, tag=True, frozen=True):
    """Where the chunks of this rank's next packs lie. Gives back the buffers of the plan before.

    Attributes:
        number: counts this trainer's plans, from 1.
        row, offset, nbytes: by chunk, in the order in which they lie in the pack: see `ChunkLocation`.
        size: bytes of a pack.
        whole: the encoded plan of all ranks, for the commit; from rank 0 only.
    """

    number: int
    row: list[int]
    offset: list[int]
    nbytes: list[int]
    size: int
    whole: bytes


class Reserve(msgspec.Struct, tag=True, frozen=True):
    """Ask for a buffer of at least `size` bytes, now or as soon as there is one. -> Reserved."""

    size: int


class Begin(msgspec.Struct, tag=True, frozen=True):
    """A part of the save is about to be written into the buffer: what the buffer held is lost.

    Attributes:
        tiers: where other nodes wait for the part, and find a failure marker if it will not come. None where all
            ranks stage with this saver.
    """

    buffer: int
    info: SaveInfo
    rank: int
    tiers: list[str]


class Stage(msgspec.Struct, tag=True, frozen=True):
    """The buffer holds a rank's pack, laid out by the last ChunkTable. -> Outcome, for "memory" and each tier.

    Attributes:
        local_ranks: number of ranks of this save that stage with this saver.
        tiers: the durable tiers that the save goes to.
        values: the rank's PerRank values by path, as JSON.
        proposal: what the manifest says beside the chunks, encoded; from rank 0, empty from the others.
    """

    buffer: int
    info: SaveInfo
    rank: int
    local_ranks: int
    tiers: list[str]
    values: bytes
    proposal: bytes


class Abandon(msgspec.Struct, tag=True, frozen=True):
    """This rank will not stage its part of this save: its copy failed."""

    id: str
    error: str


class Find(msgspec.Struct, tag=True, frozen=True):
    """Ask for the run's snapshots. -> Found."""


class Attach(msgspec.Struct, tag=True, frozen=True):
    """Ask for a snapshot's packs, which stay until Detach. -> Attached."""

    id: str


class Detach(msgspec.Struct, tag=True, frozen=True):
    """The packs are not read any more."""


class GivenBack(msgspec.Struct, tag=True, frozen=True):
    """This trainer will not write into a buffer that GiveBack has asked for, and waits for another."""

    buffer: int


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Ask for any answer. -> Pong."""


class Bye(msgspec.Struct, tag=True, frozen=True):
    """This trainer is done, not dead: nobody will restore from its snapshots."""


# -- from the saver


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The saver's answer to Hello.

    Attributes:
        saver: its id, equal for two ranks only if they share it.
        pid: its process.
        newest: number of the run's newest attempt that it knows of; 0 if it knows of none.
    """

    saver: str
    pid: int = 0
    newest: int = 0


class Pong(msgspec.Struct, tag=True, frozen=True):
    """This saver answers."""


class Claimed(msgspec.Struct, tag=True, frozen=True):
    """How this trainer's attempt stands.

    Attributes:
        id: the attempt's.
        name: of its folder, once it is claimed.
        error: why it is not claimed.
        kind: the name of the error's class.
        is_passing: True if the saver goes on trying.
        notice: for the job's users.
    """

    id: str
    name: str = ""
    error: str = ""
    kind: str = ""
    is_passing: bool = False
    notice: str = ""


class Reserved(msgspec.Struct, tag=True, frozen=True):
    """A buffer for this trainer alone, for packs of this plan; its descriptor comes along.

    With `error` there is none. Without error and descriptor, it will come as soon as there is memory for it.
    """

    plan: int
    buffer: int = -1
    size: int = 0
    error: str = ""


class GiveBack(msgspec.Struct, tag=True, frozen=True):
    """Asks for a buffer, since memory is short. -> GivenBack, unless it is in use already."""

    buffer: int


class Note(msgspec.Struct, tag=True, frozen=True):
    """A warning for the user, who does not read the saver's log."""

    text: str


class Outcome(msgspec.Struct, tag=True, frozen=True):
    """What became of a save in a tier. Without an error, it is staged in "memory", or committed elsewhere.

    Attributes:
        path: where the save lies in the run, as its attempt was claimed there; empty where that is not known.
    """

    id: str
    tier: str
    error: str = ""
    path: str = ""


class Found(msgspec.Struct, tag=True, frozen=True):
    """The run's snapshots of which every local rank has staged its part."""

    snapshots: list[Snapshot]


class Attached(msgspec.Struct, tag=True, frozen=True):
    """A snapshot's packs by rank. Descriptors come along: first one with `Contents`, then the packs'. Without
    descriptors, the snapshot is gone.

    Attributes:
        more: True if another message with more packs follows.
    """

    ranks: list[int]
    sizes: list[int]
    more: bool = False


class Contents(msgspec.Struct, frozen=True):
    """What belongs to a snapshot beside its packs.

    Attributes:
        proposal, plan: encoded; empty where rank 0 has not staged with this saver.
        values: each rank's PerRank values, as JSON.
        checksums: each rank's CRC-32Cs by chunk, where they are known already.
    """

    proposal: bytes = b""
    plan: bytes = b""
    values: dict[int, bytes] = {}
    checksums: dict[int, list[int]] = {}


Request = (
    Hello
    | Start
    | ChunkTable
    | Reserve
    | Begin
    | Stage
    | Abandon
    | Find
    | Attach
    | Detach
    | GivenBack
    | Ping
    | Bye
)
Answer = Welcome | Claimed | Pong | Reserved | GiveBack | Note | Outcome | Found | Attached
