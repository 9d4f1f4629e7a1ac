"""Atomic loads change nothing unless all is good; others say in their errors what they have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import CorruptError, StateError
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage
from tests.kit.worlds import Checkpoints, ThreadRanks, run_threads

ROWS = 300  # of 4 KiB: more than a piece that is read at once


def state_at(value: int, **more: Any) -> dict[str, Any]:
    model = torch.nn.Linear(1024, ROWS, bias=False)
    torch.nn.init.constant_(model.weight, value)
    tensors = {"a": torch.full((8,), value), "b": torch.full((ROWS, 1024), value)}
    return {"model": model, "tensors": tensors, "step": value, **more}


def values(state: dict[str, Any]) -> set[float]:
    found: set[float] = {float(state["step"])}
    for tensor in (state["model"].weight, *state["tensors"].values()):
        found |= {float(value) for value in tensor.detach().unique()}
    return found


def flip_last_chunk(folder: Path) -> None:
    """Flip a bit in the last element of the largest pack: everything before it is right."""
    pack = max(folder.rglob("data.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    manifest = shardckpt.open(folder).manifest
    content[max(manifest.chunks.offset)] ^= 1
    pack.write_bytes(content)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
def test_load(atomic: bool, far: bool, tmp_path: Path) -> None:
    """A good checkpoint is loaded alike; a corrupt one changes nothing, or the text says what."""
    shardckpt.save(tmp_path, state_at(7))
    storage = FaultyStorage(open_storage(tmp_path)) if far else open_storage(tmp_path)
    state = state_at(1)
    shardckpt.load(storage, state, atomic=atomic)
    assert values(state) == {7}
    flip_last_chunk(tmp_path)
    state = state_at(1)
    before = state["model"].weight._version
    with pytest.raises(CorruptError, match="is corrupt, also when it is read again") as caught:
        shardckpt.load(storage, state, atomic=atomic)
    assert state["step"] == 1  # values that are not tensors come last
    if atomic:
        assert values(state) == {1}
        assert "partly" not in str(caught.value)
        assert state["model"].weight._version == before
    else:
        assert "The state is partly loaded: do not go on with its entries 'model', 'tensors'." in str(
            caught.value
        )
        assert state["model"].weight._version > before


@pytest.mark.parametrize("atomic", [False, True])
def test_versions(atomic: bool, tmp_path: Path) -> None:
    """Autograd sees that a tensor was written to: once."""
    shardckpt.save(tmp_path, state_at(7))
    state = state_at(1)
    before = state["model"].weight._version
    shardckpt.load(tmp_path, state, atomic=atomic)
    assert state["model"].weight._version == before + 1


def test_an_object_that_may_refuse_is_asked_first(tmp_path: Path) -> None:
    """Where load_state_dict of a module decides, a load that is not atomic leaves the rest alone as well."""

    class Strict(torch.nn.Linear):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise ValueError("never")

    shardckpt.save(tmp_path, {**state_at(7), "other": torch.nn.Linear(2, 3)})
    state: dict[str, Any] = {**state_at(1), "other": Strict(2, 4)}
    with pytest.raises(StateError, match="Nothing was loaded") as caught:
        shardckpt.load(tmp_path, state, atomic=False)
    assert values(state) == {1}
    assert "partly" not in str(caught.value)


def saved(path: Path, ranks: int, states: dict[int, dict[str, Any]]) -> None:
    """A run with these states by step; what is PerRank differs by rank."""

    def save(world: ThreadRanks) -> None:
        checkpointer = Checkpoints(open_storage(path), world)
        for step, state in states.items():
            checkpointer.save(step, state)
        checkpointer.wait()

    run_threads(ranks, save)


def own(value: int) -> dict[str, Any]:
    return {"own": shardckpt.PerRank(torch.full((ROWS, 1024), value))}


def flip_own_of(path: Path, rank: int) -> None:
    """Flip a bit that rank `rank` alone reads, of step 2."""
    folder = next(path.glob("*/step-00000002"))
    manifest = shardckpt.open(folder).manifest
    (name,) = (t.name for t in manifest.tensors if t.name.endswith(f"{rank}") and "own" in t.name)
    number = [t.name for t in manifest.tensors].index(name)
    row = int(manifest.first_rows[number])
    pack = folder / manifest.packs[manifest.chunks.pack[row]].path
    content = bytearray(pack.read_bytes())
    content[manifest.chunks.offset[row]] ^= 1
    pack.write_bytes(content)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_older_checkpoint_overwrites_all(rank: int, tmp_path: Path) -> None:
    """One rank of several fails on the way: all ranks have the older one, whole."""
    saved(tmp_path, 3, {1: state_at(1, **own(1)), 2: state_at(2, **own(2))})
    flip_own_of(tmp_path, rank)

    def restore(world: ThreadRanks) -> None:
        state = state_at(0, **own(0))
        loaded = Checkpoints(open_storage(tmp_path), world).restore(state)
        assert loaded is not None
        assert loaded.step == 1
        assert values(state) == {1}
        assert state["own"].value.unique().tolist() == [1]

    run_threads(3, restore)


@pytest.mark.parametrize("rank", [0, 2])
def test_no_older_checkpoint(rank: int, tmp_path: Path) -> None:
    """Every rank says that its state is partly loaded, also one whose own chunks were good."""
    saved(tmp_path, 3, {2: state_at(2, **own(2))})
    flip_own_of(tmp_path, rank)

    def restore(world: ThreadRanks) -> None:
        state = state_at(0, **own(0))
        with pytest.raises(
            CorruptError, match="partly loaded: do not go on with its entries 'model', 'own', 't"
        ):
            Checkpoints(open_storage(tmp_path), world).restore(state)
        assert state["step"] == 0

    run_threads(3, restore)


def test_an_older_checkpoint_that_would_not_overwrite_all(tmp_path: Path) -> None:
    """What the failed one wrote and the older one lacks would stay: that is an error, on every rank."""
    saved(tmp_path, 2, {1: state_at(1), 2: state_at(2, **own(2))})
    flip_own_of(tmp_path, 1)

    def restore(world: ThreadRanks) -> None:
        state = state_at(0, **own(0))
        with pytest.raises(StateError, match=r"no value for state\['own'\].*partly loaded"):
            Checkpoints(open_storage(tmp_path), world).restore(state, strict=False)
        # The next time, the bad one is passed over at once.
        state = state_at(0, **own(0))
        loaded = Checkpoints(open_storage(tmp_path), world).restore(state, strict=False)
        assert loaded is not None
        assert loaded.missing == ("own",)
        assert values(state) == {1}
        assert state["own"].value.unique().tolist() == [0]

    run_threads(2, restore)


def test_what_neither_checkpoint_has_may_stay(tmp_path: Path) -> None:
    """The failed one has not written to it either."""
    saved(tmp_path, 2, {1: state_at(1, **own(1)), 2: state_at(2, **own(2))})
    flip_own_of(tmp_path, 1)

    def restore(world: ThreadRanks) -> None:
        state = state_at(0, **own(0), new=torch.zeros(3))
        loaded = Checkpoints(open_storage(tmp_path), world).restore(state, strict=False)
        assert loaded is not None
        assert loaded.step == 1
        assert values(state) == {1}
        assert state["new"].tolist() == [0, 0, 0]

    run_threads(2, restore)
