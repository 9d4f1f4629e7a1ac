"""`.safetensors` files, written tensor after tensor. Uses neither torch nor the safetensors package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shardckpt.errors import StateError
from shardckpt.format.dtypes import itemsize
from shardckpt.format.foreign import SAFETENSORS
from shardckpt.format.manifest import TensorEntry
from shardckpt.interop.formats.base import FilePlan, Selection

__all__ = ["Safetensors"]

_DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}


class Safetensors:
    """Tensors only, by name. Tied ones are written once for each name, since the format cannot share them."""

    foreign = SAFETENSORS
    suffixes = (".safetensors",)

    def plan(self, selection: Selection) -> FilePlan:
        # The widest types come first, so that each tensor lies at a multiple of its item size.
        entries = sorted(selection.tensors.items(), key=lambda entry: -itemsize(entry[1].dtype))
        header = _encode_header(entries, {"format": "pt", "step": str(selection.step)})
        tensors = [tensor for _, tensor in entries]
        nbytes = len(header) + sum(tensor.nbytes for tensor in tensors)
        return FilePlan(nbytes, tensors, partial(_write, header))


def _encode_header(entries: Sequence[tuple[str, TensorEntry]], metadata: Mapping[str, str]) -> bytes:
    """The file's first bytes, up to the first tensor; the tensors follow in the order of `entries`.

    Raises StateError for a type that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in entries:
        if tensor.dtype not in _DTYPES:
            raise StateError(
                f"{name!r} is {tensor.dtype}, which safetensors does not have. Leave it out with "
                "--select, or merge into a .pt file"
            )
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _write(header: bytes, file: BinaryIO, content: Iterator[npt.NDArray[Any]]) -> Iterator[int]:
    file.write(header)
    while (array := next(content, None)) is not None:
        file.write(array.reshape(-1).view(np.uint8).data)
        yield array.nbytes
        del array  # before the next piece is read
