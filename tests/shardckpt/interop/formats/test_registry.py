"""What holds for every file format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.format.foreign import HEAD_BYTES, recognize_file
from shardckpt.interop.formats.base import Format
from shardckpt.interop.formats.registry import FORMATS, SUFFIXES, format_of


@pytest.mark.parametrize("each", FORMATS, ids=lambda each: each.foreign.name)
def test_a_file_is_recognized_by_its_content(each: Format, tmp_path: Path) -> None:
    """As the format that wrote it."""
    shardckpt.save(tmp_path / "checkpoint", {"w": torch.arange(10), "empty": torch.zeros(0)})
    for suffix in each.suffixes:
        file = tmp_path / f"file{suffix}"
        shardckpt.merge(tmp_path / "checkpoint", file)
        content = file.read_bytes()
        assert recognize_file(content[:HEAD_BYTES], len(content)) is each.foreign


def test_a_suffix_selects_one_format() -> None:
    assert len(set(SUFFIXES)) == len(SUFFIXES)
    for each in FORMATS:
        assert all(format_of(Path(f"a.b{suffix}")) is each for suffix in each.suffixes)
    with pytest.raises(ValueError, match=r"a\.zip: the name must end with \.safetensors or \.pt"):
        format_of(Path("a.zip"))


def test_formats_are_known_without_torch() -> None:
    """Every command knows them; torch takes seconds to import."""
    code = "import sys, shardckpt.interop.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
