"""The tables of scripts/bench/save."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from _kit.limits import LIMITS
from _peers.candidates import CANDIDATES

from _save.first import FIRST, PARTS
from _save.world import Results

__all__ = ["medians", "remote_tables", "tables"]

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


def tables(
    same: Results, other: Results, stored: int, words: Sequence[str], other_ranks: int, window: float
) -> str:
    """Limits, saves, loads, stalls and training, with failures."""
    times = medians(same)
    resharded = medians(other)
    limits = times.pop("limits", {})
    stalls = times.pop("stalls", {})
    first = times.pop("first", {})
    training = {word: times.pop(f"training:{word}", {}) for word in words}
    errors = {word: v["error"] for (_, word), v in [*same.items(), *other.items()] if "error" in v}
    rows = [word for word in words if word in times]
    parts = [
        _limits(limits, stored),
        _saves(rows, times, limits, stored) if rows else "",
        _loads(rows, times, resharded, limits, stored, other_ranks) if rows else "",
        _first(first),
        _stalls(stalls),
        *(str(values["slow"]) for values in same.values() if "slow" in values),
        _training({word: of for word, of in training.items() if of}, window),
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
        *("SAVE", "stall s", "x memcpy", "x DCP", "x peer", "first s", "x memcpy"),
        *("durable s", "GB/s", "of disk", "2 in flight s", "of disk", "x DCP", "x peer"),
        *("syncs", "CPU s", "memory GB", "private"),
    ]

    peers = [_last(of) for word, of in times.items() if word != _OURS]
    dcp = [_last(times[word]) for word in ("dcp-thread", "dcp-process") if word in times]
    dcp_durable = times.get("dcp", {}).get("first_durable")
    lines = []
    for word in rows:
        of = times[word]
        stall, durable = (_last(of).get(what) for what in ("stall", "durable"))
        lines.append(
            [
                CANDIDATES[word].name,
                _seconds(stall),
                _ratio(stall, limits.get("copy")),
                _ratio(_best(dcp, "stall"), stall) if word == _OURS else "",
                _ratio(_best(peers, "stall"), stall) if word == _OURS else "",
                _seconds(of.get("first_stall")) if CANDIDATES[word].again else "",
                _ratio(of.get("first_stall"), limits.get("copy")) if CANDIDATES[word].again else "",
                _seconds(durable),
                _rate(stored, durable),
                _ratio(limits.get("write"), durable),
                _seconds(of.get("pair_durable")),
                _ratio(2 * limits["write"] if "write" in limits else None, of.get("pair_durable")),
                _ratio(dcp_durable, durable) if word == _OURS else "",
                _ratio(_best(peers, "durable"), durable) if word == _OURS else "",
                "itself" if CANDIDATES[word].syncs else "by us",
                _seconds(_last(of).get("cpu")),
                _gigabytes(of.get("save_memory")),
                _gigabytes(of.get("save_private_memory")),
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
        *(f"cold {on}", "x same", "x peer", f"warm {on}", "x same", "x peer"),
        *("recall s", "of memcpy", "memory GB"),
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
        recall = of.get("recall")
        line.append("not memory" if "recall_elsewhere" in of else _seconds(recall))
        line += [_ratio(limits.get("copy"), recall), _gigabytes(of.get("load_memory"))]
        lines.append(line)
    return _table(head, lines)


def _first(times: Values) -> str:
    """The first save of a job, beside DCP's."""
    if not times:
        return ""
    dcp = min(times["dcp-thread"], times["dcp-process"])
    rows = []
    for kind, words in {"second": "shardckpt, second save", **FIRST}.items():
        stall = times[kind]
        row = [words, _seconds(stall), _ratio(stall, times["copy"]), _ratio(stall, dcp)]
        row += [
            _seconds(times[f"{kind}_{part}"]) if words.startswith("shardckpt") else "" for part in PARTS
        ]
        rows.append([*row, _seconds(times.get(f"{kind}_restore"))])
    return _table(["FIRST SAVE", "stall s", "x memcpy", "of DCP", *PARTS, "restore s"], rows)


def _stalls(times: Values) -> str:
    """The stalls of saves in a row, and the copies before them."""
    by_what = {
        name: [times[key] for key in sorted(times) if key.startswith(key_prefix)]
        for name, key_prefix in (("memcpy", "copy_"), ("shardckpt", "stall_"))
    }
    if not by_what["shardckpt"]:
        return ""
    found = {
        name: [values[0], statistics.median(values), _percentile(values, 99), max(values)]
        for name, values in by_what.items()
    }
    rows = [[name, *map(_seconds, numbers)] for name, numbers in found.items()]
    rows.append(["x memcpy", *map(_ratio, found["shardckpt"], found["memcpy"])])
    middle = found["memcpy"][1]
    rows.append(["x median memcpy", *(_ratio(number, middle) for number in found["shardckpt"])])
    return _table([f"STALLS OF {len(by_what['shardckpt'])} SAVES", "first", "median", "p99", "max"], rows)


def remote_tables(results: Results, stored: int) -> str:
    """What object storage costs, with failures."""
    from _peers.remote import REMOTE

    times = medians(results)
    bare = times.pop("s3:limits", {})
    peers = [of for word, of in times.items() if word != "s3:shardckpt"]
    saved = [{"saved": _last(of)["durable"]} for of in peers if "durable" in _last(of)]
    head = [
        *("OBJECT STORAGE", "stall s", "saved s", "GB/s", "of bare", "x peer", "CPU s", "memory GB"),
        *("load s", "GB/s", "of bare", "x peer", "CPU s", "memory GB"),
    ]
    rows = [["bare client", "", _seconds(bare.get("put")), _rate(stored, bare.get("put")), *[""] * 4]]
    rows[0] += [_seconds(bare.get("get")), _rate(stored, bare.get("get")), *[""] * 4]
    for word, of in times.items():
        last, ours = _last(of), word == "s3:shardckpt"
        durable, load = last.get("durable"), of.get("load")
        rows.append(
            [
                REMOTE[word].name,
                _seconds(last.get("stall")),
                _seconds(durable),
                _rate(stored, durable),
                _ratio(bare.get("put"), durable),
                _ratio(_best(saved, "saved"), durable) if ours else "",
                _seconds(last.get("cpu")),
                _gigabytes(of.get("save_memory")),
                _seconds(load),
                _rate(stored, load),
                _ratio(bare.get("get"), load),
                _ratio(_best(peers, "load"), load) if ours else "",
                _seconds(of.get("load_cpu")),
                _gigabytes(of.get("load_memory")),
            ]
        )
    errors = {word: values["error"] for (_, word), values in results.items() if "error" in values}
    failures = [f"FAILED {REMOTE[w].name if w in REMOTE else w}: {e}" for w, e in errors.items()]
    return "\n\n".join([_table(head, rows), *failures])


def _percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated between the two nearest."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _training(times: dict[str, Values], window: float) -> str:
    if not times:
        return ""
    head = ["TRAINING, iterations/s", "alone", "while saving", "of alone", "for s"]
    head += [f"in {window:g} s", "of alone"]
    rows = []
    for word, of in times.items():
        alone = of["alone_rate"]
        row = [CANDIDATES[word].name, f"{alone:.0f}", f"{of['persist_rate']:.0f}"]
        row += [_percent(of["persist_rate"] / alone), _seconds(of["persist"])]
        if "window_rate" in of:
            row += [f"{of['window_rate']:.0f}", _percent(of["window_rate"] / alone)]
        else:
            row += ["", "longer"]
        rows.append(row)
    return _table(head, rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


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
