"""The picture of scripts/bench/save: what each candidate costs, with the machine's limits as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _peers.candidates import CANDIDATES

__all__ = ["plot"]

Values = Mapping[str, float]
_OURS = "shardckpt"
_OUR_COLOR, _PEER_COLOR, _LIMIT_COLOR = "#1f6f8b", "#b9c4cc", "#c0392b"


@dataclass(frozen=True)
class Panel:
    """One row of bars: seconds by candidate.

    Attributes:
        keys: what to show, the first that a candidate has.
        limit: what of the machine's limits to draw, and how to name it.
    """

    title: str
    keys: tuple[str, ...]
    limit: tuple[str, str]


PANELS = (
    Panel("Stall of training", ("stall", "first_stall"), ("copy", "memcpy")),
    Panel("Until durable", ("durable", "first_durable"), ("write", "raw disk write")),
    Panel("Load, cold", ("cold",), ("read_direct", "raw disk read")),
    Panel("Load, warm", ("warm",), ("copy", "memcpy")),
)


def plot(path: Path, medians: Mapping[str, Values], caption: str) -> None:
    """Write a PNG of the medians by candidate. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        _draw(axis, panel, medians)
    figure.suptitle("Saving and loading a sharded state: seconds, shorter is better", fontsize=12)
    figure.supxlabel(caption, fontsize=7, color="#666666")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axis: Any, panel: Panel, medians: Mapping[str, Values]) -> None:
    rows = [
        (word, of[key])
        for word, of in medians.items()
        if word in CANDIDATES
        for key in [next((key for key in panel.keys if key in of), "")]
        if key
    ]
    rows.sort(key=lambda row: -row[1])
    names = [CANDIDATES[word].name for word, _ in rows]
    seconds = [value for _, value in rows]
    colors = [_OUR_COLOR if word == _OURS else _PEER_COLOR for word, _ in rows]
    bars = axis.barh(names, seconds, color=colors, height=0.7)
    axis.bar_label(bars, labels=[f"{value:.2f}" for value in seconds], padding=3, fontsize=8)
    key, name = panel.limit
    limit = medians.get("limits", {}).get(key)
    if limit:
        axis.axvline(limit, color=_LIMIT_COLOR, linewidth=1)
        axis.annotate(
            name,
            (limit, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=8,
            color=_LIMIT_COLOR,
            horizontalalignment="center",
        )
    axis.set_title(panel.title, fontsize=10, loc="left", pad=18)
    axis.set_xlim(0, 1.15 * max([*seconds, limit or 0, 1e-9]))
    axis.tick_params(labelsize=8)
    _bold_ours(axis.get_yticklabels())
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _bold_ours(labels: Sequence[Any]) -> None:
    for label in labels:
        if label.get_text() == CANDIDATES[_OURS].name:
            label.set_fontweight("bold")
