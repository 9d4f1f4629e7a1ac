"""What a script is going to import, read off its source without running any of it.

Workers that find a module imported by the zygote save its import, once each and in every round: with 8
workers on 2 cores `torch.distributed.fsdp` alone is seconds. Only torch, NumPy and shardckpt are looked
at, because importing these has no effect that a script could notice.
"""

from __future__ import annotations

import ast
import importlib
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["bring", "foresee"]

_FAMILIES = ("torch", "numpy", "shardckpt")
_MOST_FILES = 64


def foresee(script: Path, import_dir: Path) -> list[str]:
    """Dotted names of torch, NumPy and shardckpt that the script uses, sorted; modules, or things in them.

    Modules that it imports from files below `import_dir` are read too. What cannot be read or parsed is
    passed over: it will fail in the worker, in the right place.
    """
    names: set[str] = set()
    seen: set[Path] = set()
    waiting = [script]
    while waiting and len(seen) < _MOST_FILES:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        known: dict[str, str] = {}
        for alias, name in _imports(tree, path, import_dir):
            if name.partition(".")[0] in _FAMILIES:
                names.add(name)
                known[alias] = name
            else:
                waiting += _files(name, import_dir)
        names.update(_uses(tree, known))
    return sorted(names)


def bring(names: Iterable[str]) -> None:
    """Import what `foresee` found. What does not exist is passed over."""
    for name in names:
        first, *rest = name.split(".")
        place = first
        try:
            held: object = importlib.import_module(first)
            for part in rest:
                place = f"{place}.{part}"
                held = getattr(held, part, None) or importlib.import_module(place)
                if not isinstance(held, types.ModuleType):
                    break
        except Exception:  # a script may import what is not there, and handle it
            continue
    if any(name.startswith("torch.optim") for name in names):
        # What an optimizer's constructor imports. Half a second.
        importlib.import_module("torch._dynamo")


def _imports(tree: ast.Module, path: Path, import_dir: Path) -> Iterator[tuple[str, str]]:
    """(name that the module knows it by, dotted name) of its unconditional imports."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.partition(".")[0],
                    (alias.name if alias.asname else alias.name.partition(".")[0]),
                )
                yield "", alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                try:
                    package = path.parents[node.level - 1].relative_to(import_dir).parts
                except (ValueError, IndexError):
                    continue
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                yield alias.asname or alias.name, f"{base}.{alias.name}" if base else alias.name


def _uses(tree: ast.Module, known: dict[str, str]) -> Iterator[str]:
    """Dotted names that the module reaches through what it has imported, as in `torch.optim.AdamW`."""
    for node in ast.walk(tree):
        parts: list[str] = []
        held: ast.expr | ast.AST = node
        while isinstance(held, ast.Attribute):
            parts.append(held.attr)
            held = held.value
        if parts and isinstance(held, ast.Name) and held.id in known:
            yield ".".join([known[held.id], *reversed(parts)])


def _files(name: str, import_dir: Path) -> list[Path]:
    """The files below `import_dir` that importing `name` reads."""
    found = []
    for depth in range(len(name.split("."))):
        base = import_dir.joinpath(*name.split(".")[: depth + 1])
        found += [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return found
