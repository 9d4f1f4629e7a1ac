"""Attempts: begun without the storage, and given a place in the run when it answers."""

from __future__ import annotations

import posixpath
import re
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from shardckpt.errors import FormatError, NotACheckpointError, StorageError, SupersededError
from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST
from shardckpt.run.lease import Holder, Terms, wait_free
from shardckpt.run.places import ATTEMPT, attempt_number, attempts_in
from shardckpt.storage import Storage

__all__ = [
    "SHOWN_WITHIN",
    "Attempt",
    "check_is_run",
    "claim_attempt",
    "find_attempt",
    "find_claim",
    "run_of",
]

SHOWN_WITHIN = 10.0
"""Seconds after which a claim is shown by any file system that shows it at all."""
_LAST = (1 << 63) - 1  # number of an attempt, as manifests have it
_INSIDE = re.compile(r"(?P<run>.+?)/+attempt-\d{4,}(-[0-9a-f]{8})?(/+step-\d{8,})?/*\Z", re.DOTALL)
_STEP = re.compile(r"step-\d{8,}\Z")


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """An attempt, as its job's ranks and savers know it from the beginning.

    Attributes:
        id: unique; attempt.json has it.
        name: its name until it is claimed, and in memory ever after. Sorts as its place in the run will, among
            the attempts that its job knows.
        base: number of the newest attempt that its job knew when it began; 0: it knew none.
        holder: the job that it belongs to.
    """

    id: str
    name: str
    base: int
    holder: Holder

    @classmethod
    def begin(cls, base: int, holder: Holder) -> Attempt:
        """Begin a new one, which no other process knows yet."""
        key = secrets.token_hex(16)
        return cls(key, f"attempt-{base + 1:04d}-{key[:8]}", base, holder)


def claim_attempt(
    root: Storage,
    attempt: Attempt | None = None,
    *,
    terms: Terms | None = None,
    tell: Callable[[str], object] = lambda _text: None,
    is_wanted: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], object] = time.sleep,
) -> str:
    """Make the next attempt's folder this writer's own. Returns its name; the same name again if it is already.

    No other writer can have the same: the claim is a create-only put; where the storage cannot do that, a random
    suffix keeps two attempts of one number apart.

    Raises RunInUseError if another job is at work in the run; SupersededError if the run has gone on since
    `attempt` began, and it is not `is_wanted` any more; NotACheckpointError if the root is no place for a run.
    """
    attempt = attempt or Attempt.begin(0, Holder.of_this_process(()))
    terms = terms or Terms()
    suffix = "" if root.exclusive() else f"-{attempt.id[:8]}"
    record = {
        "format": records.FORMAT,
        "id": attempt.id,
        "created": time.time(),
        "lasts": terms.lasts,
        "holder": msgspec.to_builtins(attempt.holder),
    }
    content = records.encode(record)
    for _ in range(1000):
        found = root.list()
        check_is_run(root, found)
        newest = _newest(found)
        number = max(map(attempt_number, newest), default=0)
        for name in newest:
            if _is_own(root, name, attempt):
                return name
            if number > attempt.base and not is_wanted():
                raise SupersededError(
                    f"{root.url}: the run has gone on in {name}, and nobody needs what was saved before"
                )
            wait_free(root.at(name), ATTEMPT, attempt.holder, terms, tell, sleep)
        last = max(number, attempt.base)
        if last >= _LAST:
            raise NotACheckpointError(
                f"{root.url} has an attempt {last}, which no run has on its own, and after which there is no "
                "number for another one. Delete its folder, or choose another URL."
            )
        name = f"attempt-{last + 1:04d}{suffix}"
        try:
            root.create(f"{name}/{ATTEMPT}", content)
        except FileExistsError:
            continue
        if suffix and (taken := _above(root, name)):
            # Two jobs at once, and the storage did not keep them apart: the one that sorts last is resumed.
            try:
                for other in taken:
                    wait_free(root.at(other), ATTEMPT, attempt.holder, terms, tell, sleep)
            except StorageError:
                root.delete_tree(name)
                raise
        return name
    raise StorageError(f"{root.url}: a thousand attempts were claimed while this one tried to start")


def find_attempt(root: Storage, attempt: Attempt) -> str:
    """Find the folder that another process has claimed for this attempt. Empty if there is none."""
    later = [name for name in attempts_in(root.list()) if attempt_number(name) > attempt.base]
    return next((name for name in reversed(later) if _is_own(root, name, attempt)), "")


def find_claim(root: Storage, name: str, attempt: Attempt, *, within: float = SHOWN_WITHIN) -> None:
    """Return once the claim of `attempt`, which another process has made, is to be seen at `root`.

    Raises StorageError if it is not: this is another place, or the storage is out of reach. Network file systems
    may show a new folder late, so that is found out only after `within` seconds.
    """
    path = f"{name}/{ATTEMPT}"
    pause, deadline = 0.01, time.monotonic() + within
    while True:
        try:
            root.size(path)
            if _is_own(root, name, attempt):
                return
            found = "there is the one of another job"
        except FileNotFoundError:
            found = "there is none"
        if time.monotonic() >= deadline:
            raise StorageError(f"{root.url}/{path}: {found}")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        root.list()  # by which a network file system's client looks again


def run_of(url: str) -> str | None:
    """The run's URL, if `url` is by its name a checkpoint or an attempt in one."""
    match = _INSIDE.match(url)
    return match["run"] if match and match[3] else None


def check_is_run(root: Storage, found: Sequence[str]) -> None:
    """Raise NotACheckpointError if what was `found` at `root` makes it a part of a run, or a single
    checkpoint."""
    above = posixpath.dirname(root.url.rstrip("/"))
    if ATTEMPT in found or any(_STEP.match(name) for name in found):
        what, instead = "an attempt of a run", f"the run is {above}"
    elif MANIFEST in found:
        run = run_of(root.url)
        what = "a checkpoint, and not a run"
        instead = (
            f"the run is {run}"
            if run
            else "give another folder, and load this checkpoint with shardckpt.load(url, state)"
        )
    else:
        return
    raise NotACheckpointError(
        f"{root.url} is {what}: nothing would be found here to resume from, and nothing is written "
        f"into it; {instead}"
    )


def _newest(found: Sequence[str]) -> list[str]:
    """The attempts with the highest number; several only where the storage cannot tell two claims apart."""
    attempts = attempts_in(found)
    highest = max(map(attempt_number, attempts), default=0)
    return [name for name in attempts if attempt_number(name) == highest]


def _above(root: Storage, own: str) -> list[str]:
    """Attempts that were claimed at the same time as `own`, and sort after it."""
    number = attempt_number(own)
    return [n for n in attempts_in(root.list()) if (attempt_number(n), n) > (number, own)]


def _is_own(root: Storage, name: str, attempt: Attempt) -> bool:
    """True if the claim in this folder is this attempt's."""
    try:
        found = records.decode_small(root.read(f"{name}/{ATTEMPT}"), ATTEMPT)
    except (FileNotFoundError, FormatError):
        return False
    return found.get("id") == attempt.id
