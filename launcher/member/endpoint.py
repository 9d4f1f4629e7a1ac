"""The endpoint of a rendezvous: whether it is this machine, whether somebody answers there."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from launcher.member.refusal import Refused

__all__ = ["is_here", "local_address", "reach", "resolve", "show"]

_PAUSE = 0.3  # seconds between two attempts to connect
_QUIET = 3.0  # seconds without an answer, after which the user is told


def show(endpoint: tuple[str, int]) -> str:
    """`endpoint` as a user writes it."""
    host, port = endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(endpoint: tuple[str, int]) -> list[tuple[int, str]]:
    """Address families and addresses of the endpoint's host; raises `Refused` if it has none."""
    try:
        found = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refused(
            "usage", f"the host of --rdzv-endpoint {show(endpoint)} cannot be resolved: {reason}"
        ) from None
    return [(family, str(address[0])) for family, _, _, _, address in found]


def is_here(endpoint: tuple[str, int]) -> bool:
    """Whether the endpoint's host is this machine: only its own addresses can be bound to."""
    for family, address in resolve(endpoint):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return True
    return False


def local_address(endpoint: tuple[str, int]) -> str:
    """The address at which the nodes that know `endpoint` reach this one."""
    if is_here(endpoint):
        return endpoint[0]
    for family, address in resolve(endpoint):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, endpoint[1]))  # sends nothing: chooses the way there
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return socket.gethostname()


def reach(endpoint: tuple[str, int], seconds: float, tell: Callable[[str], None]) -> None:
    """Wait until somebody accepts connections at `endpoint`; raises TimeoutError after `seconds`.

    If that takes long, `tell` is called once with a line for the user.
    """
    began = time.monotonic()
    has_told = False
    while True:
        left = began + seconds - time.monotonic()
        try:
            socket.create_connection(endpoint, timeout=min(max(left, _PAUSE), _QUIET)).close()
        except OSError as error:
            why = error.strerror or str(error)
        else:
            return
        if left <= _PAUSE:
            raise TimeoutError(f"nobody answers at {show(endpoint)} within {seconds:g} s ({why})")
        if not has_told and time.monotonic() >= began + _QUIET:
            tell(f"nobody answers at {show(endpoint)} yet ({why}); trying for {seconds:g} s")
            has_told = True
        time.sleep(_PAUSE)
