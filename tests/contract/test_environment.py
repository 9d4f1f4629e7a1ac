"""The environment of a worker: documented, set by `launch`, and read by shardckpt."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.clock import ANCHOR
from launcher.config.command import Command, Kind
from launcher.config.job import Config
from shardckpt import environment
from shardckpt.environment import JobEnvironment
from shardckpt.run.lease import Holder, job_names
from tests.kit.contract import section, table, worker_environments

UNLESS_A_DEVICE_IS_LEFT_OUT = {"CUDA_VISIBLE_DEVICES"}


def test_launch_sets_what_the_document_names(tmp_path: Path) -> None:
    """And the document names every LAUNCH_ variable that it sets."""
    documented = set(re.findall(r"`([A-Z][A-Z_]{3,})`", section("Environment")))
    for worker in worker_environments(tmp_path):
        assert documented - UNLESS_A_DEVICE_IS_LEFT_OUT == set(worker)
        assert {name for name in worker if name.startswith("LAUNCH_")} == set(table("Environment")) - {
            "variable"
        }


def test_paths_are_absolute(tmp_path: Path) -> None:
    """As the document says; the rank's directory and progress file are below the run directory."""
    (worker, _) = worker_environments(tmp_path)
    run_dir = Path(worker["LAUNCH_RUN_DIR"])
    assert run_dir.is_absolute()
    assert Path(worker["LAUNCH_RANK_DIR"]) == run_dir / "ranks/rank-00000"
    assert Path(worker["LAUNCH_PROGRESS_FILE"]) == run_dir / "ranks/rank-00000/progress"
    assert Path(worker["LAUNCH_DRAIN_FILE"]).is_absolute()


def test_shardckpt_reads_what_launch_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Command(Kind.SCRIPT, __file__)
    config = Config(
        command=command, nproc=2, run_dir=tmp_path, ckpt="s3://bucket/run", drain_timeout=1234.5
    )
    for rank, worker in enumerate(worker_environments(tmp_path, config=config)):
        for name, value in worker.items():
            monkeypatch.setenv(name, value)
        assert environment.checkpoint_url() == config.checkpoints
        assert environment.saver_address() == "launch-saver-1"
        assert environment.progress_path() == str(tmp_path / f"ranks/rank-{rank:05d}/progress")
        assert environment.drain_path() == str(tmp_path / "drain")
        assert environment.drain_timeout() == config.drain_timeout
        assert environment.clock_offset() == ANCHOR
        assert environment.local_world_size() == 2
        assert environment.is_first_on_node() == (rank == 0)
        assert environment.has_one_node()


def holder(run_dir: Path, saver: str, rendezvous_id: str | None = None) -> Holder:
    """The first worker of a `launch` as the holder of an attempt's lease."""
    command = Command(Kind.SCRIPT, __file__)
    config = Config(command=command, run_dir=run_dir, rdzv_id=rendezvous_id)
    (worker,) = worker_environments(run_dir, saver=saver, config=config)
    return Holder(job_names(JobEnvironment.read(worker)))


def test_a_job_that_is_started_again_is_the_same_job(tmp_path: Path) -> None:
    """By its run directory: another `launch` has another saver."""
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    first, again = holder(tmp_path / "run", "saver-1"), holder(tmp_path / "run", "saver-2")
    assert first.is_same_job(again)
    assert not first.is_same_job(holder(tmp_path / "other", "saver-3"))


def test_nodes_with_run_directories_of_their_own_are_one_job(tmp_path: Path) -> None:
    """By the rendezvous id, where all have a run directory of the same path: those are on other machines here."""
    node, other = holder(tmp_path / "run", "saver-1", "job-7"), holder(tmp_path / "run", "saver-2", "job-7")
    (tmp_path / "run").mkdir()
    assert node.is_same_job(other)
    assert not node.is_same_job(holder(tmp_path / "run", "saver-3", "job-8"))


def test_the_default_rendezvous_id_is_no_job(tmp_path: Path) -> None:
    """It is the same for all jobs."""
    command = Command(Kind.SCRIPT, __file__)
    config = Config(
        command=command, run_dir=tmp_path / "run", nnodes=(2, 2), rdzv_endpoint=("localhost", 1)
    )
    (worker,) = worker_environments(tmp_path / "run", config=config)
    names = job_names(replace(JobEnvironment.read(worker), saver=""))
    assert not any(name.startswith("rendezvous") for name in names)
