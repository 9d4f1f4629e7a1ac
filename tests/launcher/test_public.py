"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

import launcher

PUBLIC = ["Command", "Config", "ExitCode", "Kind", "LaunchError", "report", "run"]


def test_public_names() -> None:
    assert sorted(launcher.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(launcher, name).__name__ == name
        assert find_spec(f"launcher.{name}") is None, "a module, once imported, would take the name"
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = launcher.nope


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import launcher", ["torch", "launcher.config.job", "dataclasses"]),
        ("import launcher; launcher.report", ["torch", "launcher.config.job"]),
        (
            "import launcher.agent.agent, launcher.cli",
            ["torch", "numpy", "rich", "yaml", "argparse", "tempfile"],
        ),
    ],
)
def test_imports_stay_light(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_needs_nothing(option: str) -> None:
    """Also with other options before it; nothing after the script's name is the launcher's."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--nproc", "2", option],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("launch " if option == "--version" else "usage: launch")
    assert done.stderr == ""
