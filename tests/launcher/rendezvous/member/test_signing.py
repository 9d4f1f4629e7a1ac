"""Signed values."""

from __future__ import annotations

import pytest

from launcher.rendezvous.member.signing import ForgedError, Signer


def test_a_signature_for_another_job_or_key_is_refused() -> None:
    signer = Signer(b"secret", "job")
    signed = signer.sign("key", b"value")
    assert signer.check("key", signed) == b"value"
    assert Signer(b"secret", "job").check("key", signed) == b"value"
    for other, key in (
        (signer, "other"),
        (Signer(b"another", "job"), "key"),
        (Signer(b"secret", "jo", "b"), "key"),
        (Signer(b"secret", "other"), "key"),
        (signer.within("nonce"), "key"),
        (Signer(None), "key"),
    ):
        with pytest.raises(ForgedError):
            other.check(key, signed)
    with pytest.raises(ForgedError):
        signer.check("key", Signer(None).sign("key", b"value"))
    with pytest.raises(ForgedError):
        signer.check("key", signed[:-1] + b"!")
