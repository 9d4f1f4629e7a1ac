"""`.pt` files as torch.save writes them, written tensor after tensor: the state is never held as a whole.

Such a file is a zip archive: `data.pkl`, a pickle in which a tensor is a call that rebuilds it from a
numbered storage, and each storage's bytes as `data/NUMBER`, aligned to 64 bytes so that they can be mapped.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shardckpt.format.foreign import TORCH_SAVE
from shardckpt.format.manifest import TensorEntry
from shardckpt.interop.formats.base import FilePlan, Selection

__all__ = ["TorchPt"]

_ALIGN = 64
_LOCAL_HEADER = 30
_ZIP64_FIELD = 20
_ZIP64_FROM = 1 << 31


class TorchPt:
    """The whole state, nested as it was saved, for `torch.load(weights_only=True)`, also with mmap=True.

    Tied tensors share memory there. PerRank values are lists by rank, NumPy arrays are tensors.
    """

    foreign = TORCH_SAVE
    suffixes = (".pt",)

    def plan(self, selection: Selection) -> FilePlan:
        from shardckpt.interop.formats.torch_pickle import pickle_state  # torch takes seconds to import

        pickled, storages = pickle_state(selection.tree, selection.entries, selection.tied)
        nbytes = len(pickled) + sum(tensor.nbytes for tensor in storages)
        return FilePlan(nbytes, storages, partial(_write, pickled, storages))


def _write(
    pickled: bytes, storages: Sequence[TensorEntry], file: BinaryIO, content: Iterator[npt.NDArray[Any]]
) -> Iterator[int]:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little")):
            with _record(archive, file, name, len(data)) as record:
                record.write(data)
        for number, tensor in enumerate(storages):
            left = tensor.nbytes
            with _record(archive, file, f"data/{number}", left) as record:
                while left:
                    array = next(content)
                    left -= array.nbytes
                    record.write(array.reshape(-1).view(np.uint8).data)
                    yield array.nbytes
                    del array  # before the next piece is read
        with _record(archive, file, "version", 2) as record:
            record.write(b"3\n")


def _record(archive: zipfile.ZipFile, file: BinaryIO, name: str, nbytes: int) -> Any:
    """A new entry of the archive, to write to; its first byte lies at a multiple of 64."""
    info = zipfile.ZipInfo(f"archive/{name}")
    zip64 = nbytes >= _ZIP64_FROM
    begin = file.tell() + _LOCAL_HEADER + len(info.filename) + 4 + (_ZIP64_FIELD if zip64 else 0)
    padding = -begin % _ALIGN
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    return archive.open(info, "w", force_zip64=zip64)
