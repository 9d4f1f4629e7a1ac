"""The command of the workers: a script, a module, or any other program."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from launcher.errors import ExitCode, NotFoundError, UsageError

__all__ = ["Command", "Kind", "module_is_missing"]


class Kind(Enum):
    SCRIPT = "script"
    MODULE = "module"
    PROGRAM = "program"


@dataclass(frozen=True)
class Command:
    """A script (`python target args…`), a module (`python -m target args…`) or a program (`target args…`).

    Raises `UsageError` on construction if the target does not exist or cannot be run.
    """

    kind: Kind
    target: str
    args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        {
            Kind.SCRIPT: _check_script,
            Kind.MODULE: _check_module,
            Kind.PROGRAM: _check_program,
        }[self.kind](self.target)

    @property
    def argv(self) -> list[str]:
        """The worker's command line. Python runs unbuffered, as it does under torchrun."""
        if self.kind is Kind.PROGRAM:
            return [self.target, *self.args]
        module = ["-m"] if self.kind is Kind.MODULE else []
        return [sys.executable, "-u", *module, self.target, *self.args]

    @property
    def name(self) -> str:
        """Short name for the default run directory."""
        return self.target if self.kind is Kind.MODULE else Path(self.target).stem

    @property
    def import_dir(self) -> str:
        """The directory that Python puts at `sys.path[0]`."""
        if self.kind is Kind.MODULE:
            return str(Path.cwd())
        path = Path(self.target).resolve()
        return str(path if path.is_dir() else path.parent)

    @property
    def names_checkpointer(self) -> bool:
        """True if the script's text contains `Checkpointer`: it is then expected to answer drain requests."""
        try:
            return self.source is not None and b"Checkpointer" in Path(self.source).read_bytes()
        except OSError:
            return False

    @property
    def source(self) -> str | None:
        """The Python file that is run, as far as it is known without importing anything; None for a program."""
        path = Path(self.import_dir, *self.target.split("."))
        if self.kind is Kind.SCRIPT:
            path = Path(self.target).resolve()
        candidates = (path, path.with_suffix(".py"), path / "__main__.py")
        is_python = self.kind is not Kind.PROGRAM
        return next((str(file) for file in candidates if is_python and file.is_file()), None)


def _check_script(target: str) -> None:
    path = Path(target)
    try:
        path.stat()
    except PermissionError:
        raise UsageError(f"script {target} cannot be read: check the permissions of its folders") from None
    except (FileNotFoundError, NotADirectoryError):
        pass  # reported below
    except OSError as error:
        raise UsageError(f"script {target} cannot be read: {error.strerror}") from None
    if path.is_dir():
        if not (path / "__main__.py").exists():
            raise UsageError(
                f"{target} is a directory without __main__.py: give the path of a Python script"
            )
    elif not path.exists():
        raise UsageError(
            f"script {target} does not exist (current directory: {Path.cwd()}): "
            f"give the path of a Python script, `-m module`, or `-- command`"
        )
    elif not os.access(path, os.R_OK):
        raise UsageError(f"script {target} cannot be read: check its permissions")


def _check_module(target: str) -> None:
    here = str(Path.cwd())
    if module_is_missing(target, here):
        raise UsageError(
            f"-m {target}: no such module on the path that starts with {here}: "
            f"check the name, install it, or change to the directory that contains it"
        )
    if _is_package(target, here) and module_is_missing(f"{target}.__main__", here):
        raise UsageError(f"-m {target}: {target} is a package without __main__: name a module of it")


def _check_program(target: str) -> None:
    folders = [""] if os.sep in target else os.get_exec_path()
    # PATH may name other users' folders, for which Path.is_file raises.
    existing = [path for folder in folders if os.path.isfile(path := Path(folder, target))]  # noqa: PTH113
    if not existing:
        hint = "a Python script goes without --" if target.endswith(".py") else "check it and PATH"
        raise NotFoundError(f"command {target} not found: {hint}")
    if not any(os.access(path, os.X_OK) for path in existing):
        error = UsageError(f"command {existing[0]} is not executable: chmod +x it")
        error.exit_code = ExitCode.NOT_EXECUTABLE
        raise error


def module_is_missing(name: str, first_dir: str) -> bool:
    """True if `import name` is sure to fail with `first_dir` at the front of the path.

    Imports nothing, not even parent packages.
    """
    return _find(name, first_dir) is None


def _is_package(name: str, first_dir: str) -> bool:
    spec = _find(name, first_dir)
    return spec is not None and spec.submodule_search_locations is not None


def _find(name: str, first_dir: str) -> ModuleSpec | None:
    """The spec of a module, or that of its parent package if only importing that would find the module."""
    first, *rest = name.split(".")
    spec = PathFinder.find_spec(first, [first_dir, *sys.path])
    for finder in sys.meta_path:
        spec = spec or finder.find_spec(first, None)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        if spec.origin and "__path__" in Path(spec.origin).read_text(errors="replace"):
            return spec  # it computes where its submodules are
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec
