"""Signatures of the values in a store, to which processes outside the job may be able to write as well.

A value counts only if a node of this job has written it, for the very key under which it is read: the code that
authenticates it (HMAC-SHA256) covers the job's id, the store's nonce, and the key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

__all__ = ["ForgedError", "Signer"]

_SIGNED, _UNSIGNED = b"hmac-sha256:", b"unsigned:"
_CODE_CHARACTERS = 64  # hexadecimal


class ForgedError(Exception):
    """A value that no node of this job has written under this key."""


class Signer:
    """Signs and checks the values of a job.

    Args:
        secret: known to the nodes of the job alone. None: nothing is protected, and signed values are refused,
            as unsigned ones are where there is a secret.
        scope: texts that must agree too, such as the job's id.
        on_forged: called with the key of each value that `read` refuses.
    """

    def __init__(
        self, secret: bytes | None, *scope: str, on_forged: Callable[[str], None] = lambda _: None
    ) -> None:
        self._secret = secret
        self._scope = scope
        self._on_forged = on_forged
        self._key = None if secret is None else _code(secret, *(part.encode() for part in scope))

    def within(self, *scope: str) -> Signer:
        """A signer of a narrower scope: neither accepts the other's values."""
        return Signer(self._secret, *self._scope, *scope, on_forged=self._on_forged)

    @staticmethod
    def is_signed(stored: bytes) -> bool:
        """True if a signer with a secret, whichever, has written `stored`."""
        return stored.startswith(_SIGNED)

    @staticmethod
    def is_unsigned(stored: bytes) -> bool:
        """True if a signer without a secret has written `stored`."""
        return stored.startswith(_UNSIGNED)

    def sign(self, key: str, value: bytes) -> bytes:
        """`value` as it is stored under `key`."""
        if self._key is None:
            return _UNSIGNED + value
        return _SIGNED + _code(self._key, key.encode(), value).hex().encode() + value

    def check(self, key: str, stored: bytes) -> bytes:
        """The value that was stored under `key`. Raises `ForgedError`."""
        if self._key is None:
            if not stored.startswith(_UNSIGNED):
                raise ForgedError("it is signed, or of another program")
            return stored.removeprefix(_UNSIGNED)
        if not stored.startswith(_SIGNED):
            raise ForgedError("it is not signed")
        signed = stored.removeprefix(_SIGNED)
        code, value = signed[:_CODE_CHARACTERS], signed[_CODE_CHARACTERS:]
        if not hmac.compare_digest(code, _code(self._key, key.encode(), value).hex().encode()):
            raise ForgedError("it is signed with another secret, or for another key")
        return value

    def read(self, key: str, stored: bytes) -> str | None:
        """The text that was stored under `key`; None if no node of this job has written it."""
        try:
            return self.check(key, stored).decode()
        except (ForgedError, UnicodeDecodeError):
            self._on_forged(key)
            return None


def _code(key: bytes, *parts: bytes) -> bytes:
    """The authentication code of `parts`, which covers the length of each part as well."""
    code = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        code.update(len(part).to_bytes(8, "little"))
        code.update(part)
    return code.digest()
