"""Where the checkpoints of a run are."""

from __future__ import annotations

from pathlib import Path

from shardckpt.run.attempts import claim_attempt
from shardckpt.run.places import BAD, Place, Succession, iter_places, step_path, succession
from shardckpt.storage import open_storage
from tests.shardckpt.run.helpers import save_alone


def test_succession(tmp_path: Path) -> None:
    root = open_storage(tmp_path)
    place = Place(root, step_path(claim_attempt(root), 7))
    assert succession(place) is Succession.NONE
    claim_attempt(root)
    assert succession(place) is Succession.CLAIMED
    save_alone(tmp_path, 1)
    assert succession(place) is Succession.COMMITTED
    newer = next(iter_places(root))
    assert succession(newer) is Succession.NONE
    newer.storage.write(BAD, b"{}")
    assert succession(place) is Succession.CLAIMED, "nobody can resume from that one"
    assert succession(Place(root)) is Succession.NONE, "it is in no run"
