"""The address and port at which the workers of a round meet.

The workers of one node need no rendezvous of nodes: an address and a port at which rank 0 serves their store is
enough. Each round gets another port, so that no key of an earlier round is ever read.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from launcher.errors import BusyError, UsageError

__all__ = ["MasterAddress", "reserve_master_port"]


@dataclass(frozen=True, slots=True)
class MasterAddress:
    """MASTER_ADDR and MASTER_PORT of one round."""

    addr: str
    port: int


@contextmanager
def reserve_master_port(addr: str, port: int) -> Iterator[MasterAddress]:
    """Reserve a port for rank 0 of a round, within the `with` block.

    The port is bound, not listened on, until the round is over. Linux lets rank 0 bind it too (both sockets have
    SO_REUSEADDR; torch's store sets it), but gives it to no process that asks for any free port: so no other
    process can take it between this choice and rank 0's start.

    Args:
        addr: host name or address of this node; raises `UsageError` if it cannot be resolved.
        port: the port, or 0 for any free one. Raises `BusyError` if it is in use, `UsageError` if it needs
            privileges.
    """
    try:
        socket.getaddrinfo(addr, None)
    except socket.gaierror as error:
        raise UsageError(f"master address {addr} cannot be resolved: {error.strerror}") from None
    with _bind(port) as reserved:
        yield MasterAddress(addr, reserved.getsockname()[1])


def _bind(port: int) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    reserved = socket.socket(family, socket.SOCK_STREAM)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        reserved.bind(("", port))
    except OSError as error:
        reserved.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"port {port} is in use: choose another --master-port, or leave it out"
            ) from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} needs privileges: choose one above 1023") from None
        raise
    return reserved
