"""`.pt` files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shardckpt
from shardckpt.interop.export import merge
from tests.shardckpt.interop.helpers import (
    Tied,
    same,
)


def test_has_the_state_as_it_was_saved(saved: str, state: dict[str, Any], tmp_path: Path) -> None:
    """Nested, with plain values in place, and nothing that weights_only refuses."""
    merged = merge(saved, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(found) == list(state)
    assert merged.tensors == len(shardckpt.open(saved).tensors)
    assert merged.nbytes == (tmp_path / "out.pt").stat().st_size
    for name, tensor in state["types"].items():
        assert same(found["types"][name], tensor), name
    plain = dict(found["plain"])
    assert np.isnan(plain.pop("nan"))
    assert plain == {"none": None, "bytes": b"\0\xff", "big": 2**70, 1: [True, (1, "ü")]}
    assert all(same(a, torch.as_tensor(b)) for a, b in zip(found["odd"], state["odd"], strict=True))
    assert [(list(rank["state"]), rank["count"]) for rank in found["rng"]] == [(list(range(7)), 3)]
    assert found["a/b"]["c/d"].tolist() == [1, 1]
    for name, entry in state["optimizer"].state_dict()["state"].items():
        group = found["optimizer"]["param_groups"][0]
        saved_entry = found["optimizer"]["state"][group["params"][name]]
        assert same(saved_entry["exp_avg"], entry["exp_avg"])


def test_tied_tensors_stay_tied(saved: str, tmp_path: Path) -> None:
    merge(saved, tmp_path / "out.pt", only="model")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["embedding.weight"].data_ptr() == found["head.weight"].data_ptr()
    model = Tied()
    model.load_state_dict(found)
    assert model.head.weight is model.embedding.weight


def test_is_a_sound_archive_that_can_be_mapped(saved: str, state: dict[str, Any], tmp_path: Path) -> None:
    """Its checksums are right, and every storage is aligned."""
    merge(saved, tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
    found = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    for name, tensor in state["types"].items():
        assert same(found["types"][name], tensor), name
        assert found["types"][name].data_ptr() % 64 == 0


def test_select_makes_a_flat_dict(saved: str, state: dict[str, Any], tmp_path: Path) -> None:
    merge(saved, tmp_path / "out.pt", select=["model/block.*", "types/b*"])
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(found) == {"model/block.weight", "model/block.bias", "types/bool", "types/bfloat16"}
    assert same(found["model/block.bias"], state["model"].block.bias.data)


def test_one_tensor(saved: str, tmp_path: Path) -> None:
    merge(saved, tmp_path / "out.pt", only="odd/0")
    assert torch.load(tmp_path / "out.pt", weights_only=True) == torch.tensor(2.5)
