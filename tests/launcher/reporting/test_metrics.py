"""Metrics, scraped over HTTP as Prometheus does."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.errors import BusyError, UsageError
from launcher.reporting.metrics import Metrics
from launcher.reporting.status import Saved, Status


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    metrics = Metrics(0)
    yield metrics
    metrics.close()


def scrape(metrics: Metrics) -> dict[str, float]:
    """Samples by name, with their label's value appended."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        ".".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_is_served(metrics: Metrics) -> None:
    assert scrape(metrics) == {}
    status = Status(
        run="train",
        time=100.0,
        phase="running",
        round=3,
        round_started=50.0,
        world=8,
        restarts=2,
        step=1200,
        rate=3.5,
        loss=0.25,
        saved={"memory": Saved(1200, 99.0), "remote": Saved(1000, 80.0)},
        failures={"crash": 1, "hang": 1},
    )
    metrics.update(status)
    assert scrape(metrics) == {
        "launch_round": 3,
        "launch_ranks": 8,
        "launch_step": 1200,
        "launch_steps_per_second": 3.5,
        "launch_loss": 0.25,
        "launch_restarts_total": 2,
        "launch_failures_total.crash": 1,
        "launch_failures_total.hang": 1,
        "launch_last_checkpoint_step.memory": 1200,
        "launch_last_checkpoint_step.remote": 1000,
        "launch_last_checkpoint_seconds.memory": 99.0,
        "launch_last_checkpoint_seconds.remote": 80.0,
    }


def test_what_is_not_known_is_left_out(metrics: Metrics) -> None:
    metrics.update(Status(run="train", time=1.0, phase="running", round=1, round_started=0.0, world=1))
    assert scrape(metrics) == {"launch_round": 1, "launch_ranks": 1, "launch_restarts_total": 0}


def test_a_port_in_use(metrics: Metrics) -> None:
    with pytest.raises(BusyError, match=f"port {metrics.port} is in use: choose another --metrics-port"):
        Metrics(metrics.port)


def test_closing_frees_the_port() -> None:
    metrics = Metrics(0)
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scrape(metrics)
    Metrics(metrics.port).close()


def test_the_package_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError, match=r"pip install 'shardckpt\[metrics\]'"):
        Metrics(0)


def test_it_is_imported_when_it_is_used() -> None:
    code = "import sys, launcher.reporting.metrics; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
