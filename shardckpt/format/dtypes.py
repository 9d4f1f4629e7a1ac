"""The element types that a checkpoint can hold, by name.

The names are Zarr's, and PyTorch's without `torch.`: `float32`, `bfloat16`, `float8_e4m3fn`. Types that NumPy
lacks are those of ml_dtypes, which TensorStore and JAX use, too, with the same bytes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "EXTENDED", "fill_value", "itemsize", "numpy_dtype"]

EXTENDED: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
}
"""Types that NumPy and Zarr 3.1 lack: name -> NumPy dtype."""

DTYPES: dict[str, np.dtype[Any]] = {
    **{
        name: np.dtype(name)
        for name in (
            "bool",
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "float16",
            "float32",
            "float64",
            "complex64",
            "complex128",
        )
    },
    **EXTENDED,
}
"""Every type of format shardckpt/1: name -> little-endian NumPy dtype."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of the type `name`. Raises KeyError for a name that the format lacks."""
    return DTYPES[name]


def itemsize(name: str) -> int:
    """Bytes per element of the type `name`."""
    return DTYPES[name].itemsize


def fill_value(name: str) -> bool | int | str | list[str]:
    """The Zarr fill value of the type `name`, as JSON: NaN for floats, so that a hole never looks like data."""
    if name == "bool":
        return False
    if name.startswith("complex"):
        return ["NaN", "NaN"]
    if "float" in name:
        return "NaN"
    return 0
