"""When a saver ends."""

from __future__ import annotations

from shardckpt.saver.lifetime import Lifetime


def alone(linger: float) -> Lifetime:
    """Of a saver without launcher, whose last trainer was gone at 100 s."""
    lifetime = Lifetime.begin(0.0, linger, has_launcher=False)
    lifetime.emptied(100.0, may_linger=True)
    return lifetime


def test_a_saver_without_launcher_lingers() -> None:
    lifetime = alone(10.0)
    assert not lifetime.is_over(105.0, is_busy=False, has_trainers=False)
    assert lifetime.patience(105.0, is_busy=False, has_trainers=False) == 5.0
    assert lifetime.is_over(110.0, is_busy=False, has_trainers=False)


def test_not_after_goodbye() -> None:
    lifetime = alone(10.0)
    lifetime.emptied(100.0, may_linger=False)
    assert lifetime.is_over(100.0, is_busy=False, has_trainers=False)


def test_the_first_trainer_has_time_to_come() -> None:
    lifetime = Lifetime.begin(0.0, 0.0, has_launcher=False)
    assert not lifetime.is_over(29.0, is_busy=False, has_trainers=False)
    assert lifetime.is_over(30.0, is_busy=False, has_trainers=False)


def test_while_it_persists_it_waits_for_nothing_else() -> None:
    """Even if it is to linger no longer: else it would spin until the save is durable."""
    lifetime = alone(0.0)
    assert lifetime.is_over(100.0, is_busy=False, has_trainers=False)
    assert not lifetime.is_over(100.0, is_busy=True, has_trainers=False)
    assert lifetime.patience(100.0, is_busy=True, has_trainers=False) is None


def test_with_a_launcher_it_ends_after_a_flush() -> None:
    """Which waits for trainers for a moment."""
    lifetime = Lifetime.begin(0.0, 0.0, has_launcher=True)
    assert not lifetime.is_over(1000.0, is_busy=False, has_trainers=False)
    assert not lifetime.is_flush_due(1000.0, has_trainers=False)
    lifetime.flush(1000.0)
    assert not lifetime.is_flush_due(1000.0, has_trainers=True)
    assert lifetime.patience(1000.0, is_busy=False, has_trainers=True) == 5.0
    assert lifetime.is_flush_due(1000.0, has_trainers=False)
    assert lifetime.is_flush_due(1005.0, has_trainers=True)
    assert not lifetime.is_over(1005.0, is_busy=False, has_trainers=True)
    lifetime.has_flushed = True
    assert not lifetime.is_over(1005.0, is_busy=True, has_trainers=True)
    assert lifetime.is_over(1005.0, is_busy=False, has_trainers=True)
