"""What a list of checkpoints shows is right, whatever the indexes of the run say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import shardckpt
from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST, pack_path, parts_folder
from shardckpt.interop.copy import copy
from shardckpt.loading.listing import Row, list_checkpoints
from shardckpt.ranks.world import Alone
from shardckpt.run.index import INDEX, IndexEntry, read_index, write_index
from shardckpt.run.places import BAD
from shardckpt.run.survey import survey
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage
from tests.kit.worlds import Checkpoints
from tests.shardckpt.run.helpers import state_at

ATTEMPT = "attempt-0001"


def save_steps(run: Path, steps: range, **options: Any) -> None:
    """One job that saves these steps."""
    with Checkpoints(open_storage(run), Alone(), **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, state_at(step), {"loss": 1 / step}).wait()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_steps(tmp_path / "run", range(1, 13))
    return tmp_path / "run"


def listed(run: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows of a run, and the storage calls for them."""
    storage = FaultyStorage(open_storage(run))
    return list_checkpoints(storage), storage.calls


def reads(calls: list[tuple[str, str]]) -> list[str]:
    return [path for method, path in calls if method == "read"]


def without_index(run: Path) -> list[Row]:
    for path in run.rglob(INDEX):
        path.unlink()
    return listed(run)[0]


def test_a_list_reads_the_index_and_no_manifest(run: Path) -> None:
    rows, calls = listed(run)
    assert reads(calls) == [f"{ATTEMPT}/{INDEX}"]
    assert [(row.step, row.state, row.metrics["loss"]) for row in rows] == [
        (step, "good", 1 / step) for step in range(1, 13)
    ]
    assert [row.step for row in rows if row.newest] == [12]
    assert rows == without_index(run)


def test_who_had_to_read_many_manifests_leaves_an_index(run: Path) -> None:
    (run / ATTEMPT / INDEX).unlink()
    rows, calls = listed(run)
    assert len([path for path in reads(calls) if path.endswith(MANIFEST)]) == 12
    again, calls = listed(run)
    assert again == rows
    assert reads(calls) == [INDEX]


def test_a_run_that_must_not_be_written_is_listed(run: Path) -> None:
    (run / ATTEMPT / INDEX).unlink()
    storage = FaultyStorage(open_storage(run), 1, PermissionError("read-only"))
    assert len(list_checkpoints(storage)) == 12
    assert storage.mutations == 1


def test_an_attempt_has_its_own(run: Path) -> None:
    """Each job writes that of its attempt only, so that two do not get in each other's way."""
    save_steps(run, range(13, 15))
    assert {path.name for path in run.glob(f"*/{INDEX}")} == {INDEX}
    assert len(read_index(open_storage(run / ATTEMPT))) == 12
    assert set(read_index(open_storage(run / "attempt-0002"))) == {
        f"attempt-0002/step-000000{step}" for step in (13, 14)
    }
    rows, calls = listed(run)
    assert len(rows) == 14
    assert sorted(reads(calls)) == [f"{ATTEMPT}/{INDEX}", f"attempt-0002/{INDEX}"]


def test_what_is_pruned_leaves_the_index(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 6), keep_last=2)
    assert set(read_index(open_storage(tmp_path / ATTEMPT))) == {
        f"{ATTEMPT}/step-0000000{step}" for step in (4, 5)
    }


def _delete(step: Path, _: IndexEntry) -> None:
    (step / MANIFEST).unlink()


def _mark_bad(step: Path, _: IndexEntry) -> None:
    (step / BAD).write_bytes(records.encode_report("a chunk is bad", time=1.0))


def _cut_pack(step: Path, _: IndexEntry) -> None:
    path = step / pack_path(0)
    path.write_bytes(path.read_bytes()[:-1])


def _cut_manifest(step: Path, _: IndexEntry) -> None:
    (step / MANIFEST).write_bytes((step / MANIFEST).read_bytes()[:-1])


def _lose_pack(step: Path, _: IndexEntry) -> None:
    (step / pack_path(0)).unlink()


def _save_again(step: Path, entry: IndexEntry) -> None:
    """After a prune that ended early: only the manifest was deleted."""
    (step / MANIFEST).unlink()
    shardckpt.save(step, state_at(entry.step), step=entry.step, metrics={"loss": 77.0})


def _copy_another(step: Path, entry: IndexEntry) -> None:
    (step / MANIFEST).unlink()
    other = step.parent / "other"
    shardckpt.save(other, state_at(entry.step), step=entry.step, metrics={"loss": 78.0})
    copy(other, step)


def _as_before_parts(step: Path, entry: IndexEntry) -> None:
    """As earlier versions left it: nothing tells which save the manifest is of."""
    (step / parts_folder(entry.id)).rename(step / "elsewhere")
    (step / "rank-00000/part.json").write_bytes(b"{}")


@pytest.mark.parametrize(
    "change",
    [
        _delete,
        _mark_bad,
        _cut_pack,
        _cut_manifest,
        _lose_pack,
        _save_again,
        _copy_another,
        _as_before_parts,
    ],
)
@pytest.mark.parametrize("number", [5, 12])
def test_the_list_is_right_after_any_change(
    number: int, change: Callable[[Path, IndexEntry], None], run: Path
) -> None:
    """The checkpoint's entry is not believed, or what it says still holds."""
    path = f"{ATTEMPT}/step-{number:08d}"
    change(run / path, read_index(open_storage(run / ATTEMPT))[path])
    rows, calls = listed(run)
    assert len(reads(calls)) <= 3  # what cannot be read is read twice
    assert rows == without_index(run)


@pytest.mark.parametrize(
    "edit",
    [
        {"id": "of another save"},
        {"step": 6},
        {"attempt": 2},
        {"metrics": {"loss": "text"}},
        {"packs": -1},
        {"packs": 1 << 60},
        {"pack_sizes": ""},
    ],
    ids=lambda edit: next(iter(edit)),
)
def test_an_entry_that_cannot_be_right_is_not_believed(edit: dict[str, Any], run: Path) -> None:
    folder = open_storage(run / ATTEMPT)
    entries = read_index(folder)
    path = f"{ATTEMPT}/step-00000005"
    write_index(folder, entries | {path: msgspec.structs.replace(entries[path], **edit)})
    rows, calls = listed(run)
    assert reads(calls)[1:] == [f"{path}/{MANIFEST}"]
    assert rows == without_index(run)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 100_000, records.encode({"format": "x"})], ids=range(4)
)
def test_an_index_that_cannot_be_read_is_none(content: bytes, run: Path) -> None:
    (run / ATTEMPT / INDEX).write_bytes(content)
    assert read_index(open_storage(run / ATTEMPT)) == {}
    assert len(listed(run)[0]) == 12


def test_a_survey_shows_each_step_with_its_files(run: Path) -> None:
    """Whether it lists an attempt as a whole, or each step of one that has few."""
    save_steps(run, range(13, 15))
    (run / ATTEMPT / "step-00000020").mkdir()
    storage = FaultyStorage(open_storage(run))
    found = survey(storage)
    assert [folder.place.path for folder in found] == [
        *(f"attempt-0002/step-000000{step}" for step in (14, 13)),
        *(f"{ATTEMPT}/step-{step:08d}" for step in (20, *range(12, 0, -1))),
    ]
    for folder in found:
        assert folder.files == open_storage(run).sizes(folder.place.path)
    assert len(storage.calls) == 1 + 2 + 2 + 2


def test_a_survey_lists_large_steps_one_by_one(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for step in range(1, 11):
        for number in range(101 if step == 10 else 1):
            storage.write(f"{ATTEMPT}/step-{step:08d}/{number}", b"")
    asked = FaultyStorage(storage)
    assert [len(folder.files) for folder in survey(asked)] == [101, *[1] * 9]
    assert len(asked.calls) == 1 + 1 + 10
