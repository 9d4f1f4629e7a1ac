"""The zygote's side: a single-threaded process that forks the workers and reports their deaths.

It is the parent of all workers and adopts their orphans, so it knows when nothing is left of a round.
When the agent dies it kills them all; when it dies itself the kernel kills the workers.
This module imports nothing of the launcher but `processes` and `foresight`, and only what torch
imports anyway.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from launcher.system import processes
from launcher.zygote import script_imports as foresight

__all__ = ["serve", "skip_destructors"]

_TORCH = ("torch", "torch.distributed")
_KEPT_BY_TORCH = 1  # references to `__main__`, in C
_HELD = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def serve(*, is_warm: bool) -> None:
    """Be the zygote that LAUNCH_ZYGOTE in the environment describes. Returns in each worker only.

    A cold zygote's workers do not return either: they execute their command line.
    """
    orders = json.loads(os.environ.pop("LAUNCH_ZYGOTE"))
    processes.die_with_parent(orders["agent"])  # until there are workers that it must clean up
    processes.adopt_orphans()
    # Signals are for the agent to decide about; a scheduler sends them to every process of a job.
    handlers = {name: signal.signal(getattr(signal, name), signal.SIG_IGN) for name in _HELD}
    handlers["SIGUSR1"] = signal.SIG_IGN  # a worker that does not handle it lives on, and is asked to save
    started = time.monotonic()
    error = _warm_up(orders) if is_warm else None
    zygote = _Zygote(orders, handlers, forks_warm=is_warm and error is None)
    zygote.tell(event="ready", seconds=time.monotonic() - started, error=error)
    try:
        zygote.loop()
    except BaseException:
        # Whatever it was, this process must not go on as if it were a worker.
        traceback.print_exc()
        zygote.end(1)


def _warm_up(orders: dict[str, Any]) -> str | None:
    """Import what workers will import, resolved as the script would. The traceback if it fails."""
    if orders["import_dir"] is not None:
        sys.path.insert(0, orders["import_dir"])
    try:
        with _frozen(orders["main_file"]), _variables_of(orders["source"]):
            for name in (*_TORCH, *orders["preload"]):
                importlib.import_module(name)
            if orders["source"] is not None:
                foresight.import_all(
                    foresight.find_imports(Path(orders["source"]), Path(orders["import_dir"]))
                )
        _check_single_thread(orders["preload"])
    except BaseException:
        return traceback.format_exc()
    else:
        return None
    finally:
        if orders["import_dir"] is not None:
            sys.path.remove(orders["import_dir"])


@contextmanager
def _frozen(main_file: str | None) -> Iterator[None]:
    """What is made here is left alone by the collector for good, but for the names of `__main__`.

    Collections in the workers would write to every object's header, and so copy every page. But a script's
    names hold its functions, which hold all its names. If these were frozen too, no collection at exit would
    find what else they hold: a file that the script has left open would never be flushed. For the same reason
    no frame that exceptions may keep, as libraries do with those of failed imports, may hold `__main__`, and no
    garbage.
    """
    main = vars(sys.modules["__main__"])
    names = dict(main)
    references = _count_references()
    for name in [name for name, value in names.items() if not isinstance(value, str | None)]:
        del main[name]
    gc.collect()  # only this lets go of dictionaries, of those that hold nothing but plain values
    gc.disable()
    if main_file is not None:
        main["__file__"] = main_file  # some libraries look at it when they are imported
    try:
        yield
    finally:
        main.pop("__file__", None)
        if _count_references() > references + _KEPT_BY_TORCH:
            gc.collect()  # 0.2 s, but since Python 3.12 `inspect` leaves copies of sys.modules behind
        gc.enable()
        gc.freeze()
        names |= main
        main.clear()
        main.update(names)


def _count_references() -> int:
    """How often `__main__` and the dictionary of its names are referred to."""
    main = sys.modules["__main__"]
    return sys.getrefcount(main) + sys.getrefcount(vars(main))


@contextmanager
def _variables_of(source: str | None) -> Iterator[None]:
    """Libraries are imported as after the script has set its variables; workers set them by themselves."""
    changed = {} if source is None else foresight.find_variables(Path(source), os.environ)
    before = {name: os.environ[name] for name in changed if name in os.environ}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)


def skip_destructors() -> None:
    """Have this process end without what its libraries do at last, in C, that were loaded before.

    With torch, ending as a plain interpreter takes 1.6 times the CPU, and 10,000 more pages are copied, in each
    worker, when all end at the same time (scripts/bench/ends). Called are: all that Python does at its end, and
    what is registered in C from now on, as by libraries that the script loads. Nothing changes under LD_PRELOAD:
    a profiler may write its report last.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit") and "LD_PRELOAD" not in os.environ:  # others than glibc have none
        libc.on_exit(libc._exit, None)  # the last of all, with the exit code
        libc.on_exit(libc.fcloseall, None)


def _check_single_thread(preload: list[str]) -> None:
    """A fork takes only the calling thread along: locks that others hold stay locked for ever."""
    if _count_threads() == 1:
        return
    # Libraries that can cope (OpenBLAS) end their threads before a fork, so ask for one.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    threads = _count_threads()
    if threads > 1:
        what = f"preloading {', '.join(preload)}" if preload else "importing torch"
        raise RuntimeError(f"{what} left {threads - 1} threads running, so forking is not safe")


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - pathlib would be one more import


class _Zygote:
    def __init__(self, orders: dict[str, Any], handlers: dict[str, Any], *, forks_warm: bool) -> None:
        self._socket: int = orders["socket"]
        self._command: list[str] = orders["command"]
        self._files: int | None = orders["files"]
        self._handlers = handlers
        self._forks_warm = forks_warm
        self._unread = b""
        self._ranks: dict[int, int] = {}  # of live workers, by pid
        self._pidfds: dict[int, int] = {}  # pids of live workers, by pidfd
        self._is_killing = False
        self._is_drained = True
        self._epoll = select.epoll()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._socket, select.EPOLLIN)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def tell(self, **message: Any) -> None:
        try:
            os.write(self._socket, json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the agent is dead; the end of its stream says so too

    def loop(self) -> None:
        """Serve the agent. Returns in a new worker only."""
        while True:
            # epoll lists descriptors in the order in which they became ready: the order of deaths.
            ready = [fd for fd, _ in self._epoll.poll()]
            for fd in ready:
                if fd in self._pidfds:
                    self._reap_worker(fd)
            if self._wake_read in ready:
                self._reap_orphans()
            if self._socket in ready and self._dispatch():
                return

    def _dispatch(self) -> bool:
        """Carry out the agent's orders. True in a new worker."""
        try:
            received = os.read(self._socket, 1 << 16)
        except ConnectionResetError:  # it died with something of ours unread
            received = b""
        if not received:
            self.end(0)
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "signal" in order:
                self._signal(order["signal"])
            elif self._spawn(order["spawn"]):
                return True
        return False

    def _spawn(self, workers: list[dict[str, Any]]) -> bool:
        processes.outlive_parent()
        self._is_killing = self._is_drained = False
        return any(self._fork(worker) for worker in workers)

    def _fork(self, worker: dict[str, Any]) -> bool:
        """True in the new worker. A signal to it waits until it handles signals by itself."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.tell(event="spawn_failed", rank=worker["rank"], reason=f"fork: {error.strerror}")
            return False
        if pid == 0:
            try:
                self._become_worker(worker, zygote)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                if not self._forks_warm:
                    _execute(self._command)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            return True
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pidfd = os.pidfd_open(pid)
        self._ranks[pid] = worker["rank"]
        self._pidfds[pidfd] = pid
        self._epoll.register(pidfd, select.EPOLLIN)
        self.tell(event="started", rank=worker["rank"], pid=pid)
        return False

    def _become_worker(self, worker: dict[str, Any], zygote: int) -> None:
        """Leave nothing of the zygote in this process but the modules that it has imported."""
        os.setsid()
        processes.die_with_parent(zygote)
        processes.allow_tracing()
        for path, fd in ((worker["out"], 1), (worker["err"], 2)):
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(log, fd)
            os.close(log)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for name, handler in self._handlers.items():
            signal.signal(getattr(signal, name), handler)
        self._epoll.close()
        for fd in (self._socket, self._wake_read, self._wake_write, *self._pidfds):
            os.close(fd)
        if self._files is not None:
            processes.restore_file_limit(self._files)
        os.environ.update(worker["environment"])
        if self._forks_warm:
            _draw_fresh_seeds()
            skip_destructors()

    def _reap_worker(self, pidfd: int) -> None:
        pid = self._pidfds.pop(pidfd)
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._tell_exit(pid, status)
        # Without this a last worker's death would be told, but not that nothing is left.
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        try:
            os.read(self._wake_read, 1 << 12)
        except BlockingIOError:
            pass
        while not self._is_drained:
            try:
                # Workers are reaped in order of death, so only look while there are any.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._is_drained = True
                self.tell(event="drained")
                return
            if info is None or info.si_pid in self._ranks:
                break
            os.waitpid(info.si_pid, 0)
        if self._is_killing:
            processes.signal_all(processes.descendant_pids([os.getpid()]), signal.SIGKILL)

    def _tell_exit(self, pid: int, status: int) -> None:
        self.tell(
            event="exited",
            rank=self._ranks.pop(pid),
            pid=pid,
            code=os.waitstatus_to_exitcode(status),
            at=time.monotonic(),
        )

    def _signal(self, signum: int) -> None:
        """Signal every process of every worker's tree; the workers first, they are known already."""
        workers = list(self._ranks)
        if signum == signal.SIGTERM:
            # All at one instant: one that ended before its peers have heard would break their
            # connections, and they would report that as if something had gone wrong.
            processes.signal_all(workers, signal.SIGSTOP)
        processes.signal_all(workers, signum)
        if signum == signal.SIGTERM:
            processes.signal_all(workers, signal.SIGCONT)
        others = set(processes.descendant_pids([os.getpid()])) - set(workers)
        processes.signal_all(sorted(others), signum)
        self._is_killing = signum == signal.SIGKILL
        self._reap_orphans()  # there may be nothing to signal, if no worker could be forked

    def end(self, code: int) -> NoReturn:
        """Kill everything below this process, and end."""
        while True:
            processes.signal_all(processes.descendant_pids([os.getpid()]), signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                os._exit(code)


def _draw_fresh_seeds() -> None:
    """Seeds and keys that a fresh interpreter would have drawn. `random` does so by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    sys.modules["torch"].default_generator.seed()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)


def _execute(command: list[str]) -> NoReturn:
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them; other programs do not expect that
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"launch: {command[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
