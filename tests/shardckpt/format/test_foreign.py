"""Formats of other tools, recognized by a file's first bytes or a folder's names."""

from __future__ import annotations

import pytest

from shardckpt.format.foreign import (
    DCP,
    SAFETENSORS,
    TORCH_SAVE,
    ForeignFormat,
    recognize_file,
    recognize_folder,
)


@pytest.mark.parametrize(
    ("head", "size", "expected"),
    [
        (b"PK\x03\x04" + bytes(12), 1000, TORCH_SAVE),
        (b"\x80\x02\x8a\x0a" + bytes(12), 1000, TORCH_SAVE),
        ((100).to_bytes(8, "little") + b'{"a":{', 1000, SAFETENSORS),
        ((100).to_bytes(8, "little") + b'{"a":{', 100, None),  # a header longer than the file
        (b"{" * 16, 100, None),
        (b"", 0, None),
        (b"PK", 2, None),
    ],
)
def test_files(head: bytes, size: int, expected: ForeignFormat | None) -> None:
    assert recognize_file(head, size) is expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([".metadata", "__0_0.distcp"], DCP),
        (["config.json", "model-00001-of-00002.safetensors"], SAFETENSORS),
        (["attempt-0001"], None),
        ([], None),
    ],
)
def test_folders(names: list[str], expected: ForeignFormat | None) -> None:
    assert recognize_folder(names) is expected
