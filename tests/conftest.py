"""Fixtures that every test may use. No test leaves this machine's loopback interface."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from shardckpt.saver.client import SaverClient
from shardckpt.storage import Storage, open_storage
from tests.kit import servers
from tests.kit.job import Job
from tests.kit.mounts import InNamespace, Mount, mounted, needs_namespace
from tests.kit.savers import SaverProcess, connected

_numbers = itertools.count()

hypothesis.settings.register_profile("without-deadline", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("without-deadline")


def pytest_configure() -> None:
    """A shell that starts this in the background has it ignore SIGINT, which jobs of the tests would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs to mount is run where that is allowed."""
    items[:] = [InNamespace.of(item) if needs_namespace(item) else item for item in items]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each reason why tests were skipped."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "?"
        for report in terminalreporter.getreports("skipped")
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"SKIPPED {count}: {reason}")


@pytest.fixture
def mounts() -> Iterator[Mount]:
    """Mounts file systems: `mounts(kind, folder, options)`."""
    yield from mounted()


@pytest.fixture
def other_user() -> int:
    """The id of another user, as whom processes can be started."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    return 65534


@pytest.fixture(scope="session", autouse=True)
def _no_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever credentials this machine has for a cloud, the tests and their children have none."""
    nowhere = str(tmp_path_factory.mktemp("aws") / "none")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
            patch.delenv(name.lower(), raising=False)
        patch.setenv("AWS_CONFIG_FILE", nowhere)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", nowhere)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # What is not given an endpoint finds a port that nobody listens on, not a cloud.
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        yield


@pytest.fixture(autouse=True)
def _fresh_clients() -> None:
    """No test gets a client that an earlier one made with other credentials or settings in its environment.

    s3fs keeps its clients by their arguments alone.
    """
    if "s3fs" in sys.modules:
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def moto_s3(_no_cloud: None) -> Iterator[servers.S3Server]:
    """An S3 server with conditional puts: `.url(prefix)` and `.options`."""
    with servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_s3(_no_cloud: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """An S3 server without conditional puts: `.url(prefix)` and `.options`."""
    folder: Path = tmp_path_factory.mktemp("rclone")
    with servers.rclone(folder) as server:
        yield server


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Starts `launch` in a directory of its own, and makes sure that no process is left behind."""
    job = Job(tmp_path)
    try:
        yield job
        assert job.left_over() == []
    finally:
        for process in job.started:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        job.kill_left_over()


@pytest.fixture
def no_saver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process outlives a test: saves are written by the test's own process, unless it asks for a saver."""
    monkeypatch.setenv("SHARDCKPT_SNAPSHOTS", "0")


@pytest.fixture
def place() -> Iterator[Storage]:
    """An empty folder in memory."""
    root = open_storage(f"memory://test-{next(_numbers)}")
    yield root
    root.delete_tree("")


@pytest.fixture
def saver() -> Iterator[SaverProcess]:
    made = SaverProcess(f"shardckpt-test-{os.getpid()}-{os.urandom(6).hex()}")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def client(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[SaverClient]:
    """A trainer of this process."""
    made = connected(saver, monkeypatch)
    yield made
    made.close()
