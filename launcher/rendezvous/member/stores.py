"""torch's stores as the nodes of a job use them: served at one address only, with every value signed."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from launcher.rendezvous.member.signing import ForgedError, Signer

__all__ = ["PortTakenError", "SignedStore", "Store", "TCPStore", "connect", "connect_again", "serve"]

_OPERATION_TIMEOUT = timedelta(seconds=5)
_MAX_REPLACEMENTS = 20  # of a forged value that is written again and again
_RECHECK_PAUSE = 0.1  # seconds before a forged value is read again


class PortTakenError(Exception):
    """Another process listens at the address and port of a store."""


def serve(host: str, address: str, port: int) -> TCPStore:
    """Serve a store from this process. Raises `PortTakenError`.

    Args:
        host: the name or address by which this process reaches it.
        address: the only address at which it listens; empty: all addresses of this machine.
        port: 0: any free one.
    """
    try:
        listener = _listen(address, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError from None
        raise
    port = listener.getsockname()[1]
    return TCPStore(
        address or host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_OPERATION_TIMEOUT,
        master_listen_fd=listener.detach(),  # owned by the store from now on
    )


def _listen(address: str, port: int) -> socket.socket:
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def connect(host: str, port: int, seconds: float) -> TCPStore:
    """Connect to a store that another process serves. Raises RuntimeError if it does not answer in time."""
    timeout = timedelta(seconds=seconds)
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    store.set_timeout(_OPERATION_TIMEOUT)
    return store


def connect_again(store: Store) -> Store:
    """Another connection to the same store: operations on one connection wait for each other."""
    return store.clone()  # type: ignore[attr-defined,no-any-return]


class SignedStore:
    """Signed texts under one path of a store.

    A value that no node of this job has written counts as missing. Methods raise RuntimeError if the store is
    gone.

    Args:
        store: torch's.
        signer: signs for the job in this store.
        path: prefix of all keys, with a slash at its end.
    """

    def __init__(self, store: Store, signer: Signer, path: str = "") -> None:
        self._store = store
        self._signer = signer
        self._path = path

    def connect_again(self) -> SignedStore:
        """The same path, on another connection."""
        return SignedStore(connect_again(self._store), self._signer, self._path)

    def part(self, name: str) -> SignedStore:
        """A path below this one, on the same connection."""
        return SignedStore(self._store, self._signer, f"{self._path}{name}/")

    @property
    def counters(self) -> Store:
        """The same path for counters. These are not signed: no decision that matters may depend on them."""
        return PrefixStore(self._path.rstrip("/"), self._store)

    def set(self, key: str, text: str) -> None:
        """Write `text` under `key`."""
        self._store.set(self._path + key, self._signed(key, text))  # type: ignore[arg-type]

    def get(self, key: str) -> str | None:
        """The text under `key`; None if no node of this job has written any."""
        path = self._path + key
        return self._checked(key, self._store.get(path)) if self._store.check([path]) else None

    def wait(self, *keys: str, seconds: float) -> list[str] | None:
        """Wait until each of `keys` has a text, and return the texts; None after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._store.wait([self._path + key for key in keys], timedelta(seconds=left))
            except DistStoreError:
                return None
            found = self.get_all(keys)
            texts = [text for text in found if text is not None]
            if len(texts) == len(keys):
                return texts
            time.sleep(_RECHECK_PAUSE)  # until a node replaces the forged value
        return None

    def get_all(self, keys: Sequence[str]) -> list[str | None]:
        """What `get` returns for each of `keys`, all of which exist."""
        stored = self._store.multi_get([self._path + key for key in keys])
        return [self._checked(key, value) for key, value in zip(keys, stored, strict=True)]

    def exist(self, keys: Iterable[str]) -> bool:
        """True if each of `keys` has a value, forged ones included."""
        return self._store.check([self._path + key for key in keys])

    def create(self, key: str, text: str) -> str:
        """Write `text` under `key` unless it has a text already; return the one that it has then.

        Raises `ForgedError` if another process overwrites it again and again.
        """
        wanted, before = self._signed(key, text), b""
        for _ in range(_MAX_REPLACEMENTS):
            found = self._store.compare_set(self._path + key, before, wanted)  # type: ignore[arg-type]
            known = self._checked(key, found)
            if known is not None:
                return known
            before = found
        raise ForgedError(f"{key} is overwritten again and again")

    def receive(self, key: str, seconds: float, patience: float) -> str | None:
        """Wait until there is something under `key`, and return the text; None after `seconds`.

        Raises `ForgedError` if no node of this job has written it, nor replaces it within `patience` seconds.
        """
        if not self.wait_for_any(key, seconds):
            return None
        deadline = time.monotonic() + patience
        while (text := self._checked(key, self._store.get(self._path + key))) is None:
            if time.monotonic() > deadline:
                raise ForgedError(f"{key} is not what a node of this job has written")
            time.sleep(_RECHECK_PAUSE)
        return text

    def wait_for_any(self, key: str, seconds: float) -> bool:
        """Wait until there is something under `key`, forged or not; False if there is nothing after `seconds`."""
        try:
            self._store.wait([self._path + key], timedelta(seconds=seconds))
        except DistStoreError:
            return False
        return True

    def add_line(self, key: str, text: str) -> None:
        """Add `text`, which has no line breaks, to the lines under `key`."""
        line = b"\n" + self._signed(key, text) + b"\n"
        self._store.append(self._path + key, line)  # type: ignore[attr-defined]

    def lines(self, key: str) -> list[str]:
        """The lines under `key` in their order, without those of other processes; none if it was deleted."""
        try:
            found = self._store.get(self._path + key).split(b"\n")
        except DistStoreError:
            return []
        texts = [self._checked(key, line) for line in found if line]
        return [text for text in texts if text is not None]

    def delete(self, key: str) -> None:
        """Remove what is under `key`."""
        self._store.delete_key(self._path + key)

    def _signed(self, key: str, text: str) -> bytes:
        return self._signer.sign(self._path + key, text.encode())

    def _checked(self, key: str, stored: bytes) -> str | None:
        return self._signer.read(self._path + key, stored)
