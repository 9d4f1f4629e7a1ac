"""The examples in docstrings do what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardckpt.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent

Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def examples() -> Iterator[tuple[str, str, str]]:
    """Each docstring with an example: its module, what it documents, and its text."""
    for package in ("launcher", "shardckpt"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            if ">>> " not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, Documented) and ">>> " in (ast.get_docstring(node) or ""):
                    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                    name = getattr(node, "name", "")
                    yield module.removesuffix(".__init__"), name, ast.get_docstring(node) or ""


@pytest.mark.usefixtures("no_saver")
@pytest.mark.parametrize(
    ("module", "text"),
    [pytest.param(module, text, id=f"{module}:{name}") for module, name, text in examples()],
)
def test_example(module: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example has the names of its module, and finds nothing that another has left."""
    monkeypatch.chdir(tmp_path)
    open_storage("memory://example").delete_tree("")
    names = dict(vars(importlib.import_module(module)))
    example = doctest.DocTestParser().get_doctest(text, names, module, None, 0)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=told.append)
    assert not told, "".join(told)
