"""`python -m shardckpt.saver`: started by the launcher, or by a run's first `Checkpointer`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import socket
import sys

from shardckpt.environment import SAVER_LINGER
from shardckpt.saver.channel import listen

__all__ = ["main"]


def main() -> int:
    """Be a saver. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m shardckpt.saver", description=__doc__)
    parser.add_argument("--listen", type=int, metavar="FD", help="a listening unix socket, inherited")
    parser.add_argument(
        "--control", type=int, metavar="FD", help="a connection to who started it, inherited"
    )
    parser.add_argument("--address", help="listen at this abstract address, in the background")
    parser.add_argument(
        "--linger",
        type=float,
        default=SAVER_LINGER,
        metavar="SECONDS",
        help="how long to wait for a restarted job where there is no --control (default %(default)g)",
    )
    options = parser.parse_args()
    if (options.listen is None) == (options.address is None):
        parser.error("one of --listen and --address is needed")
    if options.address is not None:
        try:
            listener = listen(options.address)
        except OSError:  # another one was quicker, and serves
            return 0
        if os.fork():
            os._exit(0)  # who started this goes on, and connects
        os.setsid()
    else:
        listener = socket.socket(fileno=options.listen)
    control = None if options.control is None else socket.socket(fileno=options.control)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # schedulers send them to all of a job
    os.chdir("/")
    with contextlib.suppress(
        OSError, ValueError
    ):  # a trainer takes two descriptors, and one for each buffer
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    from shardckpt.saver.server import SaverServer
    from shardckpt.saver.tasks import lower_priority

    lower_priority()
    return SaverServer(listener, control, linger=options.linger).run()


if __name__ == "__main__":
    sys.exit(main())
