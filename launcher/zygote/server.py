"""The zygote: a single-threaded process that forks the workers and reports their deaths.

It is the parent of all workers and adopts their orphans, so it knows when nothing is left of a round.
When the agent dies it kills them all; when it dies itself the kernel kills the workers.
This module and those that it imports import nothing but what torch imports anyway.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from typing import Any, NoReturn

from launcher.system import processes
from launcher.zygote.import_record import start_recording
from launcher.zygote.warm_up import WarmUp, warm_up
from launcher.zygote.worker_process import draw_fresh_seeds, enter_session, execute, skip_destructors

__all__ = ["serve"]

_HELD = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def serve(*, is_warm: bool) -> None:
    """Be the zygote that LAUNCH_ZYGOTE in the environment describes. Returns in each worker only.

    The workers of a cold zygote do not return either: they execute their command line.
    """
    orders = json.loads(os.environ.pop("LAUNCH_ZYGOTE"))
    processes.die_with_parent(orders["agent"])  # until there are workers that it must clean up
    processes.adopt_orphans()
    # A scheduler signals every process of a job; the agent alone decides what follows.
    handlers = {name: signal.signal(getattr(signal, name), signal.SIG_IGN) for name in _HELD}
    handlers["SIGUSR1"] = signal.SIG_IGN  # a worker without a handler for it lives on, and is asked to save
    started = time.monotonic()
    warm = warm_up(orders) if is_warm else None
    server = ZygoteServer(orders, handlers, warm if warm and not warm.error else None)
    server.send(event="ready", seconds=time.monotonic() - started, error=warm and warm.error)
    try:
        server.run()
    except BaseException:
        # Whatever it was, this process must not go on as if it were a worker.
        traceback.print_exc()
        server.end(1)


class ZygoteServer:
    """Forks, signals and reaps workers, as the agent (`ZygoteHandle`) orders through a socket."""

    def __init__(self, orders: dict[str, Any], handlers: dict[str, Any], warm: WarmUp | None) -> None:
        self._socket: int = orders["socket"]
        self._command: list[str] = orders["command"]
        self._files: int | None = orders["files"]
        self._handlers = handlers
        self._imports: str | None = orders["imports"]
        self._warm = warm  # None: workers execute the command
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

    def send(self, **message: Any) -> None:
        """Send an event to the agent."""
        try:
            os.write(self._socket, json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the agent is dead: the end of its stream follows

    def run(self) -> None:
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
        """Carry out the orders that the agent has sent. Returns True in a new worker."""
        try:
            received = os.read(self._socket, 1 << 16)
        except ConnectionResetError:  # the agent died with unread events
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
        """Return True in the new worker. Signals to it wait until its own handlers are in place."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.send(event="spawn_failed", rank=worker["rank"], reason=f"fork: {error.strerror}")
            return False
        if pid == 0:
            try:
                self._become_worker(worker, zygote)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                if self._warm is None:
                    execute(self._command)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            return True
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pidfd = os.pidfd_open(pid)
        self._ranks[pid] = worker["rank"]
        self._pidfds[pidfd] = pid
        self._epoll.register(pidfd, select.EPOLLIN)
        self.send(event="started", rank=worker["rank"], pid=pid)
        return False

    def _become_worker(self, worker: dict[str, Any], zygote: int) -> None:
        """Leave nothing of the zygote in this process but the modules that it has imported."""
        enter_session(worker, zygote, self._handlers, self._files)
        self._epoll.close()
        for fd in (self._socket, self._wake_read, self._wake_write, *self._pidfds):
            os.close(fd)
        if self._warm is not None:
            draw_fresh_seeds()
            skip_destructors()
            recorded, is_first = self._warm.recorded, worker["environment"].get("LOCAL_RANK") == "0"
            if self._imports is not None and recorded is not None and is_first:
                start_recording(self._imports, recorded, self._warm.variables)

    def _reap_worker(self, pidfd: int) -> None:
        pid = self._pidfds.pop(pidfd)
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._send_exit(pid, status)
        # Else the last worker's death would be reported, but not that nothing is left.
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        try:
            os.read(self._wake_read, 1 << 12)
        except BlockingIOError:
            pass
        while not self._is_drained:
            try:
                # Only look: `_reap_worker` reaps dead workers, in the order of their deaths.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._is_drained = True
                self.send(event="drained")
                return
            if info is None or info.si_pid in self._ranks:
                break
            os.waitpid(info.si_pid, 0)
        if self._is_killing:
            processes.signal_all(processes.descendant_pids([os.getpid()]), signal.SIGKILL)

    def _send_exit(self, pid: int, status: int) -> None:
        self.send(
            event="exited",
            rank=self._ranks.pop(pid),
            pid=pid,
            code=os.waitstatus_to_exitcode(status),
            at=time.monotonic(),
        )

    def _signal(self, signum: int) -> None:
        """Signal every process of every worker's tree: first the workers, which are known already."""
        workers = list(self._ranks)
        if signum == signal.SIGTERM:
            # All at one instant: a worker that ended before its peers are signalled would break their
            # connections, and they would report an error.
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
