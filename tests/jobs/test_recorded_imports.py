"""What workers have imported from well-known packages is imported by the zygotes that come later."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.job import FAKES, Job

WORKER = """
    import os, runpy
    open("worker.txt", "a").write(f"{os.getpid()}\\n")
    runpy.run_path("inner.txt")
    """
SAYS_SO = "import os; open('imported.txt', 'a').write(f'{os.getpid()}\\n')\n"


class RecordingJob(Job):
    """A job that finds a stand-in for a well-known package among the installed ones."""

    def __init__(self, path: Path, package: str) -> None:
        super().__init__(path)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        installed = path / "user" / "lib" / version / "site-packages"
        self.package = installed / "torchmetrics"
        self.package.mkdir(parents=True)
        (self.package / "__init__.py").write_text(package)
        self.environment["PYTHONUSERBASE"] = str(path / "user")
        self.environment["PYTHONPATH"] = f"{FAKES}:{installed}"
        self.script(WORKER)
        self.script("import torchmetrics", "inner.txt")

    def pids(self, name: str) -> list[str]:
        path = self.path / name
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def run_and_ask(self, *options: str) -> tuple[list[str], list[str]]:
        """Which processes have imported the package, and which were workers."""
        assert self.run(*options, "--nproc", "2", "train.py").code == 0
        return self.pids("imported.txt"), self.pids("worker.txt")

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "runs/train/imports.json").read_text())
        return found


@pytest.fixture
def job_with(tmp_path: Path) -> Iterator[Any]:
    jobs = []

    def make(package: str) -> RecordingJob:
        jobs.append(RecordingJob(tmp_path, package))
        return jobs[-1]

    yield make
    for job in jobs:
        job.kill_left_over()


def test_the_zygote_imports_what_workers_had_imported(job_with: Any) -> None:
    """Tried once in a fork; not with --cold, nor after the package has changed."""
    job = job_with(SAYS_SO)
    imported, workers = job.run_and_ask("--cold")
    assert sorted(imported) == sorted(workers)
    assert not (job.path / "runs/train/imports.json").exists()
    imported, workers = job.run_and_ask()
    assert sorted(imported) == sorted(workers)
    assert (job.record()["names"], job.record()["is_safe"]) == (["torchmetrics"], None)
    imported, workers = job.run_and_ask()
    assert len(imported) == 2
    assert not {*imported} & {*workers}
    assert job.record()["is_safe"] is True
    imported, workers = job.run_and_ask()
    assert len(imported) == 1
    assert not {*imported} & {*workers}
    imported, workers = job.run_and_ask("--cold")
    assert sorted(imported) == sorted(workers)
    (job.package / "__init__.py").write_text(f"# another version\n{SAYS_SO}")
    imported, workers = job.run_and_ask()
    assert sorted(imported) == sorted(workers)


def test_a_package_that_starts_a_thread_is_left_to_the_workers(job_with: Any) -> None:
    job = job_with(
        f"{SAYS_SO}import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    job.run_and_ask()
    imported, workers = job.run_and_ask()
    assert {*workers} < {*imported}
    assert job.record()["is_safe"] is False
    imported, workers = job.run_and_ask()
    assert sorted(imported) == sorted(workers)
    assert job.record()["is_safe"] is False


def test_a_package_that_may_have_read_a_variable_is_left_to_the_workers(job_with: Any) -> None:
    """The zygote knows only variables that the script itself sets, to constant texts."""
    job = job_with(SAYS_SO)
    job.script("import os; os.environ['CACHE'] = os.getcwd(); import torchmetrics", "inner.txt")
    job.run_and_ask()
    assert not (job.path / "runs/train/imports.json").exists()
    job.script(f"import os; os.environ['CACHE'] = '/cache'\n{WORKER.replace(' ' * 4, '')}")
    job.script("import torchmetrics", "inner.txt")
    job.run_and_ask()
    assert job.record()["names"] == ["torchmetrics"]
