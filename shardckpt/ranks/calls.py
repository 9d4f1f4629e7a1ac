"""Do all ranks make the same call? Checked in the first collective of the call, so it costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from shardckpt.errors import RankMismatchError
from shardckpt.ranks.world import Ranks

__all__ = ["PAYLOAD", "Call", "check", "meet", "words"]

PAYLOAD = 20
"""Numbers that the ranks may exchange along with a call. Equally many for all calls, or some would not meet."""

_LARGEST_STEP = 1 << 40
_CALLS = 8  # more than there are kinds of them


class Call(IntEnum):
    """A call that all ranks make together."""

    RESTORE = 1
    STEP = 2
    SAVE = 3
    CLOSE = 4
    FIRST_STEP = 6  # `step` without a save, which prepares the first one
    NEXT_STEP = 5  # `step` without a save, which looks for a drain request

    def at(self, step: int) -> str:
        """Return the call as a script writes it."""
        return {
            Call.RESTORE: "restore",
            Call.STEP: f"step({step}, ...), which saves",
            Call.SAVE: f"save({step}, ...)",
            Call.CLOSE: f"close, which saves step {step}" if step else "close",
            Call.FIRST_STEP: f"step({step}, ...)",
            Call.NEXT_STEP: "step for one of the next steps",
        }[self]


def meet(ranks: Ranks, call: Call, step: int, payload: Sequence[int] = ()) -> list[int]:
    """Return the elementwise maximum of all ranks' payloads, if they all make this call. Collective.

    Args:
        ranks: the world.
        call: the call that this rank makes.
        step: the argument of the call; 0 if it has none.
        payload: at most `PAYLOAD` numbers; the result has `PAYLOAD`.

    Raises RankMismatchError on every rank that makes a call together with ranks that make another one.
    """
    told = ranks.maximum(words(ranks, call, step, payload), doing=call.at(step))
    return check(ranks, call, step, told)


def words(ranks: Ranks, call: Call, step: int, payload: Sequence[int]) -> list[int]:
    """Return the numbers that this rank contributes to `meet`; their maximum over all ranks goes to `check`."""
    # The greatest and the smallest of all ranks' calls, each with a rank that makes it.
    key = min(max(step, 0), _LARGEST_STEP) * _CALLS + call
    return [
        key * ranks.size + ranks.rank,
        -key * ranks.size + ranks.rank,
        *payload,
        *[0] * (PAYLOAD - len(payload)),
    ]


def check(ranks: Ranks, call: Call, step: int, told: Sequence[int]) -> list[int]:
    """Return the payload in the maximum of all ranks' `words`. Raises RankMismatchError if calls differ."""
    high, high_rank = divmod(told[0], ranks.size)
    low, low_rank = -(told[1] // ranks.size), told[1] % ranks.size
    if high == low:
        return list(told[2:])
    others = ", and ".join(
        f"rank {rank} calls {_at(key)}"
        for rank, key in sorted([(low_rank, low), (high_rank, high)])
        if rank != ranks.rank
    )
    raise RankMismatchError(
        f"rank {ranks.rank} calls {call.at(step)}, while {others}. All ranks of a job have to make "
        f"the same calls of a "
        "Checkpointer, with the same steps and in the same order. Where each rank decides by a clock "
        "of its own, have "
        "rank 0 decide and tell the others, or use every_steps."
    )


def _at(key: int) -> str:
    step, call = divmod(key, _CALLS)
    return Call(call).at(step)
