"""`shardckpt reshard` and `shardckpt copy`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardckpt.format.manifest import MANIFEST
from tests.shardckpt.cli.helpers import Call, change


def test_reshard(call: Call, newest: Path, tmp_path: Path) -> None:
    code, out, err = call("reshard", newest, tmp_path / "out", "--world-size", 3)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}/out: 3 ranks, ")
    assert call("verify", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("rank-*/data.pack"))) == 3
    code, out, err = call("reshard", newest, tmp_path / "out", "--world-size", 2)
    assert code == 6
    assert "has a checkpoint already" in err


def test_reshard_says_what_has_no_place(call: Call, newest: Path, tmp_path: Path) -> None:
    """A world of one has no place for the values of rank 1."""

    def second_rank(manifest: Any) -> None:
        manifest["per_rank"].append({"rng": [1, 2]})
        manifest["world_size"] = 2

    change(newest / MANIFEST, second_rank)
    code, out, err = call("reshard", newest, tmp_path / "out", "--world-size", 1, "--json")
    assert code == 0
    assert json.loads(out)["dropped_ranks"] == [1]
    assert err == ("shardckpt: the PerRank values of rank 1 are left out: the new checkpoint has 1 rank\n")


def test_by_way_of_s3(call: Call, run: Path, tmp_path: Path, s3: tuple[str, list[str]]) -> None:
    """Every command takes a URL, with the endpoint from the command line."""
    url, endpoint = s3
    code, out, _ = call("copy", run, url, *endpoint)
    assert (code, out) == (0, f"{url}/attempt-0002/step-00000150\n")
    assert [
        row["newest"] for row in json.loads(call("ls", url, "--json", *endpoint)[1])["checkpoints"]
    ] == [True]
    assert json.loads(call("info", url, "--json", *endpoint)[1])["step"] == 150
    assert call("verify", url, *endpoint)[0] == 0
    assert call("merge", url, tmp_path / "w.pt", *endpoint)[0] == 0
    assert call("reshard", url, f"{url}-3", "--world-size", 3, *endpoint)[0] == 0
    assert call("reshard", f"{url}-3", tmp_path / "back", "--world-size", 1, *endpoint)[0] == 0
    assert call("verify", tmp_path / "back")[0] == 0
    code, _, err = call("ls", f"{url}-nothing", *endpoint)
    assert code == 3
    assert "nothing is there" in err
