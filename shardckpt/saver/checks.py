"""Checks of trainers' messages, before the saver acts on them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import msgspec

from shardckpt.run.places import attempt_number
from shardckpt.run.save_info import SaveInfo
from shardckpt.saver.protocol import (
    Abandon,
    Attach,
    Begin,
    ChunkTable,
    Hello,
    Request,
    Reserve,
    Stage,
    Start,
)

__all__ = ["RequestError", "check", "decode_values"]

_MOST_BYTES = 1 << 56  # of a pack; also what can be told apart from a negative number gone astray
_MOST_SNAPSHOTS = 64
_MOST_RANKS = 1 << 24
_LONGEST_NAME = 4096


class RequestError(ValueError):
    """A trainer has sent what no trainer sends."""


def check(request: Request, tiers: Collection[str] | None) -> None:
    """Raise RequestError for a message that makes no sense.

    Args:
        request: the message.
        tiers: the names of the tiers in the trainer's Hello; None before that.
    """
    if isinstance(request, Hello) is not (tiers is None):
        raise RequestError("its first message is to be Hello, and no other")
    known = tiers or ()
    match request:
        case Hello(run=run, tiers=named, snapshots=snapshots):
            _name(run, "run")
            _within("snapshots", snapshots, 1, _MOST_SNAPSHOTS)
            for timeout in (request.commit_timeout, request.outage_timeout):
                if not timeout >= 0 or math.isnan(timeout):
                    raise RequestError(f"a timeout of {timeout}")
            if len({tier.name for tier in named}) != len(named):
                raise RequestError("two tiers have one name")
            for tier in named:
                _name(tier.name, "tier")
                _within("keep_last", 1 if tier.keep_last is None else tier.keep_last, 1, 1 << 62)
        case Start(attempt=attempt, name=name):
            for text in (attempt.name, *([name] if name else [])):
                if not attempt_number(text):
                    raise RequestError(f"an attempt called {text[:80]!r}")
            _name(attempt.id, "id")
            _within("base", attempt.base, 0, 1 << 62)
            if not known:
                raise RequestError("an attempt, and no tier for it to be in")
        case ChunkTable():
            _check_plan(request)
        case Reserve(size=size):
            _within("size", size, 0, _MOST_BYTES)
        case Begin(info=info, rank=rank, tiers=names):
            _check_save(info, names, known)
            _within("rank", rank, 0, info.world_size - 1)
        case Stage(info=info, tiers=names):
            _check_save(info, names, known)
            _within("rank", request.rank, 0, info.world_size - 1)
            _within("local_ranks", request.local_ranks, 1, info.world_size)
        case Abandon(id=save_id) | Attach(id=save_id):
            _name(save_id, "id")
        case _:
            pass


def decode_values(stage: Stage) -> dict[str, Any]:
    """Decode the PerRank values of a staged pack, by path. Raises RequestError if they cannot be decoded."""
    try:
        return msgspec.json.decode(stage.values, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"values that cannot be read: {error}") from error


def _check_plan(plan: ChunkTable) -> None:
    _within("size", plan.size, 0, _MOST_BYTES)
    if not len(plan.row) == len(plan.offset) == len(plan.nbytes):
        raise RequestError("a plan with columns of different lengths")
    if not plan.row:
        return
    if min(plan.row) < 0 or min(plan.offset) < 0 or min(plan.nbytes) < 0:
        raise RequestError("a plan with a negative number")
    if max(map(sum, zip(plan.offset, plan.nbytes, strict=True))) > plan.size:
        raise RequestError("a plan with a chunk beyond its pack")


def _check_save(info: SaveInfo, tiers: Collection[str], known: Collection[str]) -> None:
    _name(info.id, "id")
    _name(info.path, "path")
    if any(part in ("", ".", "..") for part in info.path.split("/")):
        raise RequestError(f"a save at {info.path!r}")
    _within("world_size", info.world_size, 1, _MOST_RANKS)
    _within("step", info.step, 0, 1 << 62)
    _within("attempt", info.attempt, 0, 1 << 63)
    if len(set(tiers)) != len(tiers) or not set(tiers) <= set(known):
        raise RequestError(
            f"a save in tiers {', '.join(map(repr, tiers))}, of {', '.join(map(repr, known))}"
        )


def _name(text: str, what: str) -> None:
    if not text or "\0" in text or len(text) > _LONGEST_NAME:
        raise RequestError(f"{what} {text[:100]!r}")


def _within(what: str, number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        raise RequestError(f"{what} {number}, which is not from {least} to {most}")
