"""What trainers and their node's saver tell each other: typed messages over a unix socket of one user.

The socket's name is abstract, so that no file is left behind whatever dies, and whoever is at the other
end must be of the same user. Memory travels as file descriptors.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from shardckpt.attempts import Attempt

__all__ = [
    "LINGER",
    "Abandon",
    "Attach",
    "Attached",
    "Begin",
    "Bye",
    "Channel",
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
    "Plan",
    "Pong",
    "Request",
    "Reserve",
    "Reserved",
    "Snapshot",
    "Stage",
    "Start",
    "Tier",
    "Welcome",
    "address_of",
    "connect",
    "encode",
    "listen",
    "peer",
]

LINGER = 60.0
"""Seconds that a saver without a launcher waits for a restarted job, unless it is told otherwise."""

_HEADER = struct.Struct("<QI")  # length of what follows, number of descriptors that come along
_DESCRIPTOR = struct.Struct("i")
_LONGEST = 1 << 32
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds
_MAX_FDS = 250  # of one message; the kernel's limit is 253
_READ = 1 << 18


class Tier(msgspec.Struct, frozen=True, array_like=True):
    """A durable tier of a run: its name ("local" or "remote"), the run's URL there, how to open it."""

    name: str
    url: str
    options: dict[str, Any]
    keep_last: int | None


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A save of which this saver holds the packs of `ranks`."""

    id: str
    path: str
    step: int
    world_size: int
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


class Plan(msgspec.Struct, tag=True, frozen=True):
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
    """A part of save `id` is about to be written into the buffer: what it held is no more.

    Others wait for the part in `tiers`, and are told there if it will not come. None where all ranks stage
    with this saver.
    """

    buffer: int
    id: str
    path: str
    rank: int
    tiers: list[str]


class Stage(msgspec.Struct, tag=True, frozen=True):
    """The buffer holds a rank's pack, by the last Plan. -> Outcome, for each tier and "memory".

    `proposal` is what the manifest is to say beside the chunks, from rank 0, and empty from the others.
    `local_ranks` is the number of ranks of this save that stage with this saver.
    """

    buffer: int
    id: str
    path: str
    step: int
    rank: int
    world_size: int
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
    | Plan
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


def encode(message: Request | Answer, descriptors: int = 0) -> bytes:
    """A message as it is sent; so many descriptors are to go along with its first byte."""
    data = msgspec.msgpack.encode(message)
    return _HEADER.pack(len(data), descriptors) + data


class Channel:
    """One end of a connection. One thread may send and another receive at the same time.

    Args:
        connection: the connection; a method waits as long as this says.
        takes_descriptors: whether the other end may send any. Otherwise the kernel closes them.
    """

    def __init__(self, connection: socket.socket, *, takes_descriptors: bool = True) -> None:
        self._socket = connection
        self._decoder = msgspec.msgpack.Decoder(Request | Answer)
        self._data = bytearray()
        self._descriptors: deque[int] = deque()
        self._takes_descriptors = takes_descriptors

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._socket.fileno()

    def send(self, message: Request | Answer, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and copies of at most 250 descriptors. Raises OSError if the other end is gone."""
        data = memoryview(encode(message, len(descriptors)))
        if descriptors:
            # Which the kernel hands over with the first byte that they were sent with, or before.
            sent = socket.send_fds(self._socket, [data[: _HEADER.size]], list(descriptors))
            data = data[sent:]
        self._socket.sendall(data)

    def receive(self) -> tuple[Any, list[int]] | None:
        """The next message and the descriptors that came with it; None when the other end is gone.

        Raises EOFError for what is no message of this version.
        """
        while (message := self.next_message()) is None:
            if not self.read_some():
                return None
        return message

    def wait_readable(self, seconds: float) -> bool:
        """Whether something has arrived, or the other end is gone, within so many seconds."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    @property
    def is_writable(self) -> bool:
        """Whether a short message could be sent now without waiting."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return bool(poll.poll(0))

    def read_some(self) -> bool:
        """Take in what has arrived, or wait for something. False when the other end is gone.

        Raises BlockingIOError if nothing is there, and the connection does not wait.
        """
        space = socket.CMSG_SPACE(_MAX_FDS * _DESCRIPTOR.size) if self._takes_descriptors else 0
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_READ, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        self._data += data
        for _, _, content in ancillary:  # whole descriptors, even where the kernel had to cut the rest off
            whole = len(content) // _DESCRIPTOR.size * _DESCRIPTOR.size
            self._descriptors += [fd for (fd,) in _DESCRIPTOR.iter_unpack(content[:whole])]
        return bool(data)

    def next_message(self) -> tuple[Any, list[int]] | None:
        """A message that has been taken in whole, with its descriptors, or None.

        Raises EOFError for what is no message of this version.
        """
        if len(self._data) < _HEADER.size:
            return None
        length, count = _HEADER.unpack_from(self._data)
        if not self._takes_descriptors:
            count = 0
        if length > _LONGEST or count > len(self._descriptors):
            raise EOFError("not a message of this version")
        end = _HEADER.size + length
        if len(self._data) < end:
            return None
        try:
            message = self._decoder.decode(bytes(self._data[_HEADER.size : end]))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EOFError(f"not a message of this version: {error}") from error
        del self._data[:end]
        return message, [self._descriptors.popleft() for _ in range(count)]

    def shut(self) -> None:
        """Have both ends read the connection's end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection."""
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._socket.close()


def address_of(run: str) -> str:
    """The name under which this user's saver of a run is found, where no launcher names one."""
    key = hashlib.blake2b(f"{os.getuid()} {run}".encode(), digest_size=12).hexdigest()
    return f"shardckpt-saver-{key}"


def listen(address: str) -> socket.socket:
    """A socket that listens at the abstract `address`. Raises OSError (EADDRINUSE) if somebody does already."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{address}")
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def connect(address: str, patience: float = 30.0) -> socket.socket:
    """A connection to who listens at `address`. Sending on it waits for `patience` seconds at most.

    Raises ConnectionError if nobody does, PermissionError if it is another user, BlockingIOError if too many
    wait there to be let in.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(max(1, int(patience)), 0)
        )
        connection.connect(f"\0{address}")
        if peer(connection)[1] != os.getuid():
            raise PermissionError(f"the saver's address {address!r} is taken by another user")
    except OSError:
        connection.close()
        raise
    return connection


def peer(connection: socket.socket) -> tuple[int, int]:
    """(process id, user id) of who is at the other end, by the kernel's word."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid
