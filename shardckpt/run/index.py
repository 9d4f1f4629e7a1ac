"""Indexes: what a list of checkpoints shows, so that nobody reads each manifest for that.

The committer keeps an index of its own attempt, which nobody else writes. Who lists a run and has to read many
manifests leaves one of the whole run. They are a cache: an entry counts only for the very save of which a listing
shows the parts, and the manifest and the packs in the right lengths. Of all others the manifests are read. So an
index may be missing, old, or damaged, and nothing is wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Collection, Mapping, Sequence

import msgspec

from shardckpt.errors import FormatError
from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST, Manifest, ManifestHead, ManifestSummary, pack_path
from shardckpt.format.manifest_checks import check_head
from shardckpt.format.manifest_codec import encode_record
from shardckpt.run.places import Place
from shardckpt.run.survey import StepFolder
from shardckpt.storage import Storage

__all__ = ["INDEX", "IndexEntry", "entry_of", "note_committed", "read_index", "write_index"]

INDEX = "index.json"
"""In the folder of a run or an attempt."""

_MOST_ATTEMPTS = 8  # whose index a process keeps: each tier of a job has one


class IndexEntry(ManifestHead, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of one checkpoint.

    Attributes:
        manifest_bytes: length of its manifest.
        packs: number of its packs, one for each rank, all in its own folder.
        bytes: their length together.
        pack_sizes: a hash of the length of each.
    """

    manifest_bytes: int
    packs: int
    bytes: int
    pack_sizes: str

    def is_of(self, folder: StepFolder) -> bool:
        """True if the folder has this checkpoint, with all its packs in their right lengths."""
        files = folder.files
        if files.get(MANIFEST) != self.manifest_bytes or folder.save_ids != {self.id}:
            return False
        if not 0 <= self.packs <= len(files):
            return False
        try:
            check_head(self, folder.place.url)
        except FormatError:
            return False
        return _hash([files.get(pack_path(rank), -1) for rank in range(self.packs)]) == self.pack_sizes


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    checkpoints: dict[str, IndexEntry]


def entry_of(manifest: Manifest | ManifestSummary, manifest_bytes: int) -> IndexEntry | None:
    """The entry of a checkpoint; None if it has packs elsewhere, too.

    Args:
        manifest: its manifest.
        manifest_bytes: the length of that, as it is stored.
    """
    packs = manifest.packs
    if [pack.path for pack in packs] != [pack_path(number) for number in range(len(packs))]:
        return None
    sizes = [pack.size for pack in packs]
    return IndexEntry(
        **manifest.head(),
        manifest_bytes=manifest_bytes,
        packs=len(packs),
        bytes=sum(sizes),
        pack_sizes=_hash(sizes),
    )


def read_index(folder: Storage) -> dict[str, IndexEntry]:
    """The entries of the index in a folder, by the checkpoint's path below the run; {} without a readable one.

    Raises StorageError.
    """
    try:
        document = records.open_sealed(folder.read(INDEX), INDEX)
        index = msgspec.json.decode(document, type=_Index)
    except (FileNotFoundError, FormatError, msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return index.checkpoints if index.format == records.FORMAT else {}


def write_index(folder: Storage, entries: Mapping[str, IndexEntry]) -> None:
    """Write the index in a folder, if the storage permits it."""
    with contextlib.suppress(OSError):
        folder.write(INDEX, records.encode(_Index(records.FORMAT, dict(entries))))


_kept: dict[str, dict[str, IndexEntry]] = {}  # by the attempt's URL
_keeping = threading.Lock()


def note_committed(place: Place, manifest: Manifest, gone: Collection[str]) -> None:
    """Write the index of an attempt anew, after a commit of this process.

    Args:
        place: of the checkpoint, in a run.
        manifest: what was committed.
        gone: paths of checkpoints that were deleted since.
    """
    attempt = place.root.at(place.path.partition("/")[0])
    entry = entry_of(manifest, len(encode_record(manifest)))
    with _keeping:
        entries = _kept.pop(attempt.url, {})
        entries = {path: known for path, known in entries.items() if path not in gone}
        if entry is not None:
            entries[place.path] = entry
        _kept[attempt.url] = entries
        while len(_kept) > _MOST_ATTEMPTS:
            del _kept[next(iter(_kept))]
    write_index(attempt, entries)


def _hash(sizes: Sequence[int]) -> str:
    return hashlib.blake2b(msgspec.json.encode(sizes), digest_size=8).hexdigest()
