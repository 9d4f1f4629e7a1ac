"""What the workers of a run have imported from well-known packages, for later zygotes in its run directory.

`script_imports` reads a script; what the script runs by path, or imports as it goes, is known only afterwards. A
worker of each node writes the names down, and the next zygote imports them before it forks.

Only packages of a list count, from the directories of installed packages: nothing of the user's own is imported
that way. The record says of which versions they were, and a package that has changed is passed over. So is one
before whose import the script has set a variable of the environment, since the package may have read it. What
has not been imported in a zygote yet is tried in a fork: if that leaves threads or an open GPU, which make forks
unsafe, the names are recorded as unsafe.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import os
import re
import site
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from launcher.zygote.fork_safety import is_fork_safe

__all__ = [
    "FAMILIES",
    "ImportRecord",
    "ImportRecorder",
    "import_recorded",
    "installed_in",
    "start_recording",
]

FAMILIES = (
    *(
        "torch",
        "numpy",
        "shardckpt",
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "accelerate",
    ),
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"),
)
"""Top-level packages whose import has no effect that a script could notice, but for variables that they read."""

_MAX_NAMES = 5000
_MAX_BYTES = 1 << 20
_PAUSE = 0.5  # seconds between two writes
_NAME = re.compile(r"\w+(\.\w+)*")


class ImportRecord(NamedTuple):
    """The content of the file.

    Args:
        python: the interpreter.
        packages: what identifies each top-level package: its file, size and time of change.
        names: modules, in the order in which they were imported.
        is_safe: whether a fork is safe after their import; None: not tried yet.
    """

    python: str
    packages: dict[str, list[Any]]
    names: list[str]
    is_safe: bool | None = None

    @classmethod
    def read(cls, path: str) -> ImportRecord:
        """The record at `path`; an empty one if there is none of this interpreter, or none that can be read."""
        try:
            with open(path, "rb") as file:
                record = cls(**json.loads(file.read(_MAX_BYTES)))
            is_known = record.python == sys.version and isinstance(record.packages, dict)
            is_known = is_known and all(map(_NAME.fullmatch, record.names))
        except (OSError, ValueError, TypeError):
            is_known = False
        return record if is_known else cls(sys.version, {}, [])

    def write(self, path: str) -> None:
        """Replace the file at `path`; has no effect if that cannot be written."""
        draft = f"{path}.{os.uname().nodename}.{os.getpid()}"
        try:
            with open(draft, "w") as file:
                json.dump(self._asdict(), file)
            os.replace(draft, path)  # noqa: PTH105
        except OSError:
            pass

    def valid_names(self, directories: Sequence[str]) -> list[str]:
        """Names of packages that are still those that the record is of."""
        families = {name.partition(".")[0] for name in self.names} & set(FAMILIES)
        valid = {
            family for family in families if self.packages.get(family) == _identify(family, directories)
        }
        return [name for name in self.names if name.partition(".")[0] in valid][:_MAX_NAMES]


class ImportRecorder:
    """Notes in a worker what it imports; a finder of `sys.meta_path` that finds nothing itself.

    Args:
        path: the file.
        known: names that the zygote has imported from it.
        expected: variables that the script sets, as the zygote has found out, and has set when it imported.
        directories: those of installed packages.
        clock: seconds.
    """

    def __init__(
        self,
        path: str,
        known: Sequence[str],
        expected: Mapping[str, str],
        directories: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._known = list(known)
        self._directories = directories
        self._environ = dict(os.environ)
        self._expected = {**self._environ, **expected}
        self._process = os.getpid()  # a fork of it writes nothing
        self._clock = clock
        self._written = clock()
        self._candidates: dict[str, None] = {}  # in their order
        self._families: dict[str, bool] = {}  # whether the package may be recorded

    def find_spec(self, name: str, *_: object) -> None:
        """Called by Python for each module that it is about to import."""
        family = name.partition(".")[0]
        if family not in FAMILIES:
            return
        if family not in self._families:
            self._families[family] = self._has_usual_environment()
        if self._families[family] and len(self._candidates) < _MAX_NAMES:
            self._candidates[name] = None
            if self._clock() - self._written >= _PAUSE:
                self.write()

    def _has_usual_environment(self) -> bool:
        """True if no variable has changed that the zygote did not set as well."""
        names = {*os.environ, *self._environ}
        changed = [name for name in names if os.environ.get(name) != self._environ.get(name)]
        return all(os.environ.get(name) == self._expected.get(name) for name in changed)

    def write(self) -> None:
        """Write the names down, if there are new ones."""
        if os.getpid() != self._process:
            return
        self._written = self._clock()
        new = [name for name in list(self._candidates) if name not in self._known and _is_complete(name)]
        if new:
            names = [*self._known, *new][:_MAX_NAMES]
            families = {name.partition(".")[0] for name in names}
            packages = {family: _identify(family, self._directories) for family in families}
            known = {family: identity for family, identity in packages.items() if identity}
            ImportRecord(
                sys.version, known, [name for name in names if name.partition(".")[0] in known]
            ).write(self._path)


def start_recording(path: str, known: Sequence[str], expected: Mapping[str, str]) -> None:
    """Note what this worker imports from now on, until its end. Arguments are those of `ImportRecorder`."""
    recorder = ImportRecorder(path, known, expected, installed_in())
    sys.meta_path.insert(0, recorder)
    atexit.register(recorder.write)


def import_recorded(path: str) -> list[str] | None:
    """Import what the record at `path` names, and return the names; None if forks would not be safe after it."""
    record = ImportRecord.read(path)
    names = record.valid_names(installed_in())
    if names and record.is_safe is None:
        record = record._replace(is_safe=is_fork_safe(lambda: _import(names)))
        record.write(path)
    if names and not record.is_safe:
        return None
    _import(names)
    return names


def _import(names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # the script may handle it
            continue


def installed_in() -> list[str]:
    """The directories of installed packages."""
    return [*site.getsitepackages(), *([site.USER_SITE] if site.USER_SITE else [])]


def _is_complete(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.name == name and not getattr(spec, "_initializing", False)


def _identify(family: str, directories: Sequence[str]) -> list[Any] | None:
    """What changes when the package is installed anew; None if it is not an installed one."""
    try:
        spec = importlib.util.find_spec(family)
        origin = None if spec is None else spec.origin
        if origin is None or not any(origin.startswith(f"{place}/{family}/") for place in directories):
            return None
        status = os.stat(origin)  # noqa: PTH116
    except (OSError, ValueError, ImportError):
        return None
    return [origin, status.st_size, status.st_mtime_ns]
