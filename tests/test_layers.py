"""The architecture, held: imports go down only, and public names are the documented ones."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    "shardckpt": [
        [
            "errors",
            "dtypes",
            "garbage",
            "kinds",
            "overrides",
            "pages",
            "progress",
            "references",
            "version",
            "wrapped",
        ],
        ["boundary", "box", "records", "values", "storage", "ranks", "zarr_dtypes"],
        ["manifest", "conform", "calls", "waiting"],
        ["plan", "reads", "zarr_view", "foreign", "draining", "lease"],
        ["runs", "local", "sharing"],
        ["packs", "subclasses", "attempts", "objects", "overlaps"],
        ["memo", "fetch", "staging"],
        ["state"],
        ["targets", "replicas", "writer", "reader", "commit", "retention", "keeper"],
        ["module_targets", "optimizer_targets"],
        ["unflatten"],
        ["persisting"],
        ["saver"],
        ["handle"],
        ["sinks", "recall", "unsaved", "settings"],
        ["saving", "loading", "checkpoint", "transfer", "streaming", "safetensors_file", "torch_file"],
        ["restoring", "claiming", "export", "resharding"],
        ["checkpointer"],
        ["cli"],
        ["__init__", "__main__"],
    ],
    "launcher": [
        [
            *["errors", "events", "processes", "progress", "devices", "logs", "foresight", "outcome"],
            *[
                "wording",
                "gpus",
                "condition",
                "tracebacks",
                "journal",
                "terminal",
                "companion",
                "repeats",
                "clock",
                "slots",
                "preemption",
                "team",
            ],
        ],
        [
            *[
                "frames",
                "hints",
                "oom",
                "parsers",
                "nodes",
                "command",
                "rendezvous",
                "run_dir",
                "spawner",
                "saver",
            ],
            *["control", "recovery", "secret", "status", "stillness", "left_behind"],
        ],
        ["options", "diagnosis", "same_again", "stacks", "membership", "metrics"],
        ["member", "config", "schedulers", "backlog", "round"],
        ["restart", "console"],
        ["worker", "workers", "teller"],
        ["zygote"],
        ["monitor"],
        ["agent"],
        ["__init__", "hook"],
        ["cli"],
        ["__main__"],
    ],
}
"""Each package's modules, the lowest layer first. A module imports from layers below its own."""

SHARED = ["cgroup_memory"]
"""Modules below both packages: what Linux says, for both the same."""


def modules(package: str) -> dict[str, list[Path]]:
    """Top-level module or folder name -> its files."""
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


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_a_layer(package: str) -> None:
    """A new module must be given its place."""
    placed = {name for layer in LAYERS[package] for name in layer}
    assert set(modules(package)) == placed


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_down_only(package: str) -> None:
    """No module imports one of its own layer or above, except inside its own folder."""
    level = {name: number for number, layer in enumerate(LAYERS[package]) for name in layer}
    upward = []
    for name, paths in modules(package).items():
        for path in paths:
            for target in imported(path):
                parts = target.split(".")
                if parts[0] != package or len(parts) < 2 or parts[1] not in level or parts[1] == name:
                    continue
                if level[parts[1]] >= level[name] and name != "__init__":
                    upward.append(f"{name} -> {parts[1]}")
    assert not upward


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
