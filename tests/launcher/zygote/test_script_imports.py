"""What a script will import is seen in its source, and nothing of the script is run for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.zygote.script_imports import find_imports, find_variables


def write(folder: Path, files: dict[str, str]) -> Path:
    """A script `main.py` and its neighbours, by their names without `.py`."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "main.py"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed.fsdp", "torch.distributed.fsdp"),
        ("import torch.nn as nn\nnn.Linear", "torch.nn.Linear"),
        ("from torch.distributed.fsdp import fully_shard as f", "torch.distributed.fsdp.fully_shard"),
        ("import torch\ndef main():\n    torch.optim.AdamW([])", "torch.optim.AdamW"),
        ("import shardckpt\nshardckpt.Checkpointer()", "shardckpt.Checkpointer"),
    ],
)
def test_it_sees_imports_and_what_is_reached_through_them(
    tmp_path: Path, source: str, expected: str
) -> None:
    """In every spelling, also where the use is inside a function."""
    assert expected in find_imports(write(tmp_path, {"main": source}), tmp_path)


def test_it_follows_the_project_s_own_modules(tmp_path: Path) -> None:
    """Absolute and relative, also in a circle; modules from elsewhere are not looked at."""
    script = write(
        tmp_path,
        {
            "main": "import model\nimport pkg.deep\nimport json",
            "model": "import torch.nn.utils\nimport main",
            "pkg/__init__": "",
            "pkg/deep": "from . import other",
            "pkg/other": "from torch import special",
        },
    )
    found = find_imports(script, tmp_path)
    assert {"torch.nn.utils", "torch.special"} <= set(found)
    assert not any(name.startswith("json") for name in found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos.environ['A'] = 'x'\nimport torch", {"A": "x"}),
        ("from os import environ\nenviron['A'] = 'x'", {"A": "x"}),
        ("import os\nos.environ.update({'A': 'x'}, B='y')", {"A": "x", "B": "y"}),
        ("import os\nos.environ.setdefault('A', 'x')\nos.environ.setdefault('HAD', 'x')", {"A": "x"}),
        ("import os\ndef late():\n    import torch\nos.environ['A'] = 'x'", {"A": "x"}),
        ("import os, torch\nos.environ['A'] = 'x'", {}),
        ("import os\nfrom . import model\nos.environ['A'] = 'x'", {}),
        ("import os\nif True:\n    import numpy\nos.environ['A'] = 'x'", {}),
        ("import os\nif os.cpu_count() > 4:\n    os.environ['A'] = 'x'", {}),
        ("import os\nos.environ['A'] = 'x'\nos.environ['A'] = str(os.cpu_count())", {}),
        (
            "settings['A'] = 'x'\nos.environ[name] = 'x'\nos.environ.pop('HAD')\nos.environ.update(**more)",
            {},
        ),
    ],
)
def test_it_sees_variables_that_are_set_before_libraries_are_imported(
    tmp_path: Path, source: str, expected: dict[str, str]
) -> None:
    assert find_variables(write(tmp_path, {"main": source}), {"HAD": "it"}) == expected


@pytest.mark.parametrize("source", ["def broken(", "\0", "import torch.nowhere\nfrom torch import nothing"])
def test_what_is_wrong_is_left_to_the_worker(tmp_path: Path, source: str) -> None:
    """A script with mistakes is neither run nor reported here."""
    assert find_variables(write(tmp_path, {"main": source}), {}) == {}
    code = (
        "import sys\nfrom pathlib import Path\nfrom launcher.zygote.script_imports import *\n"
        f"import_all(find_imports(Path({str(tmp_path / 'main.py')!r}), Path({str(tmp_path)!r})))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_conditional_imports_are_not_brought(tmp_path: Path) -> None:
    """Only what the script is sure to import is imported ahead of it."""
    script = write(tmp_path, {"main": "def f():\n    import torch.onnx\nif 0:\n    import torch.package"})
    assert find_imports(script, tmp_path) == []
