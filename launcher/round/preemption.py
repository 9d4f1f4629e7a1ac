"""What a signal that a scheduler sends to a job asks of it, by what its workers can do. Pure."""

from __future__ import annotations

import signal
from enum import Enum, auto

__all__ = ["Answer", "answer_signal"]


class Answer(Enum):
    """What is done about a signal."""

    LEAVE = auto()  # save if workers can, and end with 75: the job goes on when it is started again
    KEEP = auto()  # until a worker can save; then leave
    STOP = auto()  # end as any job does that gets this signal


def answer_signal(signum: int, *, can_save: bool, can_resume: bool, is_started: bool) -> Answer:
    """What to do about a first signal.

    Args:
        can_save: workers have said that they save when they are asked to.
        can_resume: the job goes on from a checkpoint when it is started again, or its script makes some.
        is_started: there are workers.
    """
    if signum not in (signal.SIGTERM, signal.SIGUSR1):
        return Answer.STOP
    if can_save or (can_resume and not is_started):
        return Answer.LEAVE
    if signum == signal.SIGUSR1:  # a notice: what ends the job comes later
        return Answer.KEEP
    return Answer.LEAVE if can_resume else Answer.STOP
