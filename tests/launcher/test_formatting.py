"""How things are written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import pytest

from launcher.formatting import amount, count, describe_exit, duration, json_values, name_ranks, part, spans


@pytest.mark.parametrize(
    ("ranks", "parts", "named"),
    [
        ([3], ["3"], "rank 3"),
        ([4, 3], ["3-4"], "ranks 3-4"),
        ([0, 1, 2, 5], ["0-2", "5"], "ranks 0-2, 5"),
        (range(0, 6, 2), ["0", "2", "4"], "ranks 0, 2, 4"),
    ],
)
def test_ranks(ranks: Iterable[int], parts: list[str], named: str) -> None:
    assert spans(ranks) == parts
    assert name_ranks(ranks) == named


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (303, "5 min 3 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (97200, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**36, "64.0 GiB"), (2**54, "16384.0 TiB")],
)
def test_amounts(size: float, text: str) -> None:
    assert amount(size) == text


def test_counts() -> None:
    assert [count(number, "rank") for number in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]


def test_parts_are_in_the_units_of_the_whole() -> None:
    assert part(2**29, 2**36) == "0.5 of 64.0 GiB"
    assert part(12, 999) == "12 of 999 B"


def test_counts_of_what_has_another_plural() -> None:
    assert [count(number, "process", "processes") for number in (0, 1, 2)] == [
        "0 processes",
        "1 process",
        "2 processes",
    ]


def test_every_number_is_json() -> None:
    values = json_values({"a": [math.inf, {"b": -math.inf}], 3: (math.nan, 1.5), "text": "nan"})
    assert values == {"a": ["inf", {"b": "-inf"}], "3": ["nan", 1.5], "text": "nan"}
    assert json.dumps(values, allow_nan=False)


def test_exits_are_described() -> None:
    assert describe_exit(3) == "exit code 3"
    assert "SIGSEGV (signal 11" in describe_exit(-11)
    assert "memory" in describe_exit(-9)
    assert describe_exit(-40).startswith("killed by ")
