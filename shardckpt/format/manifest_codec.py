"""Encode and decode manifests and parts."""

from __future__ import annotations

import re
import struct
from typing import Any, TypeVar

import msgspec
import numpy as np

from shardckpt.errors import FormatError, UnknownVersionError
from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST, Chunks, Manifest, ManifestSummary, Part
from shardckpt.format.manifest_checks import (
    check_chunks,
    check_head,
    check_names,
    check_packs,
    check_tensor,
    check_values,
)
from shardckpt.format.records import FORMAT

__all__ = [
    "decode_checked",
    "decode_manifest",
    "decode_part",
    "decode_summary",
    "encode_checked",
    "encode_record",
]


def encode_record(record: Manifest | Part) -> bytes:
    """The record as it is stored: JSON in UTF-8, with its checksum."""
    return records.encode(record, _to_json)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`, checked so far that reading by it is safe.

    Args:
        data: the file's bytes.
        where: the checkpoint's URL, for messages. The folders' names tell which attempt and step the manifest
            must have, and how far up a pack's path may lead.

    Raises UnknownVersionError for another version of the format, and FormatError for a record that is damaged,
    not JSON, or does not hold what `shardckpt.format.manifest_checks` checks.
    """
    manifest = _decode(data, Manifest, where, MANIFEST)
    check_head(manifest, where)
    check_packs(manifest.packs, where)
    check_names(manifest, where)
    alike = {(tensor.dtype, tensor.shape, tensor.arrays): tensor for tensor in manifest.tensors}
    for tensor in alike.values():  # one of each kind: the layers of a model are alike
        check_tensor(tensor, where)
    check_chunks(manifest, where)
    check_values(manifest, where)
    return manifest


def decode_summary(data: bytes, where: str) -> ManifestSummary:
    """The summary of the manifest in `data`, of which nothing else is checked. Raises FormatError."""
    summary = _decode(data, ManifestSummary, where, MANIFEST)
    check_head(summary, where)
    check_packs(summary.packs, where)
    return summary


def encode_checked(manifest: Manifest) -> bytes:
    """The manifest for other processes of this job, which decode it in a fraction of the time of the record."""
    chunks = manifest.chunks
    head = msgspec.json.encode(manifest, enc_hook=lambda _: len(chunks))
    columns = (chunks.pack.astype("<i4"), chunks.offset.astype("<i8"), chunks.crc32c.astype("<u4"))
    return b"".join([_LENGTH.pack(len(head)), head, *(column.tobytes() for column in columns)])


def decode_checked(data: bytes) -> Manifest:
    """The manifest that `encode_checked` encoded, which another rank has checked with `decode_manifest`."""
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size + length

    def chunks(_kind: type, count: int) -> Chunks:
        pack = np.frombuffer(data, "<i4", count, start)
        offset = np.frombuffer(data, "<i8", count, start + pack.nbytes)
        crc = np.frombuffer(data, "<u4", count, start + pack.nbytes + offset.nbytes)
        return Chunks(pack, offset, crc)

    return msgspec.json.decode(memoryview(data)[_LENGTH.size : start], type=Manifest, dec_hook=chunks)


def decode_part(data: bytes, where: str) -> Part:
    """The part in `data`, for the checkpoint at `where`. Raises FormatError."""
    part = _decode(data, Part, where, "a part")
    for pack in part.packs:
        if not len(pack.chunk) == len(pack.offset) == len(pack.crc32c):
            raise FormatError(f"{where}: a part has chunk columns of different lengths")
        columns = [pack.rank, pack.size], pack.chunk, pack.offset
        if not all(_within(column, 1 << 63) for column in columns) or not _within(pack.crc32c, 1 << 32):
            raise FormatError(f"{where}: a part is invalid: a number is out of range")
    return part


def _within(numbers: list[int], end: int) -> bool:
    """True if all numbers are at least 0 and below `end`."""
    return not numbers or (min(numbers) >= 0 and max(numbers) < end)


_LENGTH = struct.Struct("<q")

_CHUNKS = re.compile(rb',"chunks":\{"pack":\[[0-9,]*\],"offset":\[[0-9,]*\],"crc32c":\[[0-9,]*\]\}(?=\}\Z)')
"""The chunk table at the end of a manifest: it is most of it, and has no members but these."""

_Record = TypeVar("_Record", Manifest, ManifestSummary, Part)


class _Columns(msgspec.Struct, forbid_unknown_fields=True):
    """The chunk table as it is stored."""

    pack: list[int]
    offset: list[int]
    crc32c: list[int]


def _to_json(value: object) -> object:
    if not isinstance(value, Chunks):
        raise NotImplementedError(f"a {type(value).__qualname__} is no part of a record")
    return _Columns(value.pack.tolist(), value.offset.tolist(), value.crc32c.tolist())


def _from_json(_kind: type, value: Any) -> Chunks:
    columns = msgspec.convert(value, _Columns)
    try:
        return Chunks(columns.pack, columns.offset, columns.crc32c)
    except OverflowError as error:
        raise ValueError("a number of the chunk table is out of range") from error


class _Version(msgspec.Struct):
    format: str


def _decode(data: bytes, kind: type[_Record], where: str, file: str) -> _Record:
    """Open, parse and type-check a record; the version is looked at first."""
    try:
        document = records.open_sealed(data, file)
    except FormatError as error:
        # Damage does not remove the checksum and leave valid JSON: a version without checksums does.
        if (version := _version_without_checksum(data)) is not None:
            _check_version(version, where, file)
        raise FormatError(f"{where}: {error}") from error
    try:
        _check_version(msgspec.json.decode(document, type=_Version).format, where, file)
        records.check_keys(_CHUNKS.sub(b"", document))
        return msgspec.json.decode(document, type=kind, dec_hook=_from_json)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{where}: {file} is not a valid {FORMAT} record: {error}") from error


def _check_version(version: str, where: str, file: str) -> None:
    if version != FORMAT:
        raise UnknownVersionError(
            f"{where}: {file} has format {version[:80]!r}, and this version reads {FORMAT!r} only; "
            "read it with the shardckpt that wrote it, or a newer one"
        )


def _version_without_checksum(data: bytes) -> str | None:
    """The version of a record that is valid JSON without a checksum; None for any other data."""
    if b'"crc32c":"' in data[-32:]:
        return None
    try:
        return msgspec.json.decode(data, type=_Version).format
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
