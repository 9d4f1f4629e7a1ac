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


def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path: Path) -> None:
    command = [
        sys.executable,
        BENCH / "gpu",
        "--device=cpu",
        "--gb=0.01",
        "--seconds=0.1",
        f"--dir={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for row in (
        "second save: stall",
        "training while saving",
        "restore from memory",
        "load from disk on 2 ranks",
        "kill -9 to the first all-reduce",
        "its restore from memory",
    ):
        assert row in done.stdout
    assert not list(tmp_path.iterdir())
