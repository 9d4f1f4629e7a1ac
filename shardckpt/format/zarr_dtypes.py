"""bfloat16 and the float8 types for Zarr, which lacks them: importing this module registers them.

Names, metadata and bytes are those that TensorStore writes and reads. Zarr finds this module through the
package's entry points, so that a plain `zarr.open` reads these types where shardckpt is installed. It imports
neither torch nor the rest of this package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from zarr.buffer.cpu import Buffer
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import ZDType, data_type_registry

try:  # where zarr 3.4 has it, which warns of the other place
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined]
except ImportError:
    from zarr.dtype import DataTypeValidationError

from shardckpt.format.dtypes import EXTENDED

__all__ = [
    "BFloat16",
    "Buffer",
    "Float8E4M3FN",
    "Float8E4M3FNUZ",
    "Float8E5M2",
    "Float8E5M2FNUZ",
    "Float8E8M0FNU",
]

# Zarr 3.1 collects the entry points of data types without loading them, but loads those of buffers before
# it reads any metadata. `Buffer`, Zarr's own, is one for this module: registering it again changes nothing.

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class _MlDtype(ZDType[np.dtype[Any], np.generic], HasItemSize):
    """A floating-point type of ml_dtypes, in Zarr v3 only."""

    _zarr_v3_name: ClassVar[str]

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return self._native().itemsize

    @classmethod
    def _native(cls) -> np.dtype[Any]:
        return EXTENDED[cls._zarr_v3_name]

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """The Zarr type of a NumPy type. Raises DataTypeValidationError for any other one."""
        if dtype != cls._native():
            raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        """The NumPy type."""
        return self._native()

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"Zarr v2 has no {cls._zarr_v3_name}, found {data!r}")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name}")
        return cls()

    def to_json(self, zarr_format: int) -> Any:
        """The type's name in array metadata. Raises ValueError for Zarr v2."""
        if zarr_format != 3:
            raise ValueError(f"Zarr v2 has no {self._zarr_v3_name}; use zarr_format=3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, float, np.number, type(self._scalar(0))))

    def cast_scalar(self, data: object) -> np.generic:
        """`data` as an element of this type. Raises TypeError if it is no number."""
        if not self._check_scalar(data):
            raise TypeError(f"{data!r} is not a scalar that {self._zarr_v3_name} can hold")
        return self._scalar(data)

    def default_scalar(self) -> np.generic:
        """Zero."""
        return self._scalar(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> np.generic:
        """A fill value in metadata: a number, NaN, an infinity, or an element's bits as "0x7fc0"."""
        del zarr_format
        if isinstance(data, str) and data.startswith("0x"):
            bits = int(data, 16).to_bytes(self.item_size, "little")
            element: np.generic = np.frombuffer(bits, dtype=self._native())[0]
            return element
        if isinstance(data, str) and data not in _SPECIAL:
            raise TypeError(f"{data!r} is not a fill value of {self._zarr_v3_name}")
        return self.cast_scalar(_SPECIAL[data] if isinstance(data, str) else data)

    def to_json_scalar(self, data: object, *, zarr_format: int) -> float | str:
        """The reverse of from_json_scalar."""
        del zarr_format
        value = float(self.cast_scalar(data))
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")

    def _scalar(self, data: Any) -> np.generic:
        element: np.generic = self._native().type(data)
        return element


@dataclass(frozen=True, kw_only=True)
class BFloat16(_MlDtype, HasEndianness):
    """bfloat16, little-endian; NumPy has no other."""

    _zarr_v3_name: ClassVar[str] = "bfloat16"

    def to_native_dtype(self) -> np.dtype[Any]:
        """The NumPy type. Raises ValueError for big-endian data."""
        if self.endianness != "little":
            raise ValueError(f"bfloat16 is read little-endian only, and this array is {self.endianness}")
        return self._native()


class Float8E4M3FN(_MlDtype):
    """float8_e4m3fn."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3fn"


class Float8E4M3FNUZ(_MlDtype):
    """float8_e4m3fnuz."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3fnuz"


class Float8E5M2(_MlDtype):
    """float8_e5m2."""

    _zarr_v3_name: ClassVar[str] = "float8_e5m2"


class Float8E5M2FNUZ(_MlDtype):
    """float8_e5m2fnuz."""

    _zarr_v3_name: ClassVar[str] = "float8_e5m2fnuz"


class Float8E8M0FNU(_MlDtype):
    """float8_e8m0fnu: powers of two, without zero or sign."""

    _zarr_v3_name: ClassVar[str] = "float8_e8m0fnu"

    def default_scalar(self) -> np.generic:
        """One: the type has no zero."""
        return self._scalar(1)


for _type in (BFloat16, Float8E4M3FN, Float8E4M3FNUZ, Float8E5M2, Float8E5M2FNUZ, Float8E8M0FNU):
    data_type_registry.register(_type._zarr_v3_name, _type)
