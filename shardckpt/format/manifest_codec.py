"""Manifests and parts to bytes and back."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from shardckpt.errors import FormatError
from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST, Head, Manifest, Part, Version
from shardckpt.format.manifest_checks import (
    check_chunks,
    check_head,
    check_names,
    check_packs,
    check_tensor,
    check_values,
    check_version,
    version_without_checksum,
)
from shardckpt.format.records import FORMAT

__all__ = ["decode_checked", "decode_head", "decode_manifest", "decode_part", "encode_record"]


def encode_record(record: Manifest | Part) -> bytes:
    """The record as it is stored: JSON in UTF-8, with its checksum."""
    return records.encode(record)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`, checked so far that reading by it is safe.

    `where` is its checkpoint's URL, for messages, to know how far up a pack's path may lead, and which attempt
    and step it must be of. Raises FormatError: damaged, not JSON, a newer version, a path that leaves the
    run, a tensor whose arrays do not tile it or that the values do not name once, a chunk outside its
    pack or over another one.
    """
    manifest = _decode(data, Manifest, where, MANIFEST)
    check_head(manifest, where)
    check_packs(manifest, where)
    check_names(manifest, where)
    alike = {(tensor.dtype, tensor.shape, tensor.arrays): tensor for tensor in manifest.tensors}
    for tensor in alike.values():  # the layers of a model are
        check_tensor(tensor, where)
    check_chunks(manifest, where)
    check_values(manifest, where)
    return manifest


def decode_head(data: bytes, where: str) -> Head:
    """The head of the manifest in `data`, whose checksum is right, and of which nothing else is checked.

    Raises FormatError.
    """
    head = _decode(data, Head, where, MANIFEST)
    check_head(head, where)
    check_packs(head, where)
    return head


def decode_checked(data: bytes) -> Manifest:
    """The manifest that another process of this job has checked."""
    return msgspec.json.decode(records.open_sealed(data, MANIFEST), type=Manifest)


def decode_part(data: bytes, where: str) -> Part:
    """The part in `data`. Raises FormatError."""
    part = _decode(data, Part, where, "part.json")
    if not len(part.chunk) == len(part.offset) == len(part.crc32c):
        raise FormatError(f"{where}: part.json has chunk columns of different lengths")
    if min(part.rank, part.size, *part.chunk, *part.offset, *part.crc32c) < 0 or any(
        crc >= 1 << 32 for crc in part.crc32c
    ):
        raise FormatError(f"{where}: part.json is invalid: a number is out of range")
    return part


_Record = TypeVar("_Record", Manifest, Head, Part)


def _decode(data: bytes, kind: type[_Record], where: str, file: str) -> _Record:
    try:
        document = records.open_sealed(data, file)
    except FormatError as error:
        # Damage does not take the checksum off and leave good JSON: that is a version that has none.
        if (version := version_without_checksum(data)) is not None:
            check_version(version, where, file)
        raise FormatError(f"{where}: {error}") from error
    try:
        check_version(msgspec.json.decode(document, type=Version).format, where, file)
        records.check_keys(document)
        return msgspec.json.decode(document, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{where}: {file} is not a valid {FORMAT} record: {error}") from error
