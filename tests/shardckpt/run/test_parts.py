"""Parts of other nodes are found by listing, and only those of this save."""

from __future__ import annotations

import pytest

from shardckpt.errors import SaveError, StorageError
from shardckpt.format.manifest import Part, WrittenPack, marker_path, part_path, parts_folder
from shardckpt.run.failure_reports import report_failure, report_lost
from shardckpt.run.parts import PartCollector, write_part
from shardckpt.run.places import FAILED
from shardckpt.storage import Storage, open_storage
from tests.kit.faults import FaultyStorage

WORLD = 1024
LOCAL = 8


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    return open_storage(f"memory://parts/{request.node.name}")


def write_node(storage: Storage, first: int, count: int = LOCAL, save_id: str = "x") -> None:
    """Have the part of a node's ranks in the storage."""
    packs = [WrittenPack(first + i, 1, [], [], [], {}) for i in reversed(range(count))]
    write_part(storage, Part(id=save_id, packs=packs))


class LateListing(FaultyStorage):
    """Its listings never show anything; a file that is asked for by name is there."""

    def list(self, path: str = "") -> list[str]:
        super().list(path)
        return []


def test_one_listing_finds_the_parts_of_all_nodes(storage: Storage) -> None:
    """Each is read once, and nothing else is asked for."""
    for first in range(0, WORLD, LOCAL):
        write_node(storage, first)
    asked = FaultyStorage(storage)
    found = PartCollector(asked, "x", WORLD)
    assert found.missing() == list(range(WORLD))
    assert found.look()
    assert found.is_complete
    assert [pack.rank for pack in found.packs] == list(range(WORLD))
    assert asked.calls.count(("list", parts_folder("x"))) == 1
    reads = sorted(path for method, path in asked.calls if method == "read")
    assert reads == [part_path("x", first) for first in range(0, WORLD, LOCAL)]
    assert len(asked.calls) == 1 + len(reads)


def test_a_look_reads_only_what_is_new(storage: Storage) -> None:
    asked = FaultyStorage(storage)
    found = PartCollector(asked, "x", 2 * LOCAL)
    assert not found.look()
    write_node(storage, LOCAL)
    assert found.look()
    assert found.missing() == list(range(LOCAL))
    assert not found.look()
    assert len(asked.calls) == 4
    write_node(storage, 0)
    assert found.look()
    assert found.is_complete


def test_what_other_saves_left_is_not_looked_at(storage: Storage) -> None:
    """Earlier saves that ended at the same place, with parts and failures of their own."""
    write_node(storage, 0, save_id="earlier")
    report_failure(storage, marker_path("earlier", 1), "earlier", StorageError("full"))
    storage.write("rank-00000/part.json", b"{}")
    asked = FaultyStorage(storage)
    assert not PartCollector(asked, "x", LOCAL).look()
    assert asked.calls == [("list", parts_folder("x"))]


def test_a_part_of_another_save_under_this_ones_name_is_left_out(storage: Storage) -> None:
    write_node(storage, 0, save_id="x")
    part = storage.read(part_path("x", 0))
    storage.write(part_path("y", 0), part)
    found = PartCollector(storage, "y", LOCAL)
    found.look()
    assert not found.packs


def test_a_part_that_is_damaged_is_read_again(storage: Storage) -> None:
    """It may have been replaced, by a save that is tried again."""
    write_node(storage, 0)
    good = storage.read(part_path("x", 0))
    storage.write(part_path("x", 0), good[:-2])
    found = PartCollector(storage, "x", LOCAL)
    assert not found.look()
    storage.write(part_path("x", 0), good)
    assert found.look()
    assert found.is_complete


def test_the_listing_shows_failure_markers(storage: Storage) -> None:
    """Of any rank that is missing; not of one whose part came after all."""
    write_node(storage, 0)
    report_lost(storage, [3], "x", "it was out of reach for a while")
    asked = FaultyStorage(storage)
    found = PartCollector(asked, "x", 2 * LOCAL)
    assert found.look()
    report_lost(storage, [13], "x", "its trainer ended")
    with pytest.raises(
        SaveError, match=r"rank 13 of memory://.*: its trainer ended\. The checkpoint before"
    ):
        found.look()
    assert ("read", marker_path("x", 3)) not in asked.calls


def test_rank_0_is_lost_with_the_commit(storage: Storage) -> None:
    report_lost(storage, [0, 1], "x", "gone")
    assert set(storage.sizes()) == {FAILED, marker_path("x", 0), marker_path("x", 1)}


def test_parts_are_found_that_a_listing_does_not_show(storage: Storage) -> None:
    """The part of the lowest missing rank is asked for by name; and its failure marker."""
    late = LateListing(storage)
    found = PartCollector(late, "x", 3 * LOCAL, ask_every=0.0)
    for first in (0, LOCAL):
        write_node(storage, first)
    assert found.look()
    assert found.look()
    assert found.missing()[0] == 2 * LOCAL
    assert not found.look()
    report_lost(storage, [2 * LOCAL], "x", "its trainer ended")
    with pytest.raises(SaveError, match=r"rank 16 of .*: its trainer ended"):
        found.look()


def test_nothing_is_asked_for_by_name_while_parts_come(storage: Storage) -> None:
    asked = FaultyStorage(storage)
    found = PartCollector(asked, "x", LOCAL)
    for _ in range(5):
        assert not found.look()
    assert {method for method, _ in asked.calls} == {"list"}
