"""Which failures at the start are not tried again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.diagnosis.reports import Death
from launcher.diagnosis.same_again import would_fail_again

HEADER = "Traceback (most recent call last):"
FRAME = '  File "/home/me/train.py", line 2, in <module>'


def died(rank: int, error: str, *, code: int = 1, frame: str = FRAME) -> Death:
    return Death(rank, "here", 7, code, 1.0, error=error, lines=(HEADER, frame, error), has_traceback=True)


def stopped(rank: int) -> Death:
    return Death(rank, "here", 7, -15, 1.1, is_ours=True)


def usage(rank: int) -> Death:
    return Death(
        rank,
        "here",
        7,
        2,
        1.0,
        lines=("usage: train.py [-h]", "train.py: error: unrecognized arguments: -x"),
    )


@pytest.mark.parametrize(
    "error",
    [
        "SyntaxError: invalid syntax",
        "IndentationError: unexpected indent",
        "ModuleNotFoundError: No module named 'flash_attn'",
        "ImportError: cannot import name 'x' from 'y' (/home/me/y.py)",
        "NameError: name 'modle' is not defined",
        "shardckpt.errors.InvalidUrlError: s4://b/run: unknown protocol 's4'; did you mean s3://?",
    ],
)
def test_errors_of_the_code(error: str) -> None:
    """However long the imports took, and though others were stopped before they got there."""
    assert would_fail_again([died(0, error), stopped(1), died(2, error)], 3, 500.0)
    assert would_fail_again([died(0, error)], 1, 500.0)
    assert not would_fail_again([died(0, error), stopped(1)], 3, 1.0)  # one has finished


def test_a_rank_that_had_raised_when_it_was_stopped_counts() -> None:
    met = replace(died(1, "KeyError: 'lr'", code=-15), is_ours=True)
    assert would_fail_again([died(0, "KeyError: 'lr'"), met], 2, 1.0)
    assert not would_fail_again([died(0, "KeyError: 'lr'"), replace(met, error="KeyError: 'x'")], 2, 1.0)


def test_arguments_that_the_script_does_not_know() -> None:
    assert would_fail_again([usage(0), stopped(1)], 2, 1.0)
    assert not would_fail_again([replace(usage(0), lines=("loading", "bad luck"))], 1, 1.0)


@pytest.mark.parametrize(
    "error", ["ValueError: batch 3", "KeyError: 'DATA'", "AssertionError", "TypeError: no"]
)
def test_errors_of_all_ranks_alike(error: str) -> None:
    """One that is stopped might have got on, and what comes later may be a matter of chance."""
    deaths = [died(0, error), died(1, error)]
    assert would_fail_again(deaths, 2, 1.0)
    assert not would_fail_again([deaths[0], stopped(1)], 2, 1.0)
    assert not would_fail_again([deaths[0], died(1, "IndexError: 3")], 2, 1.0)
    assert not would_fail_again(deaths, 2, 100.0)


@pytest.mark.parametrize(
    "death",
    [
        died(0, "RuntimeError: CUDA error: out of memory"),
        died(0, "AssertionError: Torch not compiled with CUDA enabled"),
        died(0, "FileNotFoundError: [Errno 2] No such file or directory: '/nfs/data'"),
        died(0, "ConnectionRefusedError: [Errno 111] Connection refused"),
        died(0, "ValueError: no data (from OSError: stale)"),
        died(
            0, "ValueError: no data", frame='  File "/usr/lib/python3.11/urllib/request.py", line 2, in f'
        ),
        died(0, "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory"),
        died(0, "RuntimeError: something"),
        died(0, "my.lib.OddError: something"),
        died(0, "SyntaxError: invalid syntax", code=-9),
        replace(died(0, "SyntaxError: invalid syntax"), has_joined=True),
        replace(died(0, "SyntaxError: invalid syntax"), step=4),
        Death(0, "here", 7, 3, 1.0, lines=("no luck",)),
        Death(0, "here", 7, -11, 1.0),
        stopped(0),
    ],
)
def test_what_may_be_another_time_not_as_it_was(death: Death) -> None:
    assert not would_fail_again([death], 1, 1.0)
