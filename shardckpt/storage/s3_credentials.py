"""Credentials that are renewed while a process runs: they are looked up again when a server refuses them."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Mapping
from enum import Enum
from typing import Any

from aiobotocore.credentials import AioCredentials  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]

__all__ = ["Credentials", "Found", "credentials_of"]

_log = logging.getLogger("shardckpt")

_PAUSE = 0.5  # seconds between two look-ups: all requests under way are refused at the same time
_EXPLICIT = ("key", "secret", "token", "username", "password", "session")
_EXPLICIT_OF_CLIENT = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


class Found(Enum):
    """What a look-up of credentials has found."""

    OTHERS = 0  # other ones than were refused; they are in use from now on
    THE_SAME = 1
    NOTHING = 2  # none that can be read, though there were some: they may be being written


class Credentials:
    """The credentials of one s3fs file system. For use in its event loop only.

    Credentials in the storage options can be replaced by the user only. All others (the environment, ~/.aws, a
    credential_process, SSO, a web identity, the machine's role) are looked up as at the start, by a new session.
    """

    def __init__(self, system: Any, options: Mapping[str, Any]) -> None:
        self._system = weakref.ref(system)
        client = options.get("client_kwargs") or {}
        self.are_explicit = any(options.get(name) for name in _EXPLICIT) or any(
            client.get(name) for name in _EXPLICIT_OF_CLIENT
        )
        self._can_change = not (self.are_explicit or options.get("anon"))
        self._lock = asyncio.Lock()
        self._looked_up = float("-inf")
        self._last = Found.OTHERS
        self.generation = 0
        """Counts how often other credentials were taken."""

    @property
    def can_change(self) -> bool:
        """False for credentials that the user passed in, which only the user can replace."""
        return self._can_change

    async def look_up(self, generation: int, since: float) -> Found:
        """Look credentials up again, and use other ones from now on if there are any.

        Args:
            generation: of the credentials that were refused.
            since: the loop's time when the refused request began; earlier look-ups do not count for it.
        """
        async with self._lock:
            if self.generation != generation:
                return Found.OTHERS
            loop = asyncio.get_running_loop()
            system = self._system()
            if not self._can_change or system is None:
                return Found.THE_SAME
            is_old = self._looked_up < since or loop.time() >= self._looked_up + _PAUSE
            if self._last is Found.OTHERS or is_old:
                self._looked_up = loop.time()
                self._last = await self._find(system)
            return self._last

    async def _find(self, system: Any) -> Found:
        """Look up. Raises nothing: a source that fails may work the next time."""
        source = new = held = None
        try:
            if system.session is not None:
                held = await system.session.get_credentials()
            source = await AioSession(**system.kwargs).get_credentials()  # as s3fs makes its own
            new = await source.get_frozen_credentials() if source is not None else None
        except Exception as error:
            _log.debug("credentials cannot be looked up: %s", error)
        if new is None:
            return Found.THE_SAME if held is None else Found.NOTHING
        if isinstance(held, AioCredentials) and isinstance(source, AioCredentials):
            if new == await held.get_frozen_credentials():
                return Found.THE_SAME
            # The client signs with this very object: its connections stay as they are.
            held.access_key, held.secret_key, held.token = new.access_key, new.secret_key, new.token
        else:
            if held is not None and new == await _frozen(held):
                return Found.THE_SAME
            await system.set_session(refresh=True)
        self.generation += 1
        _log.info("other credentials were found, and are used from now on")
        return Found.OTHERS


_known: weakref.WeakKeyDictionary[Any, Credentials] = weakref.WeakKeyDictionary()


def credentials_of(system: Any, options: Mapping[str, Any]) -> Credentials:
    """The credentials of a file system, one object for all storages that share it."""
    return _known.setdefault(system, Credentials(system, options))


async def _frozen(credentials: Any) -> Any:
    try:
        return await credentials.get_frozen_credentials()
    except Exception:
        return None
