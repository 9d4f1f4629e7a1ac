"""Other formats where a checkpoint was expected: what they are, and what to do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardckpt
from shardckpt.errors import NotACheckpointError
from shardckpt.loading.listing import list_checkpoints


def dcp(path: Path) -> None:
    path.mkdir()
    (path / ".metadata").touch()
    (path / "__0_0.distcp").touch()


def hugging_face(path: Path) -> None:
    path.mkdir()
    (path / "config.json").touch()
    (path / "model-00001-of-00002.safetensors").touch()


def unfinished(path: Path) -> None:
    (path / "attempt-0001" / "step-00000001").mkdir(parents=True)


MADE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torch": (
        lambda path: torch.save({"a": torch.ones(2)}, path),
        "it is a torch.save file. Load it with",
    ),
    "old torch": (
        lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "it is a torch.save file. Load it with",
    ),
    "safetensors": (
        lambda path: save_file({"a": torch.ones(2)}, path),
        "it is a safetensors file. Load it",
    ),
    "dcp": (dcp, r"it is a checkpoint of torch.distributed.checkpoint \(DCP\). Load your state"),
    "hugging face": (hugging_face, "it has safetensors files. Load them"),
    "empty file": (lambda path: path.touch(), "it is a file of 0 bytes, of no kind that is known"),
    "text": (lambda path: path.write_text("{" * 100), "it is a file of 100 bytes, of no kind"),
    "nothing": (lambda path: path, "nothing is there. Check the URL"),
    "run": (unfinished, "it is a run, but no save in it was ever finished"),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_is_there_is_told(tmp_path: Path, kind: str) -> None:
    make, told = MADE[kind]
    make(tmp_path / "there")
    with pytest.raises(
        NotACheckpointError, match=rf"/there is neither a checkpoint nor a run with one: {told}"
    ):
        shardckpt.open(tmp_path / "there")
    with pytest.raises(NotACheckpointError, match=told):
        shardckpt.load(tmp_path / "there", {"a": torch.ones(2)})
    if kind != "run":
        with pytest.raises(NotACheckpointError, match=told):
            list_checkpoints(tmp_path / "there", None)
