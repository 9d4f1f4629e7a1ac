"""What trainers and their node's saver tell each other: typed messages over a unix socket of one user.

The socket's name is abstract, so that no file is left behind whatever dies, and whoever is at the other
end must be of the same user. Memory travels as file descriptors.
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


VERSION = 2
"""Raised with each change of a message: a trainer finds no saver of another version that its run has left."""


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A save of which this saver holds the packs of `ranks`."""

    info: SaveInfo
    ranks: list[int]


# -- from a trainer


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message: which run, where it is durable, how many snapshots may be held. -> Welcome.

    Saves wait for a storage that is out of reach as long as for other ranks, and no longer than `outage_timeout`.
    """

    run: str
    tiers: list[Tier]
    snapshots: int
    commit_timeout: float
    outage_timeout: float = math.inf


class Start(msgspec.Struct, tag=True, frozen=True):
    """What this trainer saves from now on is of this attempt.

    `claims`: this saver is to claim it -> Claimed, each time that something is known. `name`: it is claimed, and
    this is its folder's name.
    """

    attempt: Attempt
    claims: bool
    name: str = ""


class ChunkTable(msgspec.Struct, tag=True, frozen=True):
    """Where the chunks of this rank's next packs lie. Rank 0 sends the whole plan along, for the commit.

    The buffers that the trainer has from the plan before are given back by this.
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
    """A part of the save is about to be written into the buffer: what it held is no more.

    Others wait for the part in `tiers`, and are told there if it will not come. None where all ranks stage
    with this saver.
    """

    buffer: int
    info: SaveInfo
    rank: int
    tiers: list[str]


class Stage(msgspec.Struct, tag=True, frozen=True):
    """The buffer holds a rank's pack, by the last ChunkTable. -> Outcome, for each tier and "memory".

    `proposal` is what the manifest is to say beside the chunks, from rank 0, and empty from the others.
    `local_ranks` is the number of ranks of this save that stage with this saver.
    """

    buffer: int
    info: SaveInfo
    rank: int
    local_ranks: int
    tiers: list[str]
    values: bytes
    proposal: bytes


class Abandon(msgspec.Struct, tag=True, frozen=True):
    """This rank will not stage this save: its copy failed."""

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
    """A buffer that GiveBack has asked for: this trainer will not write into it, and waits for another."""

    buffer: int


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Ask for any answer. -> Pong."""


class Bye(msgspec.Struct, tag=True, frozen=True):
    """This trainer is done, not dead: nobody will come to fetch its snapshots."""


# -- from the saver


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """Who this saver is: equal for two ranks only if they share it.

    `newest` is the number of the newest attempt of the run that it knows of; 0 if it knows of none.
    """

    saver: str
    pid: int = 0
    newest: int = 0


class Pong(msgspec.Struct, tag=True, frozen=True):
    """This saver answers."""


class Claimed(msgspec.Struct, tag=True, frozen=True):
    """How the attempt that this trainer has begun stands: the name of its folder, once it is claimed; why it
    is not; or a notice for whoever looks after the job. `kind` is the error's class, and `is_passing` says
    that the saver goes on trying."""

    id: str
    name: str = ""
    error: str = ""
    kind: str = ""
    is_passing: bool = False
    notice: str = ""


class Reserved(msgspec.Struct, tag=True, frozen=True):
    """A buffer for this trainer alone, for packs of this plan; its descriptor comes along.

    With `error` there is none. With neither it will come once those before this trainer can spare the memory.
    """

    plan: int
    buffer: int = -1
    size: int = 0
    error: str = ""


class GiveBack(msgspec.Struct, tag=True, frozen=True):
    """Memory is short. -> GivenBack, unless the buffer is in use already."""

    buffer: int


class Note(msgspec.Struct, tag=True, frozen=True):
    """A warning for the user, who does not read the saver's log."""

    text: str


class Outcome(msgspec.Struct, tag=True, frozen=True):
    """What became of a save in a tier. Without an error: it is staged in "memory", elsewhere committed.

    `path` is where that is in the run, if it was not known when the save began.
    """

    id: str
    tier: str
    error: str = ""
    path: str = ""


class Found(msgspec.Struct, tag=True, frozen=True):
    """The run's snapshots of which every local rank has staged its part."""

    snapshots: list[Snapshot]


class Attached(msgspec.Struct, tag=True, frozen=True):
    """A snapshot's packs by rank. Descriptors come along: first one with `Contents`, then the packs'.

    `more` packs may follow in another message. Without descriptors: it is not there any more.
    """

    ranks: list[int]
    sizes: list[int]
    more: bool = False


class Contents(msgspec.Struct, frozen=True):
    """What a snapshot is beside its packs: of rank 0 the proposal and the plan, else empty; by rank the PerRank
    values, and the chunks' checksums where they are known already."""

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
