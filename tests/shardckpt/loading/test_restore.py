"""Restore: the newest good checkpoint, on all ranks the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import shardckpt
from shardckpt.errors import (
    CorruptError,
    FormatError,
    StateError,
    StorageError,
    UnknownVersionError,
)
from shardckpt.format import records
from shardckpt.run.places import BAD
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage
from tests.kit.runs import break_pack, committed, restored, saved, state_at
from tests.kit.worlds import Checkpoints, ThreadRanks, run_threads


def test_a_bad_checkpoint_is_marked_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that fails verification is reported and left in place, the one before is taken, and later
    restores and opens do not read it again."""
    saved(tmp_path, 1, 2, 3)
    bad = break_pack(tmp_path, 3)
    assert restored(tmp_path) == 2
    assert "'t'" in caplog.text
    assert "going on with the checkpoint before it" in caplog.text
    assert "checksum" in json.loads((bad / BAD).read_text())["error"]
    assert (bad / "rank-00000" / "data.pack").exists()
    assert shardckpt.open(tmp_path).step == 2
    assert shardckpt.load(tmp_path, state_at(0)).step == 2
    caplog.clear()
    assert restored(tmp_path) == 2
    assert "checksum" not in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": "shardckpt/1"}'])
def test_a_damaged_manifest_is_passed_over(damage: bytes, tmp_path: Path) -> None:
    """A manifest that is not valid is as bad as a pack that is not."""
    saved(tmp_path, 1, 2)
    manifest = next(tmp_path.glob("*/step-00000002/manifest.json"))
    manifest.write_bytes(damage)
    assert restored(tmp_path) == 1
    assert (manifest.parent / BAD).exists()


def test_a_newer_version_is_not_passed_over(tmp_path: Path) -> None:
    """A checkpoint that a newer library wrote is not bad: going back silently would lose work."""
    saved(tmp_path, 1, 2)
    manifest = next(tmp_path.glob("*/step-00000002/manifest.json"))
    document = records.open_sealed(manifest.read_bytes(), manifest.name)
    newer = document.replace(b"shardckpt/1", b"shardckpt/2", 1)
    manifest.write_bytes(records.encode(msgspec.Raw(newer)))
    with pytest.raises(UnknownVersionError, match="shardckpt/2"):
        restored(tmp_path)
    assert not (manifest.parent / BAD).exists()


def test_no_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    """If all are bad, training does not silently start from nothing: at once, and again later."""
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        break_pack(tmp_path, step)
    for _ in range(2):
        with pytest.raises(CorruptError):
            restored(tmp_path)
    with pytest.raises(CorruptError, match=r"every checkpoint of .* is marked as bad"):
        shardckpt.load(tmp_path, state_at(0))


def test_a_state_that_does_not_fit_is_no_reason_to_go_back(tmp_path: Path) -> None:
    """A mismatch is the caller's error: it is raised, and no checkpoint is marked."""
    saved(tmp_path, 1, 2)
    with pytest.raises(StateError):
        shardckpt.Checkpointer(tmp_path).restore({"t": torch.zeros(3), "step": 0})
    assert not list(tmp_path.rglob(BAD))


def test_bad_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """keep_last counts good checkpoints; bad ones go when as many good ones are newer."""
    saved(tmp_path, 1, 2, 3)
    break_pack(tmp_path, 3)
    assert restored(tmp_path) == 2
    checkpointer = saved(tmp_path, 4, keep_last=2)
    assert committed(open_storage(tmp_path)) == [4, 3, 2]
    checkpointer.save(5, state_at(5))
    checkpointer.close()
    assert committed(open_storage(tmp_path)) == [5, 4]


def test_ranks_pass_over_the_same_checkpoint(tmp_path: Path) -> None:
    """A chunk that only one rank reads is bad: all ranks take the one before, and none changes in between."""

    def state(value: int) -> dict[str, Any]:
        return {"t": torch.full((10,), value), "own": shardckpt.PerRank(torch.full((10,), value))}

    def save(ranks: ThreadRanks) -> None:
        checkpointer = Checkpoints(open_storage(tmp_path), ranks)
        checkpointer.save(1, state(1))
        checkpointer.save(2, state(2))
        checkpointer.wait()

    run_threads(3, save)
    pack = next(tmp_path.glob("*/step-00000002/rank-00002/data.pack"))
    content = bytearray(pack.read_bytes())
    content[0] ^= 1
    pack.write_bytes(content)

    def restore(ranks: ThreadRanks) -> None:
        held = state(0)
        loaded = Checkpoints(open_storage(tmp_path), ranks).restore(held)
        assert loaded is not None
        assert loaded.step == 1
        assert held["t"].tolist() == held["own"].value.tolist() == [1] * 10

    run_threads(3, restore)


def test_ranks_that_find_different_errors_agree(tmp_path: Path) -> None:
    """One rank finds a corrupt chunk, another one cannot read at all: all raise the same, none goes on."""

    def state(ranks: ThreadRanks) -> dict[str, Any]:
        return {"own": shardckpt.PerRank(torch.full((10,), ranks.rank))}

    def save(ranks: ThreadRanks) -> None:
        checkpointer = Checkpoints(open_storage(tmp_path), ranks)
        checkpointer.save(1, state(ranks)).wait()

    run_threads(2, save)
    pack = next(tmp_path.glob("*/*/rank-00000/data.pack"))
    pack.write_bytes(bytes(len(pack.read_bytes())))

    class Unreadable(FaultyStorage):
        def read_into(self, path: str, *_: object) -> None:
            raise StorageError(f"{path} cannot be read")

    def restore(ranks: ThreadRanks) -> None:
        inner = open_storage(tmp_path)
        checkpointer = Checkpoints(Unreadable(inner) if ranks.rank else inner, ranks)
        with pytest.raises(CorruptError):
            checkpointer.restore(state(ranks))

    run_threads(2, restore)


def test_an_invalid_manifest_is_named(tmp_path: Path) -> None:
    """Asked for by its own URL, a bad checkpoint is an error and nothing else is taken instead."""
    saved(tmp_path, 1, 2)
    manifest = next(tmp_path.glob("*/step-00000002/manifest.json"))
    manifest.write_bytes(b"[]")
    with pytest.raises(FormatError, match="step-00000002"):
        shardckpt.load(manifest.parent, state_at(0))
