"""A run's folders: attempts, the checkpoints in them, and which of them is the newest."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from shardckpt.errors import CorruptError, FormatError, NotACheckpointError, StateError
from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST, Manifest, Pack, attempt_and_step
from shardckpt.format.manifest_codec import decode_manifest
from shardckpt.run.foreign import describe_other
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.rereading import read_twice

__all__ = [
    "ATTEMPT",
    "BAD",
    "FAILED",
    "Place",
    "Succession",
    "attempt_for",
    "attempt_number",
    "attempts_in",
    "checkpoint_order",
    "exact_place",
    "find_place",
    "iter_good",
    "iter_places",
    "read_decoded",
    "read_manifest",
    "read_small",
    "step_path",
    "steps_in",
    "succession",
]

T = TypeVar("T")

ATTEMPT = "attempt.json"
"""In an attempt's folder: its claim to the number."""
BAD = "bad.json"
"""Beside a manifest: a reader found that this checkpoint fails verification."""
FAILED = "failed.json"
"""In a checkpoint's or a rank's folder: this save ended with an error, and will not be committed."""

_ATTEMPT = re.compile(r"attempt-([0-9]+)(?:-[0-9a-f]+)?\Z")
_STEP = re.compile(r"step-([0-9]+)\Z")
_IN_RUN = re.compile(r"(?P<run>.*?)/?(?P<path>attempt-[0-9]+(?:-[0-9a-f]+)?/step-[0-9]+)/*\Z", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """Where one checkpoint is, or is to be: `path` below `root`; in a run, the root is the run."""

    root: Storage
    path: str = ""

    @property
    def storage(self) -> Storage:
        """The checkpoint's own folder."""
        return self.root.at(self.path) if self.path else self.root

    @property
    def url(self) -> str:
        """The checkpoint's URL."""
        return self.storage.url

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts a run's checkpoints by attempt, then step: the last is the newest."""
        return checkpoint_order(self.path)

    def pack(self, pack: Pack) -> str:
        """The path of a pack below `root`. `decode_manifest` has checked that it stays there."""
        return posixpath.normpath(posixpath.join(self.path, pack.path))

    def is_committed(self) -> bool:
        """Whether the checkpoint exists."""
        try:
            self.storage.read(MANIFEST, 0, 1)  # one request, also if it is not there
        except FileNotFoundError:
            return False
        except FormatError:  # there is something else than a file
            return True
        return True


def find_place(
    url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None
) -> Place:
    """The place of the checkpoint at `url`, or of the newest good one of the run at `url`.

    Raises NotACheckpointError, which tells what is there instead; CorruptError if all are marked as bad.
    """
    exact = exact_place(url, storage_options)
    if exact.path or exact.is_committed():
        return exact
    root = exact.root
    if (place := next(iter_good(root), None)) is not None:
        return place
    found = root.list()
    if MANIFEST in found:
        return exact  # which is no file; `read_manifest` says so
    if any(_ATTEMPT.match(name) for name in found):
        what = "it is a run, but no save in it was ever finished. `shardckpt ls RUN` lists what it has"
    else:
        what = describe_other(root.url, found, storage_options)
    raise NotACheckpointError(f"{root.url} is neither a checkpoint nor a run with one: {what}.")


def exact_place(
    url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None
) -> Place:
    """The place of a checkpoint right at `url`, whether there is one or not; its root is its run, if any."""
    if isinstance(url, str | os.PathLike) and (match := _IN_RUN.match(os.fspath(url))):
        return Place(open_storage(match["run"] or ".", storage_options), match["path"])
    return Place(open_storage(url, storage_options))


def attempts_in(names: Iterable[str]) -> list[str]:
    """Those of these names that are attempts', the newest last."""
    return sorted(filter(_ATTEMPT.match, names), key=lambda name: (attempt_number(name), name))


def steps_in(names: Iterable[str]) -> list[str]:
    """Those of these names that are steps', the newest first."""
    return sorted(filter(_STEP.match, names), key=lambda name: _number(_STEP, name), reverse=True)


def iter_places(root: Storage) -> Iterator[Place]:
    """Every step folder of the run at `root`, committed or not, the newest first."""
    for attempt in reversed(attempts_in(root.list())):
        for step in steps_in(root.list(attempt)):
            yield Place(root, f"{attempt}/{step}")


def iter_good(root: Storage) -> Iterator[Place]:
    """The run's committed checkpoints that nobody has marked as bad, the newest first.

    Raises CorruptError at the end if there is none, but there are bad ones: such a run is not a new one.
    """
    found, bad = False, ""
    for place in iter_places(root):
        names = place.storage.list()
        if MANIFEST not in names and not _is_unlisted(place):
            continue
        if BAD in names:
            bad = bad or place.url
        else:
            found = True
            yield place
    if bad and not found:
        raise CorruptError(
            f"every checkpoint of {root.url} is marked as bad, the newest is {bad}. Its {BAD} says why; delete "
            "that file to have it tried again, or start anew under another URL."
        )


def _is_unlisted(place: Place) -> bool:
    """True if there is a manifest that a listing did not show: one out of date must not hide a checkpoint."""
    try:
        return bool(place.storage.read(MANIFEST, 0, 1))
    except (FileNotFoundError, FormatError):
        return False


class Succession(Enum):
    """How far the attempts after a checkpoint's own have come."""

    NONE = 0  # there is none
    CLAIMED = 1  # a job has started
    COMMITTED = 2  # and has a good checkpoint


def succession(place: Place) -> Succession:
    """What the run of `place` has of later attempts. Lists folders, so it is not to be asked all the time."""
    own = place.order[0]
    if not own or all(_number(_ATTEMPT, name) <= own for name in place.root.list()):
        return Succession.NONE
    for other in iter_places(place.root):
        if other.order[0] <= own:
            break
        names = other.storage.list()
        if MANIFEST in names and BAD not in names:
            return Succession.COMMITTED
    return Succession.CLAIMED


def attempt_for(url: str, step: int) -> int | None:
    """The attempt, by its folder, of a checkpoint of this step that is written at `url`; None outside a run.

    Raises StateError if the folder is that of another step: nobody could read it there.
    """
    folder = attempt_and_step(url)
    if folder is None:
        return None
    if folder[1] != step:
        raise StateError(
            f"{url} is the folder of a run's step {folder[1]}, and this is the state of step {step}. Choose "
            "the step's own folder, or one of another name."
        )
    return folder[0]


def read_manifest(place: Place) -> Manifest:
    """The checked manifest. Raises NotACheckpointError if there is none, FormatError if it is invalid."""
    return read_decoded(place, lambda data: decode_manifest(data, place.url))


def read_decoded(place: Place, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of the stored manifest, which is read again if that raises FormatError.

    Raises NotACheckpointError if there is none, FormatError also if it is no file.
    """

    def read(storage: Storage) -> T:
        return decode(_read_manifest(storage, place.url))

    return read_twice(place.storage, read)


def _read_manifest(storage: Storage, url: str) -> bytes:
    try:
        return storage.read(MANIFEST)
    except FileNotFoundError as error:
        if MANIFEST in storage.list():
            with contextlib.suppress(FileNotFoundError):
                return storage.read(MANIFEST)  # it has come into being just now
            raise FormatError(f"{url}: {MANIFEST} is a folder, and not a file") from error
        raise NotACheckpointError(
            f"{url} has no {MANIFEST}: no checkpoint is there, its save was never finished, or it was "
            "deleted just now"
        ) from error


def read_small(storage: Storage, path: str) -> dict[str, Any]:
    """The members of a claim or a report. Raises FileNotFoundError, FormatError, StorageError."""

    def read(storage: Storage) -> dict[str, Any]:
        data = storage.read(path, 0, records.MAX_SMALL_BYTES + 1)
        return records.decode_small(data, f"{storage.url}/{path}")

    return read_twice(storage, read)


def step_path(attempt: str, step: int) -> str:
    """Where `attempt` saves `step`, below the run."""
    return f"{attempt}/step-{step:08d}"


def checkpoint_order(path: str) -> tuple[int, int, str]:
    """The (attempt, step, attempt's name) of a checkpoint's path below its run; zeros if it is none."""
    attempt, _, step = path.partition("/")
    return _number(_ATTEMPT, attempt), _number(_STEP, step), attempt


def attempt_number(attempt: str) -> int:
    """The number in an attempt's name."""
    return _number(_ATTEMPT, attempt)


def _number(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.match(name)
    return int(match[1]) if match else 0
