"""`shardckpt verify`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardckpt
from shardckpt.format.manifest import REFS
from tests.shardckpt.cli.helpers import Call, change, flip


def test_a_good_one(call: Call, run: Path, newest: Path) -> None:
    code, out, err = call("verify", run)
    assert (code, err) == (0, "")
    assert out.startswith(f"{newest} is good: 9 chunks, 1.1 KiB, every checksum is right")


def test_names_every_bad_chunk(call: Call, newest: Path) -> None:
    """Not the first only."""
    offsets = shardckpt.open(newest).manifest.chunks.offset
    flip(newest / "rank-00000/data.pack", offsets[1])
    flip(newest / "rank-00000/data.pack", offsets[4] + 3)
    code, out, _ = call("verify", newest)
    assert code == 4
    assert f"{newest} is corrupt: 2 problems in 9 chunks" in out
    assert "the chunk of 'model/0.bias' at [0], shape [8] (pack rank-00000/data.pack, byte 320)" in out
    assert "the chunk of 'model/2.weight' at [0, 0]" in out
    code, out, _ = call("verify", newest, "--json")
    document = json.loads(out)
    assert (code, document["ok"], len(document["problems"])) == (4, False, 2)


def test_a_checksum_in_the_pack(call: Call, newest: Path) -> None:
    """The four bytes after a chunk, which plain Zarr goes by."""
    flip(newest / "rank-00000/data.pack", shardckpt.open(newest).manifest.chunks.offset[0] + 256)
    assert call("verify", newest)[0] == 4


def test_a_truncated_pack(call: Call, newest: Path) -> None:
    pack = newest / "rank-00000/data.pack"
    whole = pack.stat().st_size
    os.truncate(pack, 400)
    code, out, _ = call("verify", newest)
    assert code == 4
    assert f"the pack rank-00000/data.pack has 400 bytes and should have {whole}" in out
    assert "'model/1.weight'" in out
    pack.unlink()
    code, out, _ = call("verify", newest)
    assert code == 4
    assert "the pack rank-00000/data.pack is missing" in out


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda refs: refs["refs"]["model/0.weight/c/0/0"].__setitem__(1, 64),
            "'model/0.weight/c/0/0'",
        ),
        (lambda refs: refs["refs"].pop("model/1.bias/c/0"), "'model/1.bias/c/0'"),
        (lambda refs: refs["refs"].update(extra="{}"), "'extra'"),
        (lambda refs: refs["refs"].update({"model/zarr.json": "{}"}), "'model/zarr.json'"),
        (
            lambda refs: refs["refs"]["model/0.bias/c/0"].__setitem__(0, "{{u}}/other"),
            "'model/0.bias/c/0'",
        ),
        (lambda refs: refs.pop("refs"), "is not a reference file"),
    ],
)
def test_references_that_disagree(
    call: Call, newest: Path, edit: Callable[[Any], object], text: str
) -> None:
    change(newest / REFS, edit)
    code, out, _ = call("verify", newest)
    assert code == 4
    assert REFS in out and text in out


def test_references_that_are_missing(call: Call, newest: Path) -> None:
    (newest / REFS).unlink()
    code, out, _ = call("verify", newest)
    assert code == 4
    assert "refs.json is missing" in out


def test_a_moved_checkpoint_is_good(call: Call, newest: Path, made: Path) -> None:
    """Only Zarr readers need an update: that is a note, not damage."""
    code, out, _ = call("verify", newest)
    assert code == 0
    assert f"refs.json points to {made}/attempt-0002/step-00000150: the checkpoint was moved" in out
    assert "note:" not in call("verify", made)[1]
