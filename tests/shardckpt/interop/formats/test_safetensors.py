"""`.safetensors` files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import safe_open

import shardckpt
from shardckpt.errors import (
    StateError,
)
from shardckpt.interop.export import merge
from tests.shardckpt.interop.helpers import (
    DTYPES,
    Tied,
    same,
)


def test_every_tensor_by_name(saved: str, state: dict[str, Any], tmp_path: Path) -> None:
    """Also tied ones, which the format cannot share, and types that its own package maps."""
    names = [name for name in shardckpt.open(saved).tensors if name != "types/complex128"]
    merged = merge(saved, tmp_path / "out.safetensors", select=[_escaped(name) for name in names])
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert set(found) == set(names)
    assert merged.tensors == len(names)
    for name in DTYPES:
        if name != "complex128":
            assert same(found[f"types/{name}"], state["types"][name]), name
    weight = state["model"].embedding.weight.data
    assert same(found["model/embedding.weight"], weight)
    assert same(found["model/head.weight"], weight)
    assert found["odd/1"].shape == (0, 4)
    assert found["odd/0"].shape == ()
    content = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in found.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_only_gives_names_that_the_model_takes(saved: str, state: dict[str, Any], tmp_path: Path) -> None:
    merge(saved, tmp_path / "out.safetensors", only="model")
    model = Tied()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "out.safetensors"))
    assert all(map(same, model.state_dict().values(), state["model"].state_dict().values()))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}


def test_only_gives_keys_as_they_are(saved: str, tmp_path: Path) -> None:
    """A slash in a key is encoded in the checkpoint's names, and is a slash again here."""
    merge(saved, tmp_path / "out.safetensors", only="a%2Fb")
    assert set(safetensors.torch.load_file(tmp_path / "out.safetensors")) == {"c/d"}


def test_a_type_that_the_format_lacks(saved: str, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"'types/complex128' is complex128.*\.pt"):
        merge(saved, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def _escaped(name: str) -> str:
    return name.replace("[", "[[]")
