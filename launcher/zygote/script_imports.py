"""Find in a script's source what it will import and which variables it sets first, without running any of it.

A module that the zygote has imported costs the workers nothing, in any round: with 8 workers on 2 cores,
`torch.distributed.fsdp` alone takes seconds. Only torch, NumPy and shardckpt are imported ahead, because their
import has no effect that a script could notice.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

__all__ = ["find_imports", "find_variables", "import_all"]

_FAMILIES = ("torch", "numpy", "shardckpt")
_MAX_FILES = 64


def find_imports(script: Path, import_dir: Path) -> list[str]:
    """Dotted names in torch, NumPy and shardckpt that the script uses, sorted: modules, or attributes of modules.

    Modules that it imports from files below `import_dir` are read too. Files that cannot be read or parsed are
    skipped: their error belongs to the worker.
    """
    names: set[str] = set()
    seen: set[Path] = set()
    waiting = [script]
    while waiting and len(seen) < _MAX_FILES:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        tree = _parse(path)
        known: dict[str, str] = {}
        for alias, name in _imports(tree, path, import_dir):
            if name.partition(".")[0] in _FAMILIES:
                names.add(name)
                known[alias] = name
            else:
                waiting += _files(name, import_dir)
        names.update(_uses(tree, known))
    return sorted(names)


def find_variables(script: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that the script sets before it imports anything beyond the standard library.

    Libraries read such variables when they are imported. Only constant texts that are set unconditionally are
    found.
    """
    changed: dict[str, str] = {}
    for statement in _parse(script).body:
        if _imports_a_library(statement):
            break
        for name, value, keeps in _settings(statement):
            match name, value:
                case ast.Constant(str(key)), _ if keeps and key in {**environ, **changed}:
                    pass
                case ast.Constant(str(key)), ast.Constant(str(text)):
                    changed[key] = text
                case ast.Constant(str(key)), _:
                    changed.pop(key, None)
    return changed


def import_all(names: Iterable[str]) -> None:
    """Import what `find_imports` has found. Names that cannot be imported are skipped."""
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
        except Exception:  # the script may handle it
            continue
    if any(name.startswith("torch.optim") for name in names):
        # The constructor of an optimizer imports it, which takes half a second.
        importlib.import_module("torch._dynamo")


def _parse(path: Path) -> ast.Module:
    """The syntax tree; empty if the file cannot be read or parsed."""
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def _imports_a_library(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    for node in ast.walk(statement):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["." if node.level else node.module or ""]
        if any(name.partition(".")[0] not in sys.stdlib_module_names for name in names):
            return True
    return False


def _settings(statement: ast.stmt) -> Iterator[tuple[ast.expr | None, ast.expr, bool]]:
    """Each variable that the statement sets: name, value, and True if an existing value is kept."""
    match statement:
        case ast.Assign([ast.Subscript(place, name)], value) if _is_environ(place):
            yield name, value, False
        case ast.Expr(ast.Call(ast.Attribute(place, "setdefault"), [name, value])) if _is_environ(place):
            yield name, value, True
        case ast.Expr(ast.Call(ast.Attribute(place, "update"), args, keywords)) if _is_environ(place):
            for given in args:
                if isinstance(given, ast.Dict):
                    yield from zip(given.keys, given.values, [False] * len(given.keys), strict=True)
            for keyword in keywords:
                yield ast.Constant(keyword.arg), keyword.value, False


def _is_environ(place: ast.expr) -> bool:
    return ast.unparse(place) in ("os.environ", "environ")


def _imports(tree: ast.Module, path: Path, import_dir: Path) -> Iterator[tuple[str, str]]:
    """The unconditional imports of a module: the name that it binds, and the dotted name."""
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
    """Dotted names that the module uses through its imports, as `torch.optim.AdamW`."""
    for node in ast.walk(tree):
        parts: list[str] = []
        held: ast.expr | ast.AST = node
        while isinstance(held, ast.Attribute):
            parts.append(held.attr)
            held = held.value
        if parts and isinstance(held, ast.Name) and held.id in known:
            yield ".".join([known[held.id], *reversed(parts)])


def _files(name: str, import_dir: Path) -> list[Path]:
    """The files below `import_dir` that an import of `name` reads."""
    found = []
    for depth in range(len(name.split("."))):
        base = import_dir.joinpath(*name.split(".")[: depth + 1])
        found += [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return found
