"""A trainer's connection to the saver: sends requests, and reads what comes back in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from shardckpt.environment import is_first_on_node
from shardckpt.errors import SaverError, SaverSilentError
from shardckpt.saver.channel import Channel
from shardckpt.saver.protocol import Answer, Attached, Found, Ping, Request
from shardckpt.saver.silence import Silence, describe_process

__all__ = ["ClientConnection"]

_log = logging.getLogger("shardckpt")

_GONE = "the saver of this node is gone"
_LOST = (
    "and with it the snapshots that were in memory only; checkpoints are untouched, and the next save finds a "
    "new saver"
)

A = TypeVar("A", bound=Answer)


class ClientConnection:
    """A connection over which the saver has greeted.

    Args:
        channel: the connection.
        pid: the saver's process, for messages.
        silence: when a saver that answers nothing is given up.
        on_message: called by the reading thread with what is no answer to `ask`, and its descriptors.
        on_lost: called once when the saver is gone or given up, by the thread that finds out.
    """

    def __init__(
        self,
        channel: Channel,
        pid: int,
        silence: Silence,
        on_message: Callable[[Any, list[int]], object],
        on_lost: Callable[[], object],
    ) -> None:
        self._channel = channel
        self._pid = pid
        self._silence = silence
        self._patience = silence.patience
        self._on_message = on_message
        self._on_lost = on_lost
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._received = 0  # messages
        self._loss: Callable[[], SaverError] = lambda: SaverError(_GONE)
        self._is_lost = False
        self._is_closed = False
        self._answers: queue.SimpleQueue[tuple[Any, list[int]]] = queue.SimpleQueue()

    def open(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="shardckpt-saver", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """True once the saver is gone or given up."""
        return self._is_lost

    @property
    def loss(self) -> SaverError:
        """What to raise once the saver is lost."""
        return self._loss()

    def send(self, request: Request) -> None:
        """Send a request. Raises SaverError if the saver is gone, or has read nothing for its patience."""
        try:
            with self._sending:
                self._channel.send(request)
        except BlockingIOError as error:
            self._give_up(self._patience)
            raise self.loss from error
        except OSError as error:
            self._give_up()
            loss = self.loss
            raise loss if isinstance(loss, SaverSilentError) else SaverError(f"{_GONE}: {error}") from error

    def ask(self, request: Request, kind: type[A]) -> tuple[A, list[int]]:
        """Send a request; the answer to it, and its descriptors. Raises SaverError."""
        self.send(request)
        return self.next_answer(kind)

    def next_answer(self, kind: type[A]) -> tuple[A, list[int]]:
        """The next answer to the last request. Raises SaverError if none comes, or it is none of this kind."""
        try:
            answer, descriptors = self._answers.get(timeout=self._patience)
        except queue.Empty:
            self._give_up(self._patience)
            raise self.loss from None
        if not isinstance(answer, kind):
            raise self.loss if answer is None else SaverError(f"the saver answered {type(answer).__name__}")
        return answer, descriptors

    def limit_silence(self, seconds: float) -> None:
        """Give the saver up if it has not answered for so many seconds, if that is sooner than before."""
        self._silence.limit(seconds)

    def probe(self, seconds: float) -> bool:
        """True if the saver answers within so many seconds. One that does not is given up."""
        with contextlib.suppress(SaverError):
            with self._changed:
                before = self._received
            if self._channel.is_writable:
                self.send(Ping())
            with self._changed:
                self._changed.wait_for(lambda: self._is_lost or self._received != before, seconds)
                is_silent = self._received == before and not self._is_lost
            if is_silent:
                self._give_up(seconds)
        return not self._is_lost

    def close(self, last: Request) -> None:
        """Send a last message, and end the connection; what still waits for the saver is told so."""
        self._is_closed = True
        self._loss = lambda: SaverSilentError("the saver was not waited for any longer")
        with contextlib.suppress(SaverError):
            self.send(last)
        self.shut()

    def shut(self) -> None:
        """End the connection, as this process's death would."""
        self._channel.shut()

    # -- the reading thread

    def _read(self) -> None:
        """Handle what the saver sends, until its end."""
        try:
            while (received := self._receive()) is not None:
                if isinstance(received[0], Found | Attached):
                    self._answers.put(received)
                else:
                    self._on_message(*received)
        except SaverError:
            pass  # it was given up
        except (OSError, EOFError, ValueError) as error:
            _log.warning("the connection to the saver is lost: %s", error)
        finally:
            self._lose()
            with self._sending:
                self._channel.close()

    def _receive(self) -> tuple[Any, list[int]] | None:
        """The saver's next message; None once it is gone or given up."""
        while (received := self._channel.next_message()) is None:
            if not self._channel.wait_readable(self._silence.interval):
                if self._silence.passed():
                    self._give_up(self._silence.seconds)
                    return None
                if not self._silence.is_asked and self._channel.is_writable:
                    self.send(Ping())
                self._silence.is_asked = True
            elif not self._channel.read_some():
                return None
        self._silence.heard()
        with self._changed:
            self._received += 1
            self._changed.notify_all()
        return received

    def _give_up(self, silent: float = 0.0) -> None:
        """Go on without this saver from now on, whatever it still does; `silent`: for how many seconds it was."""
        if silent and not self._is_lost:
            text = (
                f"the saver of this node ({describe_process(self._pid)}) has not answered for {silent:g} s"
            )
            self._loss = lambda: SaverSilentError(text)
        self._channel.shut()
        self._lose()

    def _lose(self) -> None:
        """Have what waits for the saver fail."""
        with self._changed:
            is_first, self._is_lost = not self._is_lost, True
            self._changed.notify_all()
        self._answers.put((None, []))
        if not is_first:
            return
        if not self._is_closed and is_first_on_node():
            loss = self.loss
            what = "training goes on without it" if isinstance(loss, SaverSilentError) else _LOST
            _log.warning("%s, %s", loss, what)
        self._on_lost()
