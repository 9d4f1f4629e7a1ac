"""The endpoint of a rendezvous: whether it is this machine, whether somebody answers there."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from ipaddress import ip_address

from launcher.rendezvous.member.refused import Refused

__all__ = [
    "is_here",
    "is_served",
    "listening_address",
    "local_address",
    "reach",
    "resolve",
    "show",
    "wait_for_name",
]

_PAUSE = 0.3  # seconds between two attempts to connect
_NAME_PAUSE = 0.5  # ... to resolve a name
_QUIET = 3.0  # seconds without an answer, after which the user is told


def show(endpoint: tuple[str, int]) -> str:
    """`endpoint` as a user writes it."""
    host, port = endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(endpoint: tuple[str, int]) -> list[tuple[int, str]]:
    """Address families and addresses of the endpoint's host; raises `Refused` if it has none."""
    try:
        found = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise Refused("usage", f"--rdzv-endpoint {show(endpoint)} is no name of a host: {error}") from None
    except OSError as error:
        unknown = f"the host of --rdzv-endpoint, {endpoint[0]}, cannot be resolved ({error.strerror})"
        raise Refused("unavailable", unknown) from None
    return [(family, str(address[0])) for family, _, _, _, address in found]


def wait_for_name(
    endpoint: tuple[str, int],
    seconds: float,
    tell: Callable[[str], None],
    look_up: Callable[[tuple[str, int]], object] = resolve,
) -> None:
    """Wait until the endpoint's host is known, as `look_up` has it; raises `Refused` after `seconds`.

    A pod's name, for one, is known once it runs, and other pods may run before. If that takes long, `tell` is
    called once with a line for the user.
    """
    began, since = time.monotonic(), time.strftime("%H:%M:%S")
    has_told = False
    while True:
        try:
            look_up(endpoint)
        except Refused as refused:
            if refused.kind != "unavailable":
                raise
            reason = refused.reason
        else:
            return
        waited = time.monotonic() - began
        if waited + _NAME_PAUSE > seconds:
            advice = "start the node of that name, or correct --rdzv-endpoint"
            raise Refused("unavailable", f"{reason}; tried since {since}, for {seconds:g} s: {advice}")
        if not has_told and waited >= _QUIET:
            tell(f"{reason}; trying since {since}, for {seconds:g} s (join_timeout)")
            has_told = True
        time.sleep(_NAME_PAUSE)


def listening_address(endpoint: tuple[str, int], local_addr: str | None) -> str:
    """The address of this machine that a store at `endpoint` listens at, and no other one; empty: all of them.

    That is the endpoint's, where this machine has it. Others reach a machine whose own name leads to its
    loopback address, as Debian sets it, at another one, and one behind a translated address too: by
    `local_addr` if that is given, else by any.
    """
    for host in filter(None, (endpoint[0], local_addr)):
        found = [address for _, address in resolve((host, endpoint[1])) if _can_bind(address)]
        is_meant = host == "localhost" or _is_address(host)
        reached = [address for address in found if is_meant or not ip_address(address).is_loopback]
        if reached:
            return min(
                reached, key=lambda address: ":" in address
            )  # IPv4 first: all reach that where there is one
    return ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _can_bind(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def is_here(endpoint: tuple[str, int]) -> bool:
    """Whether the endpoint's host is this machine: only its own addresses can be bound to."""
    return any(_can_bind(address) for _, address in resolve(endpoint))


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


def is_served(endpoint: tuple[str, int], seconds: float) -> bool:
    """Whether somebody accepts connections at `endpoint`, within so many seconds."""
    try:
        socket.create_connection(endpoint, timeout=seconds).close()
    except OSError:
        return False
    return True


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
