"""Amounts and times as text."""

from __future__ import annotations

from shardckpt.formatting import age, count, size


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 1536, 150 << 20, 3 << 40, 5000 << 40)] == [
        "0 B",
        "999 B",
        "1.0 KiB",
        "1.5 KiB",
        "150 MiB",
        "3.0 TiB",
        "5000 TiB",
    ]


def test_ages() -> None:
    assert [age(s) for s in (-1, 59, 119, 120, 7200, 200_000)] == [
        "0 s",
        "59 s",
        "119 s",
        "2 min",
        "2 h",
        "2 d",
    ]


def test_counts() -> None:
    assert [count(n, "rank") for n in (0, 1, 2300)] == ["0 ranks", "1 rank", "2,300 ranks"]
