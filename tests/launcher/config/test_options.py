"""The table of options."""

from __future__ import annotations

import re
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from launcher.config.options import OPTIONS, find_option

pytestmark = pytest.mark.usefixtures("folder")


def test_every_option_of_torchrun_is_known() -> None:
    """Those of the torch that is installed, read from its source: importing it would take seconds."""
    torch = PathFinder.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    source = (Path(torch.origin).parent / "distributed/run.py").read_text()
    names = re.findall(r'^\s+"--([a-z-]+)",$', source, re.MULTILINE)
    assert len(names) > 25
    for name in names:
        assert find_option(name, "torchrun").torchrun or name in ("logs-specs", "numa-binding")


def test_names_and_helps_are_complete() -> None:
    names = [name for option in OPTIONS for name in (option.name, *option.aliases)]
    assert len(names) == len(set(names))
    assert all(option.help or option.refusal for option in OPTIONS)
