"""The endpoint of a rendezvous: is it this machine, and does a server answer there?"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from ipaddress import ip_address

from launcher.rendezvous.member.refused import Refused

__all__ = [
    "accepts_connections",
    "format_endpoint",
    "is_this_machine",
    "listening_address",
    "local_address",
    "resolve_endpoint",
    "wait_until_reachable",
    "wait_until_resolvable",
]

_CONNECT_PAUSE = 0.3  # seconds between two attempts to connect
_RESOLVE_PAUSE = 0.5  # seconds between two attempts to resolve a name
_NOTIFY_AFTER = 3.0  # seconds without an answer, after which the user is notified


def format_endpoint(endpoint: tuple[str, int]) -> str:
    """`endpoint` as a user writes it: `host:29400`, `[::1]:29400`."""
    host, port = endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve_endpoint(endpoint: tuple[str, int]) -> list[tuple[int, str]]:
    """Address families and addresses of the endpoint's host. Raises `Refused` if it has none."""
    try:
        found = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise Refused(
            "usage", f"--rdzv-endpoint {format_endpoint(endpoint)} is no name of a host: {error}"
        ) from None
    except OSError as error:
        unknown = f"the host of --rdzv-endpoint, {endpoint[0]}, cannot be resolved ({error.strerror})"
        raise Refused("unavailable", unknown) from None
    return [(family, str(address[0])) for family, _, _, _, address in found]


def wait_until_resolvable(
    endpoint: tuple[str, int],
    seconds: float,
    notify: Callable[[str], None],
    resolve: Callable[[tuple[str, int]], object] = resolve_endpoint,
) -> None:
    """Wait until the endpoint's host has an address.

    A pod's name, for example, has one once the pod runs, and other pods may run before.

    Args:
        endpoint: host and port.
        seconds: time limit, after which `Refused` is raised.
        notify: called once with a line for the user if this takes long.
        resolve: raises `Refused` of kind "unavailable" as long as there is no address.
    """
    began, since = time.monotonic(), time.strftime("%H:%M:%S")
    has_notified = False
    while True:
        try:
            resolve(endpoint)
        except Refused as refused:
            if refused.kind != "unavailable":
                raise
            reason = refused.reason
        else:
            return
        waited = time.monotonic() - began
        if waited + _RESOLVE_PAUSE > seconds:
            advice = "start the node of that name, or correct --rdzv-endpoint"
            raise Refused("unavailable", f"{reason}; tried since {since}, for {seconds:g} s: {advice}")
        if not has_notified and waited >= _NOTIFY_AFTER:
            notify(f"{reason}; trying since {since}, for {seconds:g} s (join_timeout)")
            has_notified = True
        time.sleep(_RESOLVE_PAUSE)


def listening_address(endpoint: tuple[str, int], local_addr: str | None) -> str:
    """The only address of this machine at which a store for `endpoint` listens; empty: all addresses.

    It is the endpoint's, where this machine has that. Where this machine's own name resolves to a loopback
    address, as Debian sets it up, or addresses are translated on the way, other nodes reach it at another
    address: `local_addr` if given, else any.
    """
    for host in filter(None, (endpoint[0], local_addr)):
        found = [address for _, address in resolve_endpoint((host, endpoint[1])) if _can_bind(address)]
        is_literal = host == "localhost" or _is_address(host)
        reachable = [address for address in found if is_literal or not ip_address(address).is_loopback]
        if reachable:
            # IPv4 first: where it exists, every node reaches it.
            return min(reachable, key=lambda address: ":" in address)
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


def is_this_machine(endpoint: tuple[str, int]) -> bool:
    """True if the endpoint's host is this machine: a process can only bind to its own machine's addresses."""
    return any(_can_bind(address) for _, address in resolve_endpoint(endpoint))


def local_address(endpoint: tuple[str, int]) -> str:
    """The address at which the nodes that know `endpoint` reach this one."""
    if is_this_machine(endpoint):
        return endpoint[0]
    for family, address in resolve_endpoint(endpoint):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, endpoint[1]))  # sends nothing: selects the route
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return socket.gethostname()


def accepts_connections(endpoint: tuple[str, int], seconds: float) -> bool:
    """True if `endpoint` accepts a connection within `seconds`."""
    try:
        socket.create_connection(endpoint, timeout=seconds).close()
    except OSError:
        return False
    return True


def wait_until_reachable(endpoint: tuple[str, int], seconds: float, notify: Callable[[str], None]) -> None:
    """Wait until `endpoint` accepts connections. Raises TimeoutError after `seconds`.

    If this takes long, `notify` is called once with a line for the user.
    """
    began = time.monotonic()
    has_notified = False
    while True:
        left = began + seconds - time.monotonic()
        try:
            socket.create_connection(
                endpoint, timeout=min(max(left, _CONNECT_PAUSE), _NOTIFY_AFTER)
            ).close()
        except OSError as error:
            why = error.strerror or str(error)
        else:
            return
        where = format_endpoint(endpoint)
        if left <= _CONNECT_PAUSE:
            raise TimeoutError(f"nobody answers at {where} within {seconds:g} s ({why})")
        if not has_notified and time.monotonic() >= began + _NOTIFY_AFTER:
            notify(f"nobody answers at {where} yet ({why}); trying for {seconds:g} s")
            has_notified = True
        time.sleep(_CONNECT_PAUSE)
