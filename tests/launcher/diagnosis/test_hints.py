"""What a user is told to do about a failure."""

from __future__ import annotations

import pytest

from tests.kit.failures import (
    OWN,
    RESET,
    TIMEOUT,
    UNHANDLED,
    died,
    judged,
    reported,
    verdict_on,
)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "the GPU's memory is full",
        ),
        ("RuntimeError: CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "nvidia-smi"),
        (UNHANDLED, "NCCL_DEBUG"),
        ("MemoryError", "more memory was asked for at once than could be had"),
        ("RuntimeError: DataLoader worker (pid(s) 7) exited unexpectedly", "its own words are in the log"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "/dev/shm"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.", "dmesg"),
        ("OSError: [Errno 28] inotify watch limit reached", "max_user_watches"),
        ("OSError: [Errno 28] No space left on device", "full"),
        ("OSError: [Errno 24] Too many open files", "ulimit"),
    ],
)
def test_hints(error: str, hint: str) -> None:
    verdict = verdict_on(died(0, 1, error))
    assert hint in (verdict.hint or "")
    assert f"  hint: {verdict.hint}" in verdict.render()


@pytest.mark.parametrize(
    ("error", "one_rank", "one_host", "two_hosts"),
    [
        (RESET, None, "what the others wrote is in their logs", "the network between the nodes"),
        (TIMEOUT, None, "--hang-timeout", "--hang-timeout"),
    ],
)
def test_hints_about_peers(
    error: str, one_rank: str | None, one_host: str | None, two_hosts: str | None
) -> None:
    """A job of one rank has none, and one host no network."""
    first, second = died(0, 1, error), died(1, -15, is_ours=True)
    for reports, hint in (
        ([reported(first)], one_rank),
        ([reported(first, second)], one_host),
        ([reported(first), reported(second, node=1, host="far")], two_hosts),
    ):
        found = judged(*reports).hint
        assert found is None if hint is None else hint in (found or "")


def test_no_hint_where_none_is_known() -> None:
    assert verdict_on(died(0, 1, OWN)).hint is None
