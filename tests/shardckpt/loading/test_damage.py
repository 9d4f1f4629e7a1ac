"""Damage and forgery: whatever bit is flipped, whatever file lies there, it is found in bounded time."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import torch

import shardckpt
from shardckpt.errors import CorruptError, FormatError, ShardckptError, StateError, UnsupportedValueError
from shardckpt.format import records
from shardckpt.format.box import Box, tiles
from shardckpt.format.manifest import MANIFEST, REFS, pack_path, part_path
from shardckpt.format.manifest_codec import decode_part
from shardckpt.interop.copy import copy
from shardckpt.interop.export import merge
from shardckpt.loading.listing import list_checkpoints
from shardckpt.loading.verify import verify_checkpoint
from shardckpt.run.places import BAD, FAILED, Place, read_manifest, read_small
from shardckpt.run.refs import write_references
from shardckpt.storage import open_storage

State = dict[str, Any]

_EXHAUSTIVE = [pytest.mark.slow, pytest.mark.timeout(1800)]


def state_of(step: int) -> State:
    return {
        "model": {"w": torch.full((3, 5), float(step)), "b": torch.arange(7.0) + step},
        "lr": 0.1 * step,
        "data": {"position": 1000 + step, "name": "x", "big": 1 << 70, "bytes": b"ab"},
        "rng": shardckpt.PerRank({"seed": step, "t": torch.tensor(step)}),
    }


def content(state: State) -> Any:
    plain = {key: value for key, value in state.items() if key not in ("model", "rng")}
    tensors = {name: tensor.tolist() for name, tensor in state["model"].items()}
    own = state["rng"].value
    return plain, tensors, own["seed"], own["t"].tolist()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with steps 1 and 2."""
    checkpointer = shardckpt.Checkpointer(tmp_path / "run", every_steps=1)
    for step in (1, 2):
        checkpointer.save(step, state_of(step))
    checkpointer.close()
    return tmp_path / "run"


@pytest.fixture
def newest(run: Path) -> Path:
    return run / "attempt-0001/step-00000002"


def restored(run: Path) -> int | None:
    """The step that a restore takes; the state is that of this step, and of no other."""
    state = state_of(0)
    checkpointer = shardckpt.Checkpointer(run, every_steps=1)
    loaded = checkpointer.restore(state)
    checkpointer.close()
    if loaded is None:
        return None
    assert content(state) == content(state_of(loaded.step))
    return loaded.step


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record, whose checksum is right afterwards."""
    record = json.loads(records.open_sealed(path.read_bytes(), path.name))
    change(record)
    path.write_bytes(records.encode(record))


def nodes_of(refs: bytes) -> Any:
    """What refs.json says. Some numbers have more digits than count, so the last one may be another."""
    content = json.loads(refs)
    return content, {k: json.loads(v) if isinstance(v, str) else v for k, v in content.pop("refs").items()}


def flips(data: bytes, most: int | None) -> Iterator[bytes]:
    """The data with one bit changed: each in turn, or as many as wanted, of any place."""
    bits: Any = range(8 * len(data))
    if most is not None and most < len(bits):
        bits = random.Random(7).sample(bits, most)
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def part_of(checkpoint: Path) -> Path:
    return checkpoint / part_path(shardckpt.open(checkpoint).manifest.id, 0)


@pytest.mark.parametrize("most", [150, pytest.param(None, marks=_EXHAUSTIVE)], ids=["some", "all"])
class TestFlips:
    """One flipped bit is found, or changes nothing."""

    def test_of_a_manifest(self, newest: Path, most: int | None) -> None:
        path = newest / MANIFEST
        for flipped in flips(path.read_bytes(), most):
            path.write_bytes(flipped)
            with pytest.raises(FormatError, match="manifest"):
                shardckpt.open(newest)
            assert list_checkpoints(str(newest))[0].state == "invalid"

    def test_of_a_part(self, newest: Path, most: int | None) -> None:
        for flipped in flips(part_of(newest).read_bytes(), most):
            with pytest.raises(FormatError, match="a part"):
                decode_part(flipped, str(newest))

    def test_of_small_records(self, run: Path, newest: Path, most: int | None) -> None:
        (newest / BAD).write_bytes(records.encode_report("the chunk is bad \udc80", time=1.0))
        storage = open_storage(run)
        for path in (run / "attempt-0001/attempt.json", newest / BAD):
            name = str(path.relative_to(run))
            good = read_small(storage, name)
            for flipped in flips(path.read_bytes(), most):
                path.write_bytes(flipped)
                with pytest.raises(FormatError, match=path.name):
                    read_small(storage, name)
            assert good

    def test_of_a_pack(self, newest: Path, most: int | None) -> None:
        path = newest / pack_path(0)
        manifest = shardckpt.open(newest).manifest
        good = path.read_bytes()
        unused = 0
        for flipped in flips(good, most):
            path.write_bytes(flipped)
            state = state_of(0)
            try:
                shardckpt.load(newest, state)
            except CorruptError:
                assert content(state) == content(state_of(0))
            else:
                unused += 1
                assert content(state) == content(state_of(2))
        path.write_bytes(good)
        assert unused
        assert manifest.stored_bytes == len(good)

    def test_of_references(self, newest: Path, most: int | None) -> None:
        path = newest / REFS
        good = path.read_bytes()
        place = Place(open_storage(newest))
        manifest = read_manifest(place)
        for flipped in flips(good, most):
            path.write_bytes(flipped)
            report = verify_checkpoint(place, manifest, lambda *_: None)
            try:
                is_same = nodes_of(flipped) == nodes_of(good)
            except (KeyError, ValueError):
                is_same = False
            assert is_same or report.problems or report.notes, flipped


def test_restore_passes_over_any_damage(run: Path, newest: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with the newest checkpoint, restore takes the one before, and says so once."""
    whole = shutil.copytree(newest, run.parent / "whole")
    (run / "attempt-0001/attempt.json").unlink()

    def flipped(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    damages: list[Callable[[], object]] = [
        lambda: flipped(newest / MANIFEST, 20),  # in the version
        lambda: flipped(newest / MANIFEST, (newest / MANIFEST).read_bytes().index(b'"position"') + 12),
        lambda: flipped(newest / MANIFEST, (newest / MANIFEST).stat().st_size - 4),
        lambda: (newest / MANIFEST).write_bytes(b""),
        lambda: edited(newest / MANIFEST, lambda m: m.update(step=3)),
        lambda: edited(newest / MANIFEST, lambda m: m["values"].pop("model")),
        lambda: edited(newest / MANIFEST, lambda m: m["values"]["data"].update(big={"$int": "1"})),
        lambda: (newest / pack_path(0)).unlink(),
        lambda: os.truncate(newest / pack_path(0), 10),
        lambda: shutil.rmtree(newest / "rank-00000"),
    ]
    for damage in damages:
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert restored(run) == 1
        told = [
            r.getMessage()
            for r in caplog.records
            if "going on with the checkpoint before it" in r.getMessage()
        ]
        assert len(told) == 1
        assert ".;" not in told[0]
        assert (newest / BAD).exists()


def test_a_mismatch_of_the_model_is_an_error(run: Path) -> None:
    """A state that does not fit a good checkpoint: an error, and nothing older is taken instead."""
    for wrong in (
        {"model": {"w": torch.zeros(3, 4), "b": torch.zeros(7)}},
        {"model": torch.nn.Linear(2, 2)},
    ):
        checkpointer = shardckpt.Checkpointer(run, every_steps=1)
        with pytest.raises(StateError):
            checkpointer.restore({**state_of(0), **wrong})
        checkpointer.close()
    assert restored(run) == 2


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10 << 30)


_THINGS: dict[str, Callable[[Path], object]] = {
    "fifo": _fifo,
    "socket": _socket,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": _sparse,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("thing", _THINGS)
@pytest.mark.parametrize("name", [MANIFEST, pack_path(0), "part", BAD, FAILED, REFS])
def test_what_is_no_file(thing: str, name: str, run: Path, newest: Path, tmp_path: Path) -> None:
    """In the place of any file may lie anything: readers neither wait nor fill the memory, and say what it is."""
    path = part_of(newest) if name == "part" else newest / name
    path.unlink(missing_ok=True)
    _THINGS[thing](path)
    assert len(list_checkpoints(str(run))) == 2
    if name in (MANIFEST, pack_path(0)):
        assert list_checkpoints(str(run))[1].state != "good"
        state = state_of(0)
        for read in (
            lambda: shardckpt.load(newest, state),
            lambda: shardckpt.open(newest).verify(),
            lambda: shardckpt.open(newest).zarr(),
            lambda: copy(newest, tmp_path / "copy"),
            lambda: merge(newest, tmp_path / "merged.pt"),
        ):
            with pytest.raises(ShardckptError):
                read()
        assert content(state) == content(state_of(0))
        assert restored(run) == 1
    elif name == BAD and thing not in ("dangling", "folder", "loop"):
        assert restored(run) == 1
    elif name != BAD:
        assert restored(run) == 2
    if name == REFS:
        place = Place(open_storage(run), "attempt-0001/step-00000002")
        assert verify_checkpoint(place, read_manifest(place), lambda *_: None).problems


@pytest.mark.parametrize("folder", ["attempt-0001/step-00000003", "attempt-0002"])
@pytest.mark.parametrize("thing", _THINGS)
def test_what_is_no_folder(thing: str, folder: str, run: Path, tmp_path: Path) -> None:
    """In the place of a step or an attempt, too: the others are listed, checked, copied and restored."""
    _THINGS[thing](run / folder)
    assert [row.step for row in list_checkpoints(str(run)) if row.state == "good"] == [1, 2]
    assert shardckpt.open(run).step == 2
    copy(run, tmp_path / "copy")
    assert restored(run) == 2


def test_a_pack_of_a_name_that_no_file_has(newest: Path, run: Path) -> None:
    """It is missing, and the storage is not out of reach."""
    edited(newest / MANIFEST, lambda m: m["packs"][0].update(path="x" * 300))
    with pytest.raises(CorruptError, match=r"x{300}"):
        shardckpt.load(newest, state_of(0))
    assert restored(run) == 1


@pytest.mark.parametrize("name", ["pack", "manifest", "folder", "older"])
def test_links(name: str, run: Path, newest: Path, tmp_path: Path) -> None:
    """A link inside the run is followed; one that leads out of it only where that is asked for."""
    outside = tmp_path / "outside"
    outside.mkdir()
    moved = {"pack": pack_path(0), "manifest": MANIFEST, "folder": "rank-00000", "older": pack_path(0)}[
        name
    ]
    if name == "older":  # a pack of another step, by a path with ../
        other = run / "attempt-0001/step-00000009/rank-00000"
        other.mkdir(parents=True)
        (newest / moved).rename(other / "data.pack")
        edited(newest / MANIFEST, lambda m: m["packs"][0].update(path=f"../step-00000009/{moved}"))
        path = other / "data.pack"
    else:
        path = newest / moved
    inside = run / "inside"
    path.rename(inside)
    path.symlink_to(os.path.relpath(inside, path.parent))
    state = state_of(0)
    shardckpt.load(newest, state)
    assert content(state) == content(state_of(2))
    shardckpt.open(newest).zarr()
    assert list_checkpoints(str(run))[1].state == "good"
    path.unlink()
    inside.rename(outside / "file")
    path.symlink_to(outside / "file")
    state = state_of(0)
    for read in (
        lambda: shardckpt.load(newest, state),
        lambda: shardckpt.open(newest).read("model/w"),
        lambda: shardckpt.open(newest).zarr(),
        lambda: copy(newest, tmp_path / "copy"),
    ):
        with pytest.raises(FormatError, match=r"leads out of .*follow_links"):
            read()
    assert content(state) == content(state_of(0))
    assert list_checkpoints(str(run))[1].state != "good"
    assert restored(run) == 1
    assert not (newest / BAD).exists()  # nothing is wrong with it, where links are allowed
    options = {"follow_links": True}
    shardckpt.load(newest, state, storage_options=options)
    assert content(state) == content(state_of(2))
    assert list_checkpoints(str(run), options)[1].state == "good"
    copy(newest, tmp_path / "copy", source_options=options)
    shardckpt.load(tmp_path / "copy", state_of(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["values"]["model"].update(w={"$tensor": "nope"}), "name the tensor 'nope' twice, or"),
        (lambda m: m["values"].update(more={"$tensor": "model/w"}), "the tensor 'model/w' twice, or"),
        (lambda m: m["values"]["model"].pop("w"), "no value of it is the tensor 'model/w'"),
        (lambda m: m["values"].update(rng=1), "has a value at 'rng', where its values have none"),
        (lambda m: m["values"].update(more={"$per_rank": "rng"}), "per-rank value 'rng' twice"),
        (
            lambda m: m["per_rank"][0]["rng"].update(deep={"$per_rank": "rng"}),
            "per-rank value 'rng' inside another",
        ),
        (lambda m: m.update(values=[1]), "not a dict with text keys"),
        (lambda m: m.update(step=7), "of attempt 1, step 7, and lies in the folder of attempt 1, step 2"),
        (lambda m: m.update(attempt=7), "of attempt 7, step 2"),
        (lambda m: m["values"]["data"].update(n=1 << 63), "does not fit 64 bits"),
        (lambda m: m["values"]["data"].update(big={"$int": "0x1"}), r"invalid \$int"),
        (lambda m: m["values"]["data"].update(big={"$int": "0X400000000000000000"}), r"invalid \$int"),
        (
            lambda m: m["values"]["data"].update(big={"$int": "0x\u06614000000000000000000"}),
            r"invalid \$int",
        ),
        (lambda m: m["values"]["data"].update(big={"$int": " 0x400000000000000000"}), r"invalid \$int"),
        (lambda m: m["values"].update(d={"$dict": [[{"$tensor": "model/w"}, 1]]}), "unhashable key"),
        (lambda m: m["tensors"][0].update(name="model/\u0661"), "cannot be a tensor's name"),
        (lambda m: m["tensors"][0].update(name="a/" * 128 + "b"), "cannot be a tensor's name"),
        (lambda m: m["packs"].append(m["packs"][0]), "names the pack 'rank-00000/data.pack' twice"),
        (
            lambda m: m["packs"].append({"path": f"../step-00000002/{pack_path(0)}", "size": 1}),
            "names the pack .* twice",
        ),
    ],
)
def test_values_and_numbers(change: Callable[[dict[str, Any]], object], message: str, newest: Path) -> None:
    """A manifest with a right checksum, and a wrong content, is refused."""
    edited(newest / MANIFEST, change)
    with pytest.raises(FormatError, match=message):
        shardckpt.open(newest)


def test_keys_that_occur_twice(newest: Path) -> None:
    """Two members of one name are an error wherever they are: readers would take one or the other."""
    path = newest / MANIFEST
    document = records.open_sealed(path.read_bytes(), MANIFEST)
    for old, new in (
        (b'{"format"', b'{"step":1,"format"'),
        (b'"lr":', b'"lr":1,"lr":'),
        (b'"pack":', b'"pack":[],"pack":'),
    ):
        body = document.replace(old, new, 1)[:-1]
        path.write_bytes(b'%s,"crc32c":"%08x"}' % (body, crc32c.crc32c(body)))
        with pytest.raises(FormatError, match="two members named"):
            shardckpt.open(newest)


def test_limits_of_a_save(tmp_path: Path) -> None:
    """What no reader takes is not written: too many dimensions, a folder of another step."""
    with pytest.raises(UnsupportedValueError, match="65 dimensions, and the most are 64"):
        shardckpt.save(tmp_path / "a", {"t": torch.zeros((1,) * 65)})
    shardckpt.save(tmp_path / "b", {"t": torch.zeros((1,) * 64)})
    assert shardckpt.open(tmp_path / "b").read("t").shape == (1,) * 64
    with pytest.raises(StateError, match="folder of a run's step 5, and this is the state of step 4"):
        shardckpt.save(tmp_path / "attempt-0003/step-00000005", {"x": 1}, step=4)
    shardckpt.save(tmp_path / "attempt-0003/step-00000005", {"x": 1}, step=5)
    assert shardckpt.open(tmp_path / "attempt-0003/step-00000005").manifest.attempt == 3


def forged(folder: Path, shape: list[int], chunk: list[int], size: int, dtype: str = "uint8") -> Path:
    """A checkpoint of one tensor of this shape in one chunk, or none, and a pack that is empty."""
    count = 0 if 0 in shape else 1
    folder.mkdir()
    (folder / "rank-00000").mkdir()
    (folder / pack_path(0)).touch()
    record = {
        "format": "shardckpt/1",
        "id": "x",
        "step": 0,
        "attempt": 0,
        "world_size": 1,
        "created": 1.0,
        "writer": "x",
        "metrics": {},
        "values": {"t": {"$tensor": "t"}},
        "per_rank": [{}],
        "packs": [{"path": pack_path(0), "size": size}],
        "tensors": [
            {
                "name": "t",
                "dtype": dtype,
                "shape": shape,
                "arrays": [{"offset": [0] * len(shape), "shape": shape, "chunk": chunk}],
            }
        ],
        "chunks": {"pack": [0] * count, "offset": [0] * count, "crc32c": [0] * count},
    }
    (folder / MANIFEST).write_bytes(records.encode(record))
    return folder


def test_a_size_that_is_forged(tmp_path: Path) -> None:
    """A tensor larger than any memory, of which the pack has nothing: that is what is said."""
    folder = forged(tmp_path / "c", [1 << 50], [1 << 50], (1 << 50) + 4)
    for read in (
        lambda: shardckpt.load(folder, {"t": None}),
        lambda: shardckpt.open(folder).read("t"),
        lambda: shardckpt.open(folder).verify(),
        lambda: shardckpt.open(folder).zarr(),
        lambda: copy(folder, tmp_path / "copy"),
    ):
        with pytest.raises(CorruptError, match="has 0 bytes"):
            read()
    with pytest.raises(ShardckptError):
        merge(folder, tmp_path / "m.safetensors")


def test_arrays_without_elements(tmp_path: Path) -> None:
    """However many chunks there would be along its other dimensions, nobody goes through them."""
    import zarr

    folder = forged(tmp_path / "c", [0, 1 << 40], [1, 1], 0)
    checkpoint = shardckpt.open(folder)
    assert checkpoint.verify() == 0
    assert checkpoint.read("t").shape == (0, 1 << 40)
    array = checkpoint.zarr()["t"]
    assert isinstance(array, zarr.Array)
    assert np.asarray(array[...]).shape == (0, 1 << 40)
    copied = copy(folder, tmp_path / "copy")
    assert zarr.open(f"reference::{copied}/{REFS}", mode="r")["t"].shape == (0, 1 << 40)  # type: ignore[union-attr,index]
    state: State = {"t": None}
    shardckpt.load(folder, state)
    assert state["t"].shape == (0, 1 << 40)
    for shape, dtype in ([0, 1 << 62], "float32"), ([0, 1 << 40, 1 << 40], "uint8"):
        again = forged(tmp_path / str(len(shape)), shape, [1] * len(shape), 0, dtype)
        with pytest.raises(FormatError, match="no number below"):
            shardckpt.open(again)


def test_many_boxes() -> None:
    """Whether boxes tile a tensor is found in linear time, in any dimensions."""
    n = 1 << 15
    rows = [Box((i, 0), (1, 3)) for i in range(n)]
    assert tiles((n, 3), rows)
    assert not tiles((n, 3), [*rows[:-1], rows[0]])
    # Each along the other dimension than its neighbour: no dimension tells them apart.
    side = 1 << 7
    squares = [
        box
        for i in range(0, 2 * side, 2)
        for j in range(0, 2 * side, 2)
        for box in (
            [Box((i, j), (1, 2)), Box((i + 1, j), (1, 2))]
            if (i + j) % 4
            else [Box((i, j), (2, 1)), Box((i, j + 1), (2, 1))]
        )
    ]
    assert tiles((2 * side, 2 * side), squares)
    moved = [*squares[:-1], Box((0, 0), squares[-1].shape)]
    assert not tiles((2 * side, 2 * side), moved)


def test_keys_and_names_that_are_long(newest: Path) -> None:
    """A key of a megabyte over many values, and names of a megabyte: neither takes quadratic time."""
    long = "k" * (1 << 20)
    edited(newest / MANIFEST, lambda m: m["values"]["data"].update({long: [[0]] * 100_000}))
    assert len(shardckpt.open(newest).values["data"][long]) == 100_000
    edited(newest / MANIFEST, lambda m: m["tensors"][0].update(name="/".join("a" * (1 << 19))))
    with pytest.raises(FormatError, match="cannot be a tensor's name") as caught:
        shardckpt.open(newest)
    assert len(str(caught.value)) < 2000
    with pytest.raises(ShardckptError):
        shardckpt.open(newest.parent / "step-00000001").read(long)


def test_keys_of_one_hash(newest: Path) -> None:
    """Keys that all have one hash are refused, instead of being put in a dict for minutes."""
    mersenne = (1 << 61) - 1
    keys = [{"$int": hex(mersenne * (n + 8))} for n in range(50_000)]
    edited(newest / MANIFEST, lambda m: m["values"]["data"].update(d={"$dict": [[key, 0] for key in keys]}))
    with pytest.raises(FormatError, match="made to be slow"):
        shardckpt.open(newest)


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_ls_looks_at_the_packs(damage: str, run: Path, newest: Path) -> None:
    """A checkpoint is good only where its packs are there, with the right length."""
    pack = newest / pack_path(0)
    size = pack.stat().st_size
    pack.unlink() if damage == "missing" else os.truncate(pack, size + (-1 if damage == "short" else 1))
    first, second = list_checkpoints(str(run))
    assert (first.state, first.newest) == ("good", True)
    assert second.state == "damaged"
    assert pack_path(0) in second.note
    assert str(size) in second.note


def test_references_elsewhere(run: Path, newest: Path, tmp_path: Path) -> None:
    """References that lead to another folder are found, and `shardckpt refs` writes them for where they are."""
    import zarr

    place = Place(open_storage(run), "attempt-0001/step-00000002")
    manifest = read_manifest(place)

    def report() -> tuple[bool, bool]:
        found = verify_checkpoint(place, manifest, lambda *_: None)
        return bool(found.problems), bool(found.notes)

    assert report() == (False, False)
    refs = json.loads((newest / REFS).read_bytes())
    elsewhere = refs | {
        "refs": {
            key: [f"/elsewhere/{pack_path(0)}", *value[1:]] if isinstance(value, list) else value
            for key, value in refs["refs"].items()
        }
    }
    (newest / REFS).write_text(json.dumps(elsewhere))
    assert report() == (True, False)
    other = str(run / "attempt-0001/step-00000001")
    (newest / REFS).write_text(json.dumps(refs | {"templates": {"u": other}}))
    assert report() == (True, False)  # there is another checkpoint
    (newest / REFS).write_text(json.dumps(refs | {"templates": {"u": "/elsewhere"}}))
    assert report() == (False, True)
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    run.rename(tmp_path / "gone")
    assert list(write_references(str(copied)).values()) == [True, True]
    assert list(write_references(str(copied)).values()) == [False, False]
    for step in (1, 2):
        group = zarr.open(f"reference::{copied}/attempt-0001/step-{step:08d}/{REFS}", mode="r")
        assert np.asarray(group["model/w"][...]).tolist() == state_of(step)["model"]["w"].tolist()  # type: ignore[index]


def test_pt_of_odd_values(tmp_path: Path) -> None:
    """Empty bytes and large integers load with weights_only; what cannot be loaded is refused."""
    state = {
        "none": b"",
        "some": b"\xff\0",
        "large": 1 << 70,
        "larger": -(1 << 2038),
        "keys": {b"": 1, 1 << 80: 2},
    }
    shardckpt.save(tmp_path / "c", state)
    merge(tmp_path / "c", tmp_path / "c.pt")
    assert torch.load(tmp_path / "c.pt", weights_only=True) == state
    shardckpt.save(tmp_path / "d", {"n": 1 << 3000})
    with pytest.raises(StateError, match="has 3001 bits"):
        merge(tmp_path / "d", tmp_path / "d.pt")
    assert not (tmp_path / "d.pt").exists()
