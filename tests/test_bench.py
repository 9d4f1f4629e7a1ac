"""The benchmarks still fit the code: what they time exists, and each shows its help."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
SCRIPTS = sorted(path.name for path in BENCH.iterdir() if path.is_file() and "." not in path.name)


def test_the_profile_times_functions_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    spans = importlib.import_module("_save.profile").SPANS
    targets = [span.target.split(":") for phase in spans.values() for span in phase]
    assert len(targets) > 20
    for module, attributes in targets:
        reduce(getattr, attributes.split("."), importlib.import_module(module))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_shows_its_help(script: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCH / script, "--help"], capture_output=True, text=True, check=True
    )
    assert f"scripts/bench/{script}" in done.stdout
