"""Commands: scripts, modules and programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import parse
from launcher.config.command import Kind
from launcher.errors import NotFoundError, UsageError

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("argv", "kind", "target", "args"),
    [
        (["train.py", "--nproc", "x", "--", "-m"], Kind.SCRIPT, "train.py", 4),
        (["-m", "json.tool", "-m"], Kind.MODULE, "json.tool", 1),
        (["--module", "json.tool"], Kind.MODULE, "json.tool", 0),
        (["--", "ls", "-l"], Kind.PROGRAM, "ls", 1),
        (["--no-python", "ls"], Kind.PROGRAM, "ls", 0),
        (["--run-path", "train.py"], Kind.SCRIPT, "train.py", 0),
    ],
)
def test_commands(argv: list[str], kind: Kind, target: str, args: int) -> None:
    command = parse(argv).command
    assert (command.kind, command.target, len(command.args)) == (kind, target, args)


def test_a_missing_python_script_after_dashes_gets_a_hint() -> None:
    with pytest.raises(NotFoundError, match="a Python script goes without --"):
        parse(["--", "train.py"])


def test_modules_are_found_without_importing_them(folder: Path) -> None:
    (folder / "pkg/sub").mkdir(parents=True)
    (folder / "pkg/__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "pkg/sub/job.py").write_text("")
    assert parse(["-m", "pkg.sub.job"]).command.target == "pkg.sub.job"
    with pytest.raises(UsageError, match="no such module"):
        parse(["-m", "pkg.sub.jib"])
    (folder / "pkg/__init__.py").write_text("__path__ = compute()")
    assert parse(["-m", "pkg.generated"]).command.target == "pkg.generated"
