"""What a job does about a scheduler's signal. Pure."""

from __future__ import annotations

import signal
from enum import Enum, auto

__all__ = ["Answer", "answer_signal"]


class Answer(Enum):
    """What is done about a signal."""

    LEAVE = (
        auto()
    )  # workers save if they can, and the job ends with 75: it goes on when it is started again
    KEEP = auto()  # the signal is kept until a worker can save; then the job leaves
    STOP = auto()  # the job ends as one without checkpoints does


def answer_signal(signum: int, *, can_save: bool, can_resume: bool, is_started: bool) -> Answer:
    """What to do about a first signal.

    Args:
        signum: the signal.
        can_save: True if a worker has reported that it answers drain requests.
        can_resume: True if the job goes on from a checkpoint when it is started again, or its script makes some.
        is_started: True if workers run.
    """
    if signum not in (signal.SIGTERM, signal.SIGUSR1):
        return Answer.STOP
    if can_save or (can_resume and not is_started):
        return Answer.LEAVE
    if signum == signal.SIGUSR1:  # a notice: the signal that ends the job comes later
        return Answer.KEEP
    return Answer.LEAVE if can_resume else Answer.STOP
