"""Signatures of what the nodes of a job put into a store, which others may be able to write to as well.

A value counts only if a node of this job has written it, for the very key that it is read from: the code that
authenticates it (HMAC-SHA256) covers the job's id, the life of the store that it was written to, and the key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

__all__ = ["ForgedError", "Signer"]

_SIGNED, _OPEN = b"hmac-sha256:", b"unsigned:"
_CODE_BYTES = 64  # in hexadecimal


class ForgedError(Exception):
    """A value that no node of this job has written under this key."""


class Signer:
    """Signs for a job, and checks.

    `secret` is what all nodes of the job have, and nobody else; without one nothing is protected, and signed
    values are refused as unsigned ones are where there is one. `scope` is what else must agree, such as the
    job's id. `suspect` is called with the keys of values that `read` refuses.
    """

    def __init__(
        self, secret: bytes | None, *scope: str, suspect: Callable[[str], None] = lambda _: None
    ) -> None:
        self._secret = secret
        self._scope = scope
        self._suspect = suspect
        self._key = None if secret is None else _code(secret, *(part.encode() for part in scope))

    def within(self, *scope: str) -> Signer:
        """One whose values only those accept that are within the same."""
        return Signer(self._secret, *self._scope, *scope, suspect=self._suspect)

    @staticmethod
    def is_signed(stored: bytes) -> bool:
        """Whether something with a secret has written it, whichever."""
        return stored.startswith(_SIGNED)

    @staticmethod
    def is_unsigned(stored: bytes) -> bool:
        """Whether something without a secret has."""
        return stored.startswith(_OPEN)

    def sign(self, key: str, value: bytes) -> bytes:
        """`value` as it is stored under `key`."""
        if self._key is None:
            return _OPEN + value
        return _SIGNED + _code(self._key, key.encode(), value).hex().encode() + value

    def check(self, key: str, stored: bytes) -> bytes:
        """The value that was stored under `key`. Raises `ForgedError`."""
        if self._key is None:
            if not stored.startswith(_OPEN):
                raise ForgedError("it is signed, or of another program")
            return stored.removeprefix(_OPEN)
        if not stored.startswith(_SIGNED):
            raise ForgedError("it is not signed")
        code, value = stored[len(_SIGNED) :][:_CODE_BYTES], stored[len(_SIGNED) + _CODE_BYTES :]
        if not hmac.compare_digest(code, _code(self._key, key.encode(), value).hex().encode()):
            raise ForgedError("it is signed with another secret, or for another key")
        return value

    def read(self, key: str, stored: bytes) -> str | None:
        """The text that was stored under `key`; None if no node of this job has written it."""
        try:
            return self.check(key, stored).decode()
        except (ForgedError, UnicodeDecodeError):
            self._suspect(key)
            return None


def _code(key: bytes, *parts: bytes) -> bytes:
    """The authentication code of `parts`, in which nothing can move from one part to another."""
    code = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        code.update(len(part).to_bytes(8, "little"))
        code.update(part)
    return code.digest()
