"""The tables of scripts/bench/save."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from _save_candidates import CANDIDATES
from _save_limits import LIMITS
from _save_world import Results

__all__ = ["medians", "tables"]

Values = dict[str, float]
_OURS = "shardckpt"


def medians(results: Results) -> dict[str, Values]:
    """By candidate: the median over the rounds of each thing measured; memory from round 0."""
    collected: dict[str, dict[str, list[float]]] = {}
    for (number, word), values in results.items():
        for name, value in values.items():
            if isinstance(value, (int, float)) and (number > 0) != name.endswith("_memory"):
                collected.setdefault(word, {}).setdefault(name, []).append(value)
    return {
        word: {name: statistics.median(values) for name, values in of.items()}
        for word, of in collected.items()
    }


def tables(same: Results, other: Results, stored: int, words: Sequence[str], other_ranks: int) -> str:
    """Limits, saves and loads, with failures."""
    times = medians(same)
    resharded = medians(other)
    limits = times.pop("limits", {})
    errors = {word: v["error"] for (_, word), v in [*same.items(), *other.items()] if "error" in v}
    rows = [word for word in words if word in times]
    parts = [
        _limits(limits, stored),
        _saves(rows, times, limits, stored),
        _loads(rows, times, resharded, limits, stored, other_ranks),
        *(f"FAILED {CANDIDATES[w].name if w in CANDIDATES else w}: {e}" for w, e in errors.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def _limits(limits: Values, stored: int) -> str:
    if not limits:
        return ""
    rows = [[LIMITS[k], _seconds(limits[k]), _rate(stored, limits[k])] for k in LIMITS if k in limits]
    return _table(["LIMITS", "s", "GB/s"], rows)


def _saves(rows: Sequence[str], times: dict[str, Values], limits: Values, stored: int) -> str:
    head = [
        *("SAVE", "stall s", "x memcpy", "x peer", "first s", "x memcpy"),
        *("durable s", "GB/s", "of disk", "x peer", "syncs", "CPU s", "memory GB"),
    ]

    peers = [_last(of) for word, of in times.items() if word != _OURS]
    lines = []
    for word in rows:
        of = times[word]
        stall, durable = (_last(of).get(what) for what in ("stall", "durable"))
        lines.append(
            [
                CANDIDATES[word].name,
                _seconds(stall),
                _ratio(stall, limits.get("copy")),
                _ratio(_best(peers, "stall"), stall) if word == _OURS else "",
                _seconds(of.get("first_stall")) if CANDIDATES[word].again else "",
                _ratio(of.get("first_stall"), limits.get("copy")) if CANDIDATES[word].again else "",
                _seconds(durable),
                _rate(stored, durable),
                _ratio(limits.get("write"), durable),
                _ratio(_best(peers, "durable"), durable) if word == _OURS else "",
                "itself" if CANDIDATES[word].syncs else "by us",
                _seconds(_last(of).get("cpu")),
                _gigabytes(of.get("save_memory")),
            ]
        )
    return _table(head, lines)


def _loads(
    rows: Sequence[str],
    times: dict[str, Values],
    resharded: dict[str, Values],
    limits: Values,
    stored: int,
    other_ranks: int,
) -> str:
    on = f"on {other_ranks}"
    head = [
        *("LOAD", "cold s", "GB/s", "of disk", "x peer", "warm s", "GB/s", "of memcpy", "x peer", "CPU s"),
        *(f"cold {on}", "x same", "x peer", f"warm {on}", "x same", "x peer", "memory GB"),
    ]
    disk = min((limits[k] for k in ("read_direct", "read_cold") if k in limits), default=None)
    same = [of for word, of in times.items() if word != _OURS]
    other = [of for word, of in resharded.items() if word != _OURS]
    lines = []
    for word in rows:
        of, there = times[word], resharded.get(word, {})
        line = [CANDIDATES[word].name]
        for what, limit in (("cold", disk), ("warm", limits.get("copy"))):
            line += [_seconds(of.get(what)), _rate(stored, of.get(what)), _ratio(limit, of.get(what))]
            line.append(_ratio(_best(same, what), of.get(what)) if word == _OURS else "")
        line.append(_seconds(of.get("warm_cpu")))
        for what in ("cold", "warm"):
            line += [_seconds(there.get(what)), _ratio(there.get(what), of.get(what))]
            line.append(_ratio(_best(other, what), there.get(what)) if word == _OURS else "")
        lines.append([*line, _gigabytes(of.get("load_memory"))])
    return _table(head, lines)


def _last(of: Values) -> Values:
    """The times of the second save; of the first, where there was one only."""
    return {
        what: of[key]
        for what in ("stall", "durable", "cpu")
        for key in (f"first_{what}", what)
        if key in of
    }


def _best(peers: Sequence[Values], what: str) -> float | None:
    return min((of[what] for of in peers if what in of), default=None)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _rate(nbytes: int, seconds: float | None) -> str:
    return "" if not seconds else f"{nbytes / seconds / 1e9:.2f}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or not other else f"{one / other:.2f}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
