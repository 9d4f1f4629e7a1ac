"""What ranks hold of a state's tensors: one rank's layout, and the layouts of a world.

Most ranks of a world are alike: they hold the same tensors, split in the same way, and differ only by their place
in the meshes. So a world is described by the few layouts that differ, by which rank has which, and by each rank's
coordinates in its meshes: some bytes a rank, whatever the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from shardckpt.format.box import Box

__all__ = ["OWN", "Layout", "RankLayout", "Split", "WorldLayout"]

OWN = "\0"
"""In the name of a tensor that each rank has its own of: stands for `/rank-00003` on rank 3. No name has it."""

_DIGEST = 16  # bytes
_T = TypeVar("_T", bound=Hashable)


class Split(NamedTuple):
    """One split of a tensor's dimension over a dimension of a mesh.

    Attributes:
        dim: the tensor's dimension.
        parts: number of parts: the size of the mesh's dimension.
        axis: number of the mesh's dimension. The rank's coordinate along it is the number of its part.
        factor: see `split_strided`; 1 for an even split.
    """

    dim: int
    parts: int
    axis: int
    factor: int = 1


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """What one rank, or each rank of many that are alike, holds of one tensor.

    Attributes:
        name: the tensor's name.
        dtype: the name of its element type.
        shape: its global shape.
        boxes: the parts that the rank holds; empty with a mesh.
        alias: another name on this rank with the same memory, which is stored once; None if there is none.
        first_holder: if True, ranks that hold the same box need not agree, and the lowest rank's content is
            stored, as for the buffers of DDP.
        mesh: number of the mesh that the tensor is split over, among the rank's meshes. The boxes of each rank
            follow from `splits` and its coordinates. None: they are `boxes`.
        splits: how, in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    alias: str | None = None
    first_holder: bool = False
    mesh: int | None = None
    splits: tuple[Split, ...] = ()


class _Common(msgspec.Struct, frozen=True, array_like=True):
    """The part of a layout that ranks have in common with others. See RankLayout."""

    meshes: tuple[tuple[int, ...], ...]
    layouts: tuple[Layout | None, ...]


_Own = tuple[Layout, ...]


@dataclass(frozen=True)
class RankLayout:
    """What one rank holds.

    Attributes:
        meshes: the shapes of the meshes that its tensors are split over.
        coordinates: the rank's coordinates in these meshes, one mesh after another; -1 along each dimension of
            a mesh that it is not in.
        common: its tensors in order. None for one that other ranks, which are alike otherwise, may lack or hold
            in another shape: the next of `own`.
        own: these tensors. `OWN` in a name stands for the rank.
    """

    meshes: tuple[tuple[int, ...], ...]
    coordinates: tuple[int, ...]
    common: tuple[Layout | None, ...]
    own: tuple[Layout, ...] = ()

    @cached_property
    def digest(self) -> bytes:
        """Equal for two ranks only if their layouts are: a digest of each part, and the coordinates."""
        parts = (self._common, self.own)
        digests = [
            hashlib.blake2b(msgspec.msgpack.encode(part), digest_size=_DIGEST).digest() for part in parts
        ]
        return b"".join([*digests, np.array(self.coordinates, dtype="<i4").tobytes()])

    @property
    def _common(self) -> _Common:
        return _Common(self.meshes, self.common)

    def share(self, rank: int, gather: Callable[[bytes], Sequence[bytes]]) -> WorldLayout:
        """Find out what all ranks hold. Collective.

        Args:
            rank: this rank's number.
            gather: returns what every rank passes to it, by rank. Each rank passes its digest, and then those
                that are the first of their kind pass what they hold.
        """
        digests = gather(self.digest)
        kinds = [
            _numbers([digest[start : start + _DIGEST] for digest in digests]) for start in (0, _DIGEST)
        ]
        told = tuple(
            content if _first_ranks(kind)[kind[rank]] == rank else None
            for kind, content in zip(kinds, (self._common, self.own), strict=True)
        )
        contents = gather(msgspec.msgpack.encode(told) if any(part is not None for part in told) else b"")
        found: tuple[list[_Common], list[_Own]] = ([], [])
        for content in contents:
            if content:
                common, own = msgspec.msgpack.decode(content, type=tuple[_Common | None, _Own | None])
                found[0].extend([common] if common is not None else [])
                found[1].extend([own] if own is not None else [])
        coordinates = _columns([digest[2 * _DIGEST :] for digest in digests])
        return WorldLayout(tuple(found[0]), tuple(found[1]), kinds[0], kinds[1], coordinates)


class _Encoded(msgspec.Struct, frozen=True, array_like=True):
    commons: tuple[_Common, ...]
    owns: tuple[_Own, ...]
    common_of: bytes
    own_of: bytes
    coordinates: bytes


@dataclass(frozen=True, eq=False)
class WorldLayout:
    """What all ranks of a world hold. The same on every rank.

    Attributes:
        commons: the different common parts of ranks' layouts, in the order of their first ranks.
        owns: the different own parts.
        common_of, own_of: by rank, which of these it has.
        coordinates: by rank, its coordinates in its meshes, as a RankLayout has them.
    """

    commons: tuple[_Common, ...]
    owns: tuple[_Own, ...]
    common_of: npt.NDArray[np.int32]
    own_of: npt.NDArray[np.int32]
    coordinates: npt.NDArray[np.int32]

    @classmethod
    def of(cls, layouts: Sequence[RankLayout]) -> WorldLayout:
        """The world of ranks with these layouts."""
        known: dict[object, int] = {}  # by identity, since ranks may share what is large
        numbers: dict[_Common, int] = {}
        for rank in layouts:
            key = (id(rank.common), rank.meshes)
            if key not in known:
                known[key] = numbers.setdefault(rank._common, len(numbers))
        common_of = [known[id(rank.common), rank.meshes] for rank in layouts]
        owns = [rank.own for rank in layouts]
        coordinates = [np.array(rank.coordinates, dtype="<i4").tobytes() for rank in layouts]
        return cls(
            tuple(numbers),
            tuple(dict.fromkeys(owns)),
            np.array(common_of, dtype=np.int32),
            _numbers(owns),
            _columns(coordinates),
        )

    @classmethod
    def of_boxes(cls, layouts: Sequence[Sequence[Layout]]) -> WorldLayout:
        """The world of ranks that hold these tensors, by rank, none of them split over a mesh."""
        return cls.of([RankLayout((), (), tuple(held)) for held in layouts])

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.common_of)

    def ranks_of(self, common: int) -> npt.NDArray[np.int32]:
        """The ranks that have this common part."""
        return np.flatnonzero(self.common_of == common).astype(np.int32)

    def coordinates_in(self, common: int, mesh: int) -> npt.NDArray[np.int32]:
        """Each rank's coordinates in a mesh of this common part, of which ranks without it have no use."""
        sizes = [len(shape) for shape in self.commons[common].meshes]
        start = sum(sizes[:mesh])
        return self.coordinates[:, start : start + sizes[mesh]]

    def encode(self) -> bytes:
        """The world as bytes, some for each rank and for each tensor."""
        columns = (self.common_of, self.own_of, self.coordinates)
        return msgspec.msgpack.encode(_Encoded(self.commons, self.owns, *(c.tobytes() for c in columns)))

    @classmethod
    def decode(cls, data: bytes) -> WorldLayout:
        """The world that `encode` encoded."""
        found = msgspec.msgpack.decode(data, type=_Encoded)
        common_of, own_of, coordinates = (
            np.frombuffer(column, dtype="<i4")
            for column in (found.common_of, found.own_of, found.coordinates)
        )
        return cls(found.commons, found.owns, common_of, own_of, coordinates.reshape(len(common_of), -1))


def _numbers(values: Sequence[_T]) -> npt.NDArray[np.int32]:
    """Each value as the number of equal ones before the first of which other values appeared first."""
    known: dict[_T, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int32)


def _first_ranks(kinds: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """By kind, the first rank that is of it."""
    order = np.argsort(kinds, kind="stable")  # np.unique would import numpy.ma, for 20 ms
    ordered = kinds[order]
    return order[np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))]


def _columns(rows: Sequence[bytes]) -> npt.NDArray[np.int32]:
    """A table of 32-bit numbers by rank, with zeros behind shorter rows."""
    width = max(map(len, rows), default=0)
    table = np.frombuffer(b"".join(row.ljust(width, b"\0") for row in rows), dtype="<i4")
    return table.reshape(len(rows), width // 4)
