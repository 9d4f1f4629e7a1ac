"""How a record is stored: as one JSON object, whose last member is a checksum of everything before it.

    {"format":"shardckpt/1", ... ,"crc32c":"89abcdef"}

This member has exactly this form, so that a file can be checked by its last bytes before it is parsed. All
records of the format are stored so: manifests, parts, claims and reports. The checksum detects damage; it is no
signature.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import crc32c
import msgspec

from shardckpt.errors import FormatError

__all__ = [
    "FORMAT",
    "MAX_SMALL_BYTES",
    "check_keys",
    "decode_small",
    "encode",
    "encode_report",
    "open_sealed",
]

FORMAT = "shardckpt/1"

MAX_SMALL_BYTES = 1 << 20
"""Bytes of the largest claim or report."""

_MAX_REPORTED = 10_000  # characters

_TAIL = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}')
_TAIL_BYTES = 21


def encode(record: object, hook: Callable[[object], object] | None = None) -> bytes:
    """A record as it is stored. Its JSON must be an object with at least one member.

    `hook` returns what is encoded instead of a value that JSON does not have.
    """
    document = msgspec.json.encode(record, enc_hook=hook)
    return b'%s,"crc32c":"%08x"}' % (document[:-1], crc32c.crc32c(document[:-1]))


def encode_report(error: str, **about: object) -> bytes:
    """A report of an error, cut to 10,000 characters, with the members `about`."""
    return encode({**about, "error": error[:_MAX_REPORTED].encode("utf-8", "replace").decode()})


def open_sealed(data: bytes, file: str) -> bytes:
    """The JSON object in `data`, without its checksum. Raises FormatError if that is missing or wrong."""
    tail = _TAIL.fullmatch(data, max(0, len(data) - _TAIL_BYTES))
    if tail is None:
        raise FormatError(
            f"{file} is not a valid {FORMAT} record: it does not end with its checksum; it is cut off, damaged, "
            "or was written by something else"
        )
    body = memoryview(data)[: tail.start()]
    if (found := crc32c.crc32c(body)) != int(tail[1], 16):
        raise FormatError(
            f"{file} is damaged: its checksum is {found:08x}, and it was written with {tail[1].decode()}"
        )
    return bytes(body) + b"}"


def check_keys(document: bytes) -> None:
    """Raise ValueError if an object in this JSON text has two members of one name, or if it is no JSON."""
    json.loads(document, object_pairs_hook=_check_members)


def decode_small(data: bytes, file: str) -> dict[str, Any]:
    """The members of a claim or a report. Raises FormatError."""
    if len(data) > MAX_SMALL_BYTES:
        raise FormatError(f"{file} has more than {MAX_SMALL_BYTES} bytes, which no record of its kind has")
    document = open_sealed(data, file)
    try:
        check_keys(document)
        return msgspec.json.decode(document, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not a valid {FORMAT} record: {error}") from error


def _check_members(members: Sequence[tuple[str, object]]) -> None:
    if len({name for name, _ in members}) < len(members):
        twice = Counter(name for name, _ in members).most_common(1)[0][0]
        raise ValueError(f"an object has two members named {twice[:80]!r}")
