"""The launcher's stdout and stderr: the workers' lines with their ranks, messages, a live view.

Workers write straight to their log files, so nothing here can slow them down or stop them. A thread follows the
files and prints; a terminal that is slow, stopped or gone blocks this thread alone.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from launcher.config.job import ShownStreams
from launcher.reporting.logs import DirectoryWatch, Tail
from launcher.reporting.message import Level, Message, warning
from launcher.reporting.repeats import Repeats
from launcher.reporting.terminal import LiveBlock, Sink
from launcher.run_dir import RankFiles

__all__ = ["Console", "Sink"]

_REDRAW_SECONDS = 1.0
_POLL_SECONDS = 0.1  # only where inotify is not available
_RANK_COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)
_STATUS_SECONDS = 5.0  # between two lines that say how far something is
_BREATH_SECONDS = 0.03  # between two redraws of a live view below workers' lines


@dataclass(frozen=True, slots=True)
class _Follow:
    files: Sequence[RankFiles]
    shown: ShownStreams


@dataclass(frozen=True, slots=True)
class _Show:
    text: str


@dataclass(frozen=True, slots=True)
class _Mute:
    spared: Collection[int]


class _Order(Enum):
    UNFOLLOW = auto()
    REDRAW = auto()
    CLOSE = auto()


_AnyOrder = _Follow | _Mute | Message | _Show | _Order


@dataclass(slots=True)
class _Stream:
    """One followed file."""

    rank: int
    tail: Tail
    sink: Sink
    prefix: bytes
    drawn_at: float = 0.0  # when its progress bar was printed last
    drawn: bytes = b""  # the state of the bar then; empty: its line has ended since

    def not_shown(self, lines: list[bytes]) -> list[bytes]:
        """`lines` that have ended, without the first if it is on the screen as a progress bar already."""
        if not lines:
            return lines
        shown, self.drawn = self.drawn, b""
        return lines[1:] if shown and lines[0] == shown else lines


class Console:
    """Prints in a thread of its own. All methods but `close` return at once.

    A message appears after everything that workers wrote before it. Workers' lines are always printed.

    Args:
        out: where stdout of the workers goes.
        err: where stderr of the workers, messages and the live view go.
        level: the lowest level of messages that are printed.
        watch: makes the watch for a directory; raises OSError where it is not available.
    """

    def __init__(
        self,
        out: Sink,
        err: Sink,
        level: Level = Level.INFO,
        *,
        watch: Callable[[Path], DirectoryWatch] = DirectoryWatch,
    ) -> None:
        self._out = out
        self._err = err
        self._level = level
        self._block = LiveBlock(err, beside=out)
        self._is_redraw_due = False
        self._orders: queue.SimpleQueue[_AnyOrder] = queue.SimpleQueue()
        # Counts the orders in the queue.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._streams: list[_Stream] = []
        self._repeats = Repeats()  # of the present round
        self._watch_directory = watch
        self._watch: DirectoryWatch | None = None
        self._logs = ""
        self._shown_at = float("-inf")  # when a status was printed last
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()
        self._former = self._watch_for_return()

    def follow(self, files: Sequence[RankFiles], shown: ShownStreams) -> None:
        """Print what the workers of a new round write to `files`, as far as it is `shown`."""
        self._put(_Follow(files, shown))

    def mute_victims(self, failed: Collection[int]) -> None:
        """Stop printing the stderr of ranks other than `failed`: it stays in their log files.

        Once a rank is dead, the others report that they have lost their connection to it.
        """
        self._put(_Mute(failed))

    def unfollow(self) -> None:
        """Print the rest of the present round; its workers are dead."""
        self._put(_Order.UNFOLLOW)

    def say(self, message: Message) -> None:
        """Print a message of the launcher's own on stderr."""
        if message.level >= self._level:
            self._put(message)

    @property
    def has_live_view(self) -> bool:
        """True if `live` shows anything: on a terminal that can be redrawn, if INFO is printed."""
        return self._block.can_draw and self._level <= Level.INFO

    def live(self, lines: Sequence[str]) -> None:
        """Keep `lines` at the bottom of the terminal, in place of those before; none: remove the view.

        They are cut to the terminal's width, and may be painted with `paint`.
        """
        if not self.has_live_view:
            return
        self._block.lines = tuple(lines)
        if not self._is_redraw_due:  # or they would pile up while the terminal is held with Ctrl-S
            self._is_redraw_due = True
            self._put(_Order.REDRAW)

    def show(self, text: str) -> None:
        """Show how far something is: as live view where there is one, as a line every 5 s elsewhere."""
        if self.has_live_view:
            self.live([f"launch: {text}"])
        elif self._level <= Level.INFO:
            self._put(_Show(text))

    def paint(self, text: str, style: int) -> str:
        """`text` in an ANSI style, if stderr shows colours."""
        return self._err.paint(text, style)

    def close(self) -> None:
        """Print everything to the end, and take the live view away. Waits as long as the reader takes."""
        self.live(())
        self._put(_Order.CLOSE)
        self._thread.join()
        os.close(self._wake)
        if self._former is not None:
            signal.signal(signal.SIGCONT, self._former)

    def _watch_for_return(self) -> Any:
        """Handle SIGCONT: after Ctrl-Z and fg, the shell's lines are where the live view was.

        Returns the former handler; None if nothing was changed.
        """
        if not self._block.can_draw or threading.current_thread() is not threading.main_thread():
            return None
        return signal.signal(signal.SIGCONT, lambda *_: self._block.forget())

    def _put(self, order: _AnyOrder) -> None:
        self._orders.put(order)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        order: _AnyOrder | None = None
        while order is not _Order.CLOSE:
            order = self._wait_for_order()
            if isinstance(order, _Mute):
                self._mute(order)
            self._print_new()
            match order:
                case _Follow():
                    self._open(order)
                    self._print_new()  # what was written before they were watched
                case Message():
                    self._print_message(order)
                case _Show():
                    self._print_status(order.text)
                case _Order.REDRAW:
                    self._is_redraw_due = False
                case _Order():
                    self._print_rest()
            self._block.refresh()
            if order is None and self._block.is_drawn:
                time.sleep(_BREATH_SECONDS)

    def _wait_for_order(self) -> _AnyOrder | None:
        """The next order; None if there is something to print first."""
        timeout = None
        if any(stream.tail.lines.drawn for stream in self._streams):
            timeout = _REDRAW_SECONDS
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._watch is not None:
            poll.register(self._watch, select.POLLIN)
        elif self._streams:
            timeout = _POLL_SECONDS
        ready = poll.poll(None if timeout is None else timeout * 1000)
        if self._watch is not None:
            self._watch.clear()
        if self._wake not in (descriptor for descriptor, _ in ready):
            return None
        os.eventfd_read(self._wake)
        return self._orders.get()

    def _open(self, order: _Follow) -> None:
        self._repeats = Repeats()
        width = len(str(max(files.rank for files in order.files)))
        for files in order.files:
            for path, sink in ((files.out, self._out), (files.err, self._err)):
                if order.shown.shows(files.rank, stderr=sink is self._err):
                    colour = _RANK_COLOURS[files.rank % len(_RANK_COLOURS)]
                    prefix = sink.paint(f"[{files.rank:>{width}}]", colour).encode() + b" "
                    self._streams.append(_Stream(files.rank, Tail(path), sink, prefix))
        self._logs = str(order.files[0].out.parent)
        try:
            self._watch = self._watch_directory(order.files[0].out.parent)
        except OSError:
            self._watch = None

    def _print_new(self) -> None:
        now = time.monotonic()
        for stream in self._streams:
            for lines in stream.tail.read():
                self._print(stream, self._sifted(stream, stream.not_shown(lines)))
            drawn = stream.tail.lines.drawn
            if drawn and drawn != stream.drawn and now - stream.drawn_at >= _REDRAW_SECONDS:
                stream.drawn_at = now
                stream.drawn = drawn
                self._print(stream, [drawn])

    def _sifted(self, stream: _Stream, lines: list[bytes]) -> list[bytes]:
        return self._repeats.sift(stream.rank, lines) if stream.sink is self._err else lines

    def _print(self, stream: _Stream, lines: Sequence[bytes]) -> None:
        was_gone = stream.sink.is_gone
        if lines and stream.sink.is_terminal:
            self._block.erase()
        stream.sink.write_lines(stream.prefix, lines)
        if stream.sink.is_gone and not was_gone:
            name = "stderr" if stream.sink is self._err else "stdout"
            text = f"{name} has no reader any more; the job goes on, and its output to {self._logs}"
            self._print_message(warning(text))

    def _mute(self, order: _Mute) -> None:
        kept = [s for s in self._streams if s.sink is self._out or s.rank in order.spared]
        for stream in self._streams:
            if stream not in kept:
                stream.tail.close()
        self._streams = kept

    def _print_rest(self) -> None:
        for stream in self._streams:
            self._print(stream, self._sifted(stream, stream.not_shown(stream.tail.lines.flush())))
            if stream.sink is self._err:
                self._print(stream, self._repeats.release(stream.rank))
            stream.tail.close()
        self._streams = []
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _print_message(self, message: Message) -> None:
        first, *rest = message.lines
        lines = [self._err.paint(f"launch: {first}", message.style), *rest]
        self._block.erase()
        self._err.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))

    def _print_status(self, text: str) -> None:
        if time.monotonic() - self._shown_at >= _STATUS_SECONDS:
            self._shown_at = time.monotonic()
            self._print_message(Message((text,)))
