"""`shardckpt info`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

import shardckpt
from tests.shardckpt.cli.helpers import Call


def test_tensors_of_one_kind_share_a_row(call: Call, run: Path) -> None:
    """Names that differ in numbers only, so that ten thousand tensors fit on a screen."""
    code, out, _ = call("info", run)
    assert code == 0
    assert re.search(r"^checkpoint +\S+/attempt-0002/step-00000150$", out, re.MULTILINE)
    assert re.search(r"^step +150$", out, re.MULTILINE)
    assert re.search(r"^tensors +9 tensors, 1\.1 KiB$", out, re.MULTILINE)
    assert re.search(r"^model/\{0\.\.3\}\.weight +8x8 +float32 +4 +1\.0 KiB +4$", out, re.MULTILINE)
    assert re.search(r"^sampler/position +1500$", out, re.MULTILINE)
    assert re.search(r"^rng +one for each rank$", out, re.MULTILINE)


def test_all_has_a_row_for_each(call: Call, run: Path) -> None:
    _, out, _ = call("info", run, "--all")
    assert all(re.search(rf"^model/{i}\.bias +8 +float32 +32 B +1$", out, re.MULTILINE) for i in range(4))


def test_select(call: Call, run: Path) -> None:
    """By pattern, of tensors and of values."""
    _, out, _ = call("info", run, "--select", "model/[12].*", "--select", "*position")
    names = re.findall(r"^(\S+/\S+) ", out, re.MULTILINE)
    assert names == [
        "model/1.weight",
        "model/1.bias",
        "model/2.weight",
        "model/2.bias",
        "sampler/position",
    ]
    _, out, _ = call("info", run, "--select", "model/0*", "--json")
    document = json.loads(out)
    assert [tensor["name"] for tensor in document["tensors"]] == ["model/0.weight", "model/0.bias"]
    assert "values" not in document


def test_json(call: Call, newest: Path) -> None:
    code, out, _ = call("info", newest, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["url"] == str(newest)
    assert (document["step"], document["attempt"], document["world_size"]) == (150, 2, 1)
    assert document["tensors"][0] == {
        "name": "model/0.weight",
        "shape": [8, 8],
        "dtype": "float32",
        "bytes": 256,
        "chunks": 1,
    }
    assert document["values"]["sampler"] == {"position": 1500}


def test_ten_thousand_tensors(call: Call, tmp_path: Path) -> None:
    """A few rows, quickly."""
    state = {f"layers.{i}": {k: torch.ones(2) for k in "qkvo"} for i in range(2500)}
    shardckpt.save(tmp_path / "many", {"model": state, "names": [f"layer {i}" for i in range(10_000)]})
    code, out, _ = call("info", tmp_path / "many")
    assert code == 0
    assert re.search(
        r"^model/layers\.\{0\.\.2499\}/q +2 +float32 +2,500 +19\.5 KiB +2,500$", out, re.MULTILINE
    )
    assert re.search(r"^names +\['layer 0', .* \.\.\. \(10,000 items\)$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) < 150
    assert len(out.splitlines()) < 20


def test_a_pattern_that_matches_nothing(call: Call, run: Path) -> None:
    code, out, err = call("info", run, "--select", "modle/*")
    assert (code, out) == (2, "")
    assert "nothing in" in err and "'modle/*'" in err and "model/0.weight" in err


def test_info_of_integers_that_python_does_not_write(call: Call, tmp_path: Path) -> None:
    """In decimal digits it writes no more than some thousand."""
    huge = 1 << 20_000
    state = {"n": huge, "set": {huge}}
    shardckpt.save(tmp_path / "c", state)
    code, out, err = call("info", tmp_path / "c")
    assert (code, err) == (0, "")
    assert "0x1000" in out
    assert "too long to be shown" in out
