"""The main job with real processes: launch, train, save, crash, resume on another number of ranks."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.kit.launching import ROOT, launched, losses, run, samples, steps_done, wait_until, workers

TRAIN = ROOT / "scripts/train.py"
SMALL = ("--dim", 32, "--layers", 1, "--context", 32, "--batch", 24)
SAMPLES = 400  # in an epoch; 24 divides neither it nor the steps


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of exactly SAMPLES windows."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "epsilon"], k=4000)
    (folder / "words.txt").write_text(" ".join(words)[: SAMPLES * 32 + 1])
    return folder


def job(text: Path, run_dir: Path, ranks: int, steps: int) -> tuple[object, ...]:
    """The arguments of `launch` for a small run."""
    launch = ("--nproc", ranks, "--run-dir", run_dir, "--max-restarts", 1, TRAIN)
    return (*launch, "--data", text, "--steps", steps, "--every", 5, "--trace", run_dir / "trace", *SMALL)


@pytest.mark.timeout(600)
def test_crash_and_resume_on_other_world_sizes(text: Path, tmp_path: Path) -> None:
    """A kill -9 leaves no trace in the losses, bit for bit; other world sizes none beyond rounding.

    And through all of that every sample is used exactly once per epoch.
    """
    calm, rough, alone = tmp_path / "calm", tmp_path / "rough", tmp_path / "alone"
    run(*job(text, calm, ranks=8, steps=17), folder=tmp_path)

    victim, at_step = random.randrange(8), random.randrange(6, 14)
    with launched(*job(text, rough, ranks=8, steps=17), folder=tmp_path) as running:
        wait_until(lambda: steps_done(rough) >= at_step, running)
        os.kill(workers(running)[victim], signal.SIGKILL)
        assert running.wait(150) == 0, (tmp_path / "terminal.txt").read_text()
    assert (rough / "logs/round-0002").is_dir(), "no restart took place"
    assert losses(rough / "trace") == losses(calm / "trace"), f"rank {victim}, step {at_step}"

    for ranks, steps in ((6, 20), (4, 23), (1, 26), (12, 29)):
        run(*job(text, rough, ranks, steps), folder=tmp_path)
    run(*job(text, alone, ranks=1, steps=29), folder=tmp_path)
    expected, found = losses(alone / "trace"), losses(rough / "trace")
    assert found.keys() == expected.keys() == set(range(1, 30))
    np.testing.assert_allclose(
        [found[step] for step in sorted(found)], [expected[step] for step in sorted(found)], rtol=2e-5
    )

    order = samples(rough / "trace")
    assert order == samples(alone / "trace")
    assert len(order) == 29 * 24 > SAMPLES
    assert sorted(order[:SAMPLES]) == list(range(SAMPLES))
    assert len(set(order[SAMPLES:])) == len(order) - SAMPLES


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", "tp"])
def test_parallel_kinds_resume_as_each_other(text: Path, tmp_path: Path, kind: str) -> None:
    """A run that was replicated, or split within layers, goes on sharded, as if it always had been."""
    mixed, alone = tmp_path / "mixed", tmp_path / "alone"
    run(*job(text, mixed, ranks=2, steps=10), "--parallel", kind, folder=tmp_path)
    run(*job(text, mixed, ranks=3, steps=14), "--parallel", "fsdp", folder=tmp_path)
    run(*job(text, alone, ranks=1, steps=14), folder=tmp_path)
    expected, found = losses(alone / "trace"), losses(mixed / "trace")
    np.testing.assert_allclose(
        [found[step] for step in sorted(found)], [expected[step] for step in sorted(expected)], rtol=2e-5
    )
