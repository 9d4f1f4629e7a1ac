"""Survey: which files each checkpoint of a run has, by as few listings as that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardckpt.format.manifest import MANIFEST, parts_of
from shardckpt.run.places import BAD, FAILED, Place, attempts_in, steps_in
from shardckpt.storage import Storage
from shardckpt.storage.parallel import in_parallel

__all__ = ["StepFolder", "survey"]

_THREADS = 16
_FEW_STEPS = 8
"""Steps of an attempt that are always listed one by one."""
_FEW_FILES = 100
"""Files of a step up to which its attempt is listed as a whole.

A listing has a thousand files and they come one after another; steps are listed 16 at a time.
"""


@dataclass(frozen=True)
class StepFolder:
    """A step's folder, committed or not.

    Attributes:
        place: where it is.
        files: the length in bytes of each file in it, by its path below it.
    """

    place: Place
    files: Mapping[str, int]

    @property
    def is_committed(self) -> bool:
        """True if it has a manifest."""
        return MANIFEST in self.files

    @property
    def is_bad(self) -> bool:
        """True if a reader has marked it as failing verification."""
        return BAD in self.files

    @property
    def is_failed(self) -> bool:
        """True if a writer has marked its save as failed."""
        return FAILED in self.files

    @cached_property
    def save_ids(self) -> set[str]:
        """Ids of the saves that have left parts in it; the empty text stands for those of earlier versions."""
        folders = {path.partition("/")[0] for path in self.files if "/" in path}
        found = {save_id for folder in folders if (save_id := parts_of(folder)) is not None}
        return found | ({""} if any(path.endswith("/part.json") for path in self.files) else set())


def survey(root: Storage, found: Sequence[str] | None = None) -> list[StepFolder]:
    """Every step folder of the run at `root`, the newest first.

    Args:
        root: the run.
        found: what `root.list()` has returned; None: it is listed now.
    """
    attempts = attempts_in(root.list() if found is None else found)
    surveyed = in_parallel(lambda attempt: _survey_attempt(root, attempt), attempts, _THREADS)
    return [folder for folders in reversed(surveyed) for folder in folders]


def _survey_attempt(root: Storage, attempt: str) -> list[StepFolder]:
    """The step folders of one attempt, the newest first."""
    steps = steps_in(root.list(attempt))
    sizes: dict[str, dict[str, int]] = {}
    if len(steps) > _FEW_STEPS:
        sizes[steps[0]] = root.sizes(f"{attempt}/{steps[0]}")
        if len(sizes[steps[0]]) <= _FEW_FILES:
            sizes = {step: {} for step in steps}
            for path, size in root.sizes(attempt).items():
                step, _, below = path.partition("/")
                if step in sizes:
                    sizes[step][below] = size
    left = [step for step in steps if step not in sizes]
    listed = in_parallel(lambda step: root.sizes(f"{attempt}/{step}"), left, _THREADS)
    sizes.update(zip(left, listed, strict=True))
    return [StepFolder(Place(root, f"{attempt}/{step}"), sizes[step]) for step in steps]
