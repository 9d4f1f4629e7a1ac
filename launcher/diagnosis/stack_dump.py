"""Takes the stacks of this node's workers with py-spy, which needs no cooperation from them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from launcher.diagnosis.stack_report import (
    RankStack,
    Thread,
    locate_child,
    parse_dump,
    read_stack,
    summarize,
)
from launcher.events import Event, StacksTaken
from launcher.system import processes
from launcher.system.process_state import ProcessState, read_process_state

__all__ = ["StackTaker"]

_T = TypeVar("_T")

_TIMEOUT = 20.0  # seconds for everything
_DUMP_TIMEOUT = 3.0  # seconds for one process without native frames; it usually takes 0.02
_MAX_CHILDREN = 16  # processes of one rank that are dumped, besides the worker
_MAX_PARALLEL = 8
_MAX_PARALLEL_NATIVE = 4  # each reads the symbols of all libraries: a second of CPU, and memory
_MAX_CODE = 100  # characters of a line of source
_ATTEMPTS = 3
_MAY_PASS = "Failed to get stack traces"  # py-spy's error if the stack changed meanwhile, for one
_NOT_PYTHON = "Failed to find python version"
_NO_PERMISSION = (
    "no permission to trace processes: give the container the capability SYS_PTRACE, "
    "or set kernel.yama.ptrace_scope to 0 or 1"
)


class StackTaker:
    """Takes stacks in a thread of its own; a source of `StacksTaken` events for the monitor.

    `close` ends what is under way, without an event.

    Args:
        timeout: seconds for the stacks of all workers.
        py_spy: the program to run; None: the one beside this Python, or else the first on PATH.
    """

    def __init__(self, *, timeout: float = _TIMEOUT, py_spy: str | None = None) -> None:
        self._timeout = timeout
        self._py_spy = py_spy
        self._taken: list[Event] = []
        self._thread: threading.Thread | None = None
        self._dumps = _Dumps()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self._wake_read,)

    @property
    def is_taking(self) -> bool:
        """True until the `StacksTaken` of a `start` has been received."""
        return self._thread is not None

    def start(self, pids: Mapping[int, int], steps: Mapping[int, int | None], directory: Path) -> None:
        """Begin to take the stacks of workers, and return at once. Does nothing if that has begun already.

        A dump stops a worker for milliseconds, so this is safe in a healthy job too.

        Args:
            pids: the workers, by rank.
            steps: the step that each has reported last.
            directory: where whole dumps go, one file per rank.
        """
        if self.is_taking:
            return
        program = self._py_spy or _find_py_spy()
        dumps = self._dumps = _Dumps(program, time.monotonic() + self._timeout)

        def take() -> None:
            try:
                event = _take(dict(pids), dict(steps), directory, dumps)
            except Exception as error:  # a failed diagnosis must not prevent the restart
                event = StacksTaken((f"no stacks: {error}",), str(directory))
            self._taken.append(event)
            os.write(self._wake_write, b".")

        self._thread = threading.Thread(target=take, name="stacks", daemon=True)
        self._thread.start()

    def receive(self) -> list[Event]:
        try:
            os.read(self._wake_read, 1 << 10)
        except BlockingIOError:
            return []
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        taken, self._taken = self._taken, []
        return taken

    def close(self) -> None:
        self._dumps.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        os.close(self._wake_read)
        os.close(self._wake_write)


def _find_py_spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    if beside.exists():
        return str(beside)
    import shutil  # slow to import, and hardly ever needed

    return shutil.which("py-spy")


class _Dumps:
    """The py-spy processes of one taking: they have one deadline, and can be killed together."""

    def __init__(self, program: str | None = None, deadline: float = 0.0) -> None:
        self._program = program
        self._deadline = deadline
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_cancelled = False

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            for process in self._running:
                process.kill()

    def dump(self, pid: int, *options: str, timeout: float) -> tuple[Thread, ...]:
        """The stacks of one process. Raises `_NoStacks` with the reason if they cannot be read."""
        if self._program is None:
            raise _NoStacks("py-spy is not installed beside this Python, nor on PATH")
        timeout = min(timeout, self.seconds_left)
        process = self._start([self._program, "dump", "--pid", str(pid), "--json", *options])
        try:
            out, err = process.communicate(timeout=max(timeout, 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise _NoStacks(f"reading them took longer than {max(timeout, 0.0):.0f} s") from None
        finally:
            with self._lock:
                self._running.discard(process)
        try:
            return parse_dump(out)
        except ValueError:
            raise _NoStacks(_explain(err)) from None

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._is_cancelled:
                raise _NoStacks("interrupted")
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env={**os.environ, "RUST_BACKTRACE": "0"},
                    start_new_session=True,  # Ctrl-C is for the job
                )
            except OSError as error:
                raise _NoStacks(f"{command[0]} cannot be started: {error.strerror}") from None
            self._running.add(process)
            return process


class _NoStacks(Exception):  # noqa: N818 - an answer, not an error
    """Why the stacks of a process could not be read."""


def _explain(err: str) -> str:
    """py-spy's error message in one line."""
    if "ermission denied" in err or "Permission Denied" in err or "EPERM" in err:
        return _NO_PERMISSION
    lines = [line.strip() for line in err.partition("Stack backtrace:")[0].splitlines()]
    text = "; ".join(line.removeprefix("Error: ") for line in lines if line and line != "Caused by:")
    return text or "py-spy said nothing"


def _take(
    pids: Mapping[int, int], steps: Mapping[int, int | None], directory: Path, dumps: _Dumps
) -> StacksTaken:
    """Take the Python frames of all workers, which is quick, and then native frames as far as time allows."""
    before = {rank: read_process_state(pid) for rank, pid in pids.items()}
    found = _parallel(_MAX_PARALLEL, lambda rank: _dump_tree(before[rank], dumps), pids)
    natives = _parallel(
        _MAX_PARALLEL_NATIVE,
        lambda rank: _dump_native(found[rank].python_pid, dumps),
        sorted((rank for rank in pids if found[rank].threads), key=lambda rank: found[rank].is_waiting),
    )
    stacks = {}
    directory.mkdir(parents=True, exist_ok=True)
    for rank, pid in pids.items():
        now, tree, native = read_process_state(pid), found[rank], natives.get(rank)
        stacks[rank] = _conclude(rank, before[rank], now, tree, native)
        text = _render(stacks[rank], now, steps.get(rank), tree, native)
        (directory / f"rank-{rank:05d}.txt").write_text(text)
    return StacksTaken(summarize(stacks, steps), str(directory))


def _parallel(width: int, work: Callable[[int], _T], ranks: Iterable[int]) -> dict[int, _T]:
    from concurrent.futures import ThreadPoolExecutor  # most agents never need it

    with ThreadPoolExecutor(width) as pool:
        return {rank: future.result() for rank, future in {r: pool.submit(work, r) for r in ranks}.items()}


@dataclass(frozen=True)
class _Tree:
    """The stacks of a worker and of the processes that it has started."""

    threads: tuple[Thread, ...]  # of the worker
    python_pid: int  # the process that `threads` are of: the worker's command need not be Python
    trouble: str | None  # why there are no threads
    children: tuple[tuple[ProcessState, tuple[Thread, ...]], ...]

    @property
    def is_waiting(self) -> bool:
        """True if it waits for other ranks, as far as Python's frames show. The other ranks are dumped first."""
        return read_stack(0, self.python_pid, self.threads).collective is not None


def _dump_tree(worker: ProcessState, dumps: _Dumps) -> _Tree:
    threads, trouble = _try_dump(worker, dumps)
    children = []
    for pid in processes.descendant_pids([worker.pid])[:_MAX_CHILDREN]:
        child = read_process_state(pid)
        of_child, why = _try_dump(child, dumps)
        if of_child:
            children.append((child, of_child))
        elif why is not None and not why.startswith(_NOT_PYTHON):
            break  # the reason holds for the other children too: no permission, no time
    if threads or not children or trouble is None or not trouble.startswith(_NOT_PYTHON):
        return _Tree(threads, worker.pid, trouble, tuple(children))
    first, *others = children
    return _Tree(first[1], first[0].pid, None, tuple(others))


def _try_dump(process: ProcessState, dumps: _Dumps) -> tuple[tuple[Thread, ...], str | None]:
    for attempt in range(1, _ATTEMPTS + 1):
        is_still = read_process_state(process.pid).is_still
        options = ["--nonblocking"] if is_still else []
        try:
            return dumps.dump(process.pid, *options, timeout=_DUMP_TIMEOUT), None
        except _NoStacks as error:
            has_halted = not is_still and read_process_state(process.pid).is_still
            may_pass = has_halted or str(error).startswith(_MAY_PASS)
            if attempt == _ATTEMPTS or not may_pass:
                return (), str(error)
    raise AssertionError("the last attempt returns")


def _dump_native(pid: int, dumps: _Dumps) -> tuple[Thread, ...] | None:
    if read_process_state(pid).is_still:
        return None  # py-spy reads native frames only of a process that it has stopped itself
    try:
        return dumps.dump(pid, "--native", timeout=dumps.seconds_left) or None
    except _NoStacks:
        return None


def _conclude(
    rank: int, before: ProcessState, now: ProcessState, tree: _Tree, native: tuple[Thread, ...] | None
) -> RankStack:
    """Where one rank is. Native frames show waits that Python's frames do not."""
    if tree.threads or tree.trouble is None:
        stack = read_stack(rank, now.pid, native or tree.threads)
    else:
        stack = RankStack(rank, now.pid, trouble=tree.trouble)
    children = (
        f"process {child.pid} in {place}"
        for child, threads in tree.children
        if (place := locate_child(threads)) is not None
    )
    return replace(
        stack,
        code=_source_line(*stack.source) if stack.source else None,
        halt=now.halt(before),
        kernel=now.kernel,
        children=tuple(children),
    )


def _source_line(file: str, line: int) -> str | None:
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, text in enumerate(lines, start=1):
                if number == line:
                    return text.strip()[:_MAX_CODE] or None
    except OSError:
        pass
    return None


def _render(
    stack: RankStack,
    now: ProcessState,
    step: int | None,
    tree: _Tree,
    native: tuple[Thread, ...] | None,
) -> str:
    """The text of one rank's file: its state, and the stacks of all its processes."""
    state = stack.halt or stack.kernel or "unknown state"
    at_step = "" if step is None else f", step {step}"
    lines = [f"rank {stack.rank}, process {stack.pid}{at_step}: {state}", f"command: {now.command}"]
    if stack.trouble:
        lines.append(f"no stacks: {stack.trouble}")
    lines += _render_threads(tree.threads)
    for child, threads in tree.children:
        lines += ["", f"its process {child.pid}: {child.kernel}", f"command: {child.command}"]
        lines += _render_threads(threads)
    if native:
        lines += ["", "with native frames:", *_render_threads(native)]
    return "\n".join(lines) + "\n"


def _render_threads(threads: Iterable[Thread]) -> list[str]:
    lines = []
    for thread in threads:
        lines += ["", f'thread {thread.tid} "{thread.name}", innermost call first']
        for frame in thread.frames:
            where = frame.file if frame.is_native else f"{frame.file}:{frame.line}"
            lines.append(f"    {frame.name} ({where})")
    return lines
