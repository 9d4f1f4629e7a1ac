"""`shardckpt merge`."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from tests.shardckpt.cli.helpers import Call


def test_weights_of_the_model(call: Call, run: Path, tmp_path: Path) -> None:
    code, out, err = call("merge", run, tmp_path / "w.safetensors", "--only", "model")
    assert (code, out, err) == (0, f"{tmp_path}/w.safetensors: 8 tensors, 1.7 KiB\n", "")
    found = safetensors.torch.load_file(tmp_path / "w.safetensors")
    nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).load_state_dict(found)


def test_everything(call: Call, newest: Path, tmp_path: Path) -> None:
    code, out, _ = call("merge", newest, tmp_path / "w.pt", "--json")
    document = json.loads(out)
    assert (code, document["url"], document["tensors"]) == (0, str(newest), 9)
    assert document["bytes"] == (tmp_path / "w.pt").stat().st_size
    found = torch.load(tmp_path / "w.pt", weights_only=True)
    assert found["sampler"] == {"position": 1500}
    assert found["rng"][0].tolist() == [0, 1, 2]


def test_select_and_force(call: Call, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert call("merge", run, out)[0] == 0
    code, _, err = call("merge", run, out, "--select", "model/0.*")
    assert code == 6
    assert err.startswith(
        f"shardckpt: {out} exists already; it was left as it is. To replace it, give --force"
    )
    assert call("merge", run, out, "--select", "model/0.*", "--force")[0] == 0
    assert set(safetensors.torch.load_file(out)) == {"model/0.weight", "model/0.bias"}
