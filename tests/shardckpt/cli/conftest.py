"""A run to try commands on, and ways to call them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.cli import main
from tests.kit.servers import S3Server
from tests.shardckpt.cli.helpers import Call


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts: steps 50 and 100, then 150, and 200, which was not finished."""
    run = tmp_path_factory.mktemp("made") / "run"
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    state = {"model": model, "sampler": {"position": 0}, "rng": shardckpt.PerRank(torch.arange(3))}
    for steps in ((50, 100), (150,)):
        mgr = shardckpt.Checkpointer(run)
        mgr.restore(state)
        for step in steps:
            state["sampler"] = {"position": step * 10}
            mgr.save(step, state, metrics={"loss": 1 / step}).wait()
        mgr.close()
    (run / "attempt-0002/step-00000200/rank-00000").mkdir(parents=True)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def newest(run: Path) -> Path:
    """The run's newest good checkpoint."""
    return run / "attempt-0002/step-00000150"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process; its exit code, and what it printed."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def s3(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """A URL, and what a command needs to reach it; credentials come from the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto_s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto_s3.options["secret"])
    return moto_s3.url("cli"), ["--endpoint-url", moto_s3.endpoint]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint that takes a while to merge."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    shardckpt.save(folder, {str(i): torch.zeros(8 << 20) for i in range(8)})
    yield folder
    shutil.rmtree(folder)
