"""What is done about the signals of schedulers, by what the workers can do."""

from __future__ import annotations

import signal

import pytest

from launcher.round.preemption import Answer, answer_signal


@pytest.mark.parametrize(
    ("signum", "can_save", "can_resume", "is_started", "expected"),
    [
        (signal.SIGUSR1, True, True, True, Answer.LEAVE),
        (signal.SIGTERM, True, True, True, Answer.LEAVE),
        (signal.SIGUSR1, False, True, True, Answer.KEEP),  # a new round, in which no worker is so far
        (signal.SIGUSR1, False, False, True, Answer.KEEP),
        (signal.SIGUSR1, False, False, False, Answer.KEEP),
        (signal.SIGUSR1, False, True, False, Answer.LEAVE),
        (signal.SIGTERM, False, True, True, Answer.LEAVE),  # there is nothing to save
        (signal.SIGTERM, False, True, False, Answer.LEAVE),
        (signal.SIGTERM, False, False, True, Answer.STOP),
        (signal.SIGINT, True, True, True, Answer.STOP),
        (signal.SIGHUP, True, True, True, Answer.STOP),
    ],
)
def test_answers(signum: int, can_save: bool, can_resume: bool, is_started: bool, expected: Answer) -> None:
    answer = answer_signal(signum, can_save=can_save, can_resume=can_resume, is_started=is_started)
    assert answer is expected
