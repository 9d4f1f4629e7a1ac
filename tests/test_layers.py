"""The architecture, held: imports go down only, and public names are the documented ones."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    "shardckpt": [
        ["errors", "environment", "formatting", "huge_pages", "memory", "version"],
        ["format", "progress", "storage"],
        ["ranks"],
        ["drain", "run", "state"],
        ["saver"],
        ["loading", "saving"],
        ["checkpointer"],
        ["interop"],
        ["cli"],
        ["__init__", "__main__"],
    ],
    "launcher": [
        ["clock", "errors", "events", "formatting", "progress"],
        ["run_dir", "system"],
        ["config", "diagnosis", "rendezvous"],
        ["round", "zygote"],
        ["reporting"],
        ["agent"],
        ["__init__"],
        ["cli"],
        ["__main__"],
    ],
}
"""The rooms (folders and modules) of each package, the lowest layer first. A room imports from lower layers."""

TORCH = {
    "shardckpt": [
        *["state/", "ranks/world", "saving/staging", "saving/replica_check", "loading/fill"],
        "interop/formats/torch_pickle",
    ],
    "launcher": ["rendezvous/member/"],
}
"""Where torch may be imported."""

SHARED = ["cgroup_memory"]
"""Modules below both packages: what Linux says, for both the same."""


def modules(package: str) -> dict[str, list[Path]]:
    """Room -> its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        found.setdefault(name, []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Every absolute module name that the file imports, local imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_a_layer(package: str) -> None:
    """A new room must be given its place."""
    placed = {name for layer in LAYERS[package] for name in layer}
    assert set(modules(package)) == placed


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_down_only(package: str) -> None:
    """No room imports one of its own layer or above."""
    level = {name: number for number, layer in enumerate(LAYERS[package]) for name in layer}
    upward = []
    for name, paths in modules(package).items():
        for path in paths:
            for target in imported(path):
                parts = target.split(".")
                if parts[0] != package or len(parts) < 2 or parts[1] not in level or parts[1] == name:
                    continue
                if level[parts[1]] >= level[name] and name != "__init__":
                    upward.append(f"{path.relative_to(ROOT)} -> {parts[1]}")
    assert not upward


@pytest.mark.parametrize("package", LAYERS)
def test_no_circles_inside_a_room(package: str) -> None:
    """The files of a room can be put in an order in which each imports only earlier ones."""
    known = {name_of(path): path for paths in modules(package).values() for path in paths}
    graph = {name: (imported(path) & known.keys()) - {name, package} for name, path in known.items()}
    graph = {
        name: {target for target in targets if not name.startswith(f"{target}.")}
        for name, targets in graph.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", LAYERS)
def test_a_folder_says_what_it_is_for(package: str) -> None:
    """In its `__init__`, which imports nothing: to import one module is not to import its neighbours."""
    for init in (ROOT / package).rglob("*/__init__.py"):
        lines = ast.parse(init.read_text()).body
        assert ast.get_docstring(ast.parse(init.read_text())), init
        is_small_interface = init.parent.name in ("storage", "cli")
        assert is_small_interface or not any(isinstance(n, ast.Import | ast.ImportFrom) for n in lines), (
            init
        )


@pytest.mark.parametrize("package", LAYERS)
def test_torch_is_imported_in_few_places(package: str) -> None:
    """Commands, the agent and the saver start without it."""
    for path in (ROOT / package).rglob("*.py"):
        inside = str(path.relative_to(ROOT / package).with_suffix(""))
        if not inside.startswith(tuple(TORCH[package])):
            assert not any(name.split(".")[0] == "torch" for name in imported(path)), path


@pytest.mark.parametrize("package", LAYERS)
def test_no_folder_takes_a_public_name(package: str) -> None:
    """Importing `shardckpt.load` as a module would replace the function."""
    public = set(importlib.import_module(package).__all__)
    assert not public & {name for name in modules(package) if not name.startswith("__")}


def test_a_checkpoint_comes_into_being_in_one_place() -> None:
    """No other module writes a manifest."""
    writes = re.compile(r"\.(create|write|write_pack|write_pieces)\(\s*MANIFEST\b")
    found = [path for path in (ROOT / "shardckpt").rglob("*.py") if writes.search(path.read_text())]
    assert found == [ROOT / "shardckpt/run/commit.py"]


@pytest.mark.parametrize(("package", "other"), [("shardckpt", "launcher"), ("launcher", "shardckpt")])
def test_packages_do_not_import_each_other(package: str, other: str) -> None:
    """They meet in the worker contract, and nowhere else."""
    for paths in modules(package).values():
        for path in paths:
            assert not any(name.split(".")[0] == other for name in imported(path)), path


@pytest.mark.parametrize("name", SHARED)
def test_what_both_packages_use_stands_on_the_standard_library_alone(name: str) -> None:
    """So that it draws neither package into the other, nor torch into the agent."""
    allowed = {*sys.stdlib_module_names, *SHARED[: SHARED.index(name)]}
    assert {target.split(".")[0] for target in imported(ROOT / f"{name}.py")} <= allowed


def test_the_wheel_has_all_that_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(packed) == sorted([*LAYERS, *(f"{name}.py" for name in SHARED)])
