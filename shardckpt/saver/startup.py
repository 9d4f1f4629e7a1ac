"""Connecting to this node's saver, which is started if there is none."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from shardckpt.environment import is_first_on_node, saver_address, subprocess_environment
from shardckpt.errors import SaverError, SaverSilentError
from shardckpt.progress import alive
from shardckpt.saver.channel import Channel, address_of, connect
from shardckpt.saver.protocol import Hello, Welcome

__all__ = ["START_TIMEOUT", "connect_to_saver"]

START_TIMEOUT = 30.0
"""Seconds for a saver to start and to answer."""

_PAUSE = 0.02  # seconds between two tries to connect
_BEAT = 1.0  # seconds between two signs of life of a trainer that waits


def connect_to_saver(hello: Hello, linger: float, patience: float) -> tuple[Channel, Welcome]:
    """Connect to the saver of LAUNCH_SAVER; without a launcher, to the run's own, which is started if need be.

    Args:
        hello: the first message.
        linger: seconds that a saver which is started here waits for a restarted job.
        patience: seconds for the saver to answer.

    Raises SaverSilentError if it does not answer in time; SaverError if there is none and none can be started.
    """
    named = saver_address()
    address = named or address_of(hello.run)
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        connection = _connected(address, linger, deadline, patience, may_start=named is None)
        channel = Channel(connection)
        try:
            channel.send(hello)
            welcome = _first_answer(channel, patience)
        except TimeoutError as error:
            channel.close()
            raise SaverSilentError(
                f"the saver at {address!r} has not answered for {patience:g} s"
            ) from error
        except (OSError, EOFError) as error:
            channel.close()
            raise SaverError(f"the saver at {address!r} does not answer: {error}") from error
        if welcome is not None:
            return channel, welcome
        channel.close()  # it was about to end: the next one will be a new one
        if time.monotonic() > deadline:
            raise SaverError(f"the saver at {address!r} ends at once")


def _first_answer(channel: Channel, patience: float) -> Welcome | None:
    """Receive the first message; None if the other end is gone. Raises TimeoutError, or EOFError for another."""
    deadline = time.monotonic() + patience
    while (received := channel.next_message()) is None:
        if not channel.wait_readable(min(_BEAT, patience)):
            alive()
            if time.monotonic() > deadline:
                raise TimeoutError
        elif not channel.read_some():
            return None
    welcome = received[0]
    if not isinstance(welcome, Welcome):
        raise EOFError(f"it answers {type(welcome).__name__}")  # noqa: TRY004 (no defect of this program)
    return welcome


def _connected(
    address: str, linger: float, deadline: float, patience: float, *, may_start: bool
) -> socket.socket:
    while True:
        try:
            return connect(address, patience)
        except PermissionError as error:
            raise SaverError(str(error)) from error
        except OSError as error:
            if not may_start or time.monotonic() > deadline:
                raise SaverError(f"no saver answers at {address!r}: {error}") from error
        # The local ranks want one at the same time, so all but the first leave it to that one for a while.
        if is_first_on_node() or time.monotonic() > deadline - START_TIMEOUT / 2:
            _start(address, linger)
        else:
            time.sleep(_PAUSE)


def _start(address: str, linger: float) -> None:
    """Start a saver that outlives this process. Returns when it listens, or another one does."""
    command = [sys.executable, "-P", "-m", "shardckpt.saver", "--address", address, "--linger", str(linger)]
    try:
        # Not this process's streams: whoever waits for their end would wait for the saver.
        subprocess.run(
            command,
            env=subprocess_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
            timeout=START_TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SaverError(f"the saver could not be started: {error}") from error
