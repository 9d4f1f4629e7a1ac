"""Metrics of the job for Prometheus, at http://HOST:PORT/metrics. Needs prometheus-client (extra "metrics").

metric                             what
launch_round                       number of the present round
launch_restarts_total              restarts so far
launch_failures_total{kind}        rounds that failed, by the kind of the failure
launch_ranks                       ranks of the job
launch_step                        steps that every rank has done
launch_steps_per_second            over the last 10 s or so
launch_loss                        as the workers report it
launch_last_checkpoint_step{tier}  newest checkpoint in memory, local, remote
launch_last_checkpoint_seconds{tier}  when it was complete there, in seconds since the epoch

A metric whose value is not known is left out.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.errors import BusyError, UsageError
from launcher.reporting.status import Status

__all__ = ["Metrics"]


class Metrics:
    """Serves the newest status at `port` of all addresses of the host, in threads of its own.

    Raises:
        BusyError: the port is in use.
        UsageError: the port may not be used, or prometheus-client is not installed.
    """

    def __init__(self, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise UsageError(
                "--metrics-port needs the package prometheus-client: pip install 'shardckpt[metrics]'"
            ) from None
        self._status: Status | None = None
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BusyError(f"port {port} is in use: choose another --metrics-port") from None
            raise UsageError(
                f"--metrics-port {port} cannot be used: {os.strerror(error.errno or 0)}"
            ) from None
        self.port: int = self._server.server_port
        """The port; if 0 was asked for, the one that was chosen."""

    def update(self, status: Status) -> None:
        """Serve `status` from now on."""
        self._status = status

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterable[Any]:
        """The metrics; prometheus-client calls this for each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._status
        if status is None:
            return
        for name, text, value in (
            ("launch_round", "Number of the present round", status.round),
            ("launch_ranks", "Ranks of the job", status.world),
            ("launch_step", "Steps that every rank has done", status.step),
            ("launch_steps_per_second", "Over the last 10 s or so", status.rate),
            ("launch_loss", "As the workers report it", status.loss),
        ):
            if value is not None:
                yield GaugeMetricFamily(name, text, value)
        yield CounterMetricFamily("launch_restarts", "Restarts so far", status.restarts)
        yield _labelled(
            CounterMetricFamily("launch_failures", "Rounds that failed", labels=["kind"]), status.failures
        )
        yield _labelled(
            GaugeMetricFamily("launch_last_checkpoint_step", "Newest checkpoint's step", labels=["tier"]),
            {tier: saved.step for tier, saved in status.saved.items()},
        )
        yield _labelled(
            GaugeMetricFamily(
                "launch_last_checkpoint_seconds", "When it was complete, since the epoch", labels=["tier"]
            ),
            {tier: saved.time for tier, saved in status.saved.items()},
        )


def _labelled(family: Any, values: Mapping[str, float]) -> Any:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
