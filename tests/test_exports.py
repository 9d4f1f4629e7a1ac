"""The public names, pinned: adding or removing one is a decision, and shows up here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
import shardckpt

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = {
    shardckpt: [
        "Checkpoint",
        "Checkpointer",
        "Drained",
        "Loaded",
        "PerRank",
        "SaveHandle",
        "ShardckptError",
        "__version__",
        "copy",
        "load",
        "merge",
        "open",
        "reshard",
        "save",
        "save_async",
    ],
    launcher: ["Command", "Config", "ExitCode", "Kind", "LaunchError", "report", "run"],
}


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_public_names(package: object) -> None:
    """`__all__` is what is documented, and every name in it exists."""
    assert package.__all__ == PUBLIC[package]  # type: ignore[attr-defined,index]
    assert all(getattr(package, name) is not None for name in PUBLIC[package])  # type: ignore[index]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("shardckpt/**/*.py")) + sorted(ROOT.glob("launcher/**/*.py"))
)
def test_every_module_says_what_is_public(path: Path) -> None:
    """Each module has a docstring, and an `__all__` unless nothing in it is meant for others."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    names = {
        t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }
    public = [
        n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    ]
    assert "__all__" in names or not public, f"{path} has public names but no __all__"


@pytest.mark.parametrize(
    ("module", "heavy"), [("shardckpt", "torch"), ("launcher", "torch"), ("launcher", "yaml")]
)
def test_imports_stay_light(module: str, heavy: str) -> None:
    """Looking into a checkpoint, and the agent, do not wait for torch."""
    code = f"import sys, {module}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
