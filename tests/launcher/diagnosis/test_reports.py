"""What a death says by itself, and reports through JSON."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest

from launcher.diagnosis.reports import NodeReport
from tests.kit.failures import (
    OWN,
    died,
    reported,
)


@pytest.mark.parametrize(
    ("code", "error", "expected"),
    [
        (-signal.SIGTERM, OWN, 1),
        (-signal.SIGKILL, OWN, 1),
        (-signal.SIGTERM, "SystemExit: 3", 3),
        (-signal.SIGTERM, "SystemExit: no data", 1),
        (-signal.SIGTERM, "KeyboardInterrupt", -signal.SIGTERM),
        (-signal.SIGTERM, None, -signal.SIGTERM),
        (7, OWN, 7),
    ],
)
def test_what_it_would_have_ended_with(code: int, error: str | None, expected: int) -> None:
    death = replace(died(0, code, error or "", is_ours=True), error=error, has_traceback=error is not None)
    assert death.failure_code == expected
    others = replace(death, is_ours=False)
    assert others.failure_code == code


def test_a_report_passes_through_json() -> None:
    report = reported(died(1, 1, OWN), ended=((0, 0, 1e9),), hang=("where",), trouble="it", step=7)
    assert NodeReport.from_json(json.loads(json.dumps(report.to_json()))) == report
