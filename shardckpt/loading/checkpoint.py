"""Open a checkpoint and read single tensors and values of it. Free of torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shardckpt.errors import MissingKeysError, public_api
from shardckpt.format.box import Box
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.manifest import Manifest, TensorEntry
from shardckpt.format.value_decoding import decode_value
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.plan import ChunkIndex, index_chunks, plan_reads
from shardckpt.loading.scatter import ArrayScatter
from shardckpt.loading.zarr_group import open_group
from shardckpt.run.places import Place, find_place, read_manifest
from shardckpt.storage import LocalStorage, Storage

if TYPE_CHECKING:
    import zarr

__all__ = ["Checkpoint", "open_checkpoint"]


_COMPARED, _LONGEST = 10_000, 200
"""Names, and characters of a name, that are compared with an unknown name: that takes quadratic time."""


class Checkpoint:
    """One checkpoint in storage, open for reading; `shardckpt.open` returns it. Safe to use from several threads.

    Attributes:
        url: the checkpoint's URL.
        manifest: its record (docs/format.md).

    >>> import tempfile, torch, shardckpt
    >>> state = {"weight": torch.arange(6.0).reshape(2, 3), "lr": 0.1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shardckpt.save(folder, state)
    ...     checkpoint = shardckpt.open(folder)
    ...     column = checkpoint.read("weight", (slice(None), 1))
    >>> column, checkpoint.entry("weight").shape, checkpoint.values["lr"]
    (array([1., 4.], dtype=float32), (2, 3), 0.1)
    """

    def __init__(self, place: Place, storage_options: Mapping[str, Any] | None = None) -> None:
        """Read the manifest at `place`. Raises NotACheckpointError, FormatError, StorageError."""
        self._place = place
        self._options = storage_options
        self.url = place.url
        self.manifest: Manifest = read_manifest(place)

    def __repr__(self) -> str:
        return f"Checkpoint({self.url!r}, step={self.step})"

    @property
    def step(self) -> int:
        """The number of optimizer steps done when it was saved."""
        return self.manifest.step

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics given when it was saved."""
        return self.manifest.metric_values

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor's entry by name: global `shape`, `dtype` (its name), `nbytes`."""
        return {tensor.name: tensor for tensor in self.manifest.tensors}

    @cached_property
    def values(self) -> Any:
        """Everything in the state that is not a tensor; a reference stands for each tensor and PerRank."""
        return decode_value(self.manifest.values)

    def per_rank(self, path: str) -> list[Any]:
        """What each rank saved in the PerRank at `path` of the state, by rank. Raises MissingKeysError.

        A checkpoint that was resharded for more ranks has the values of the ranks that saved it only.
        """
        saved = [decode_value(values[path]) for values in self.manifest.per_rank if path in values]
        if not saved:
            raise MissingKeysError(f"{self.url} has no per-rank value at {path!r}")
        return saved

    @cached_property
    def _index(self) -> ChunkIndex:
        return index_chunks(self.manifest)

    def read(self, name: str, index: Any = ...) -> npt.NDArray[Any]:
        """Read a tensor, or a part of it, as a new array.

        Args:
            name: the tensor's name.
            index: as NumPy has it, of integers, slices and an ellipsis.

        Only the chunks that the index touches are read, and each is verified. The array has the tensor's type;
        bfloat16 and float8 are ml_dtypes' types. Raises MissingKeysError for an unknown name, IndexError,
        CorruptError, StorageError.
        """
        tensor = self.entry(name)
        box, rest = _bounds(index, tensor.shape)
        fetcher = Fetcher(self._place, self.manifest)
        reads = plan_reads(self.manifest, [(name, box)], self._index)
        fetcher.check_sizes(read.stored for read in reads)
        result = np.zeros(box.shape, dtype=numpy_dtype(tensor.dtype))

        fetcher.load(reads, ArrayScatter({0: result}))
        return np.asarray(result[rest])

    def entry(self, name: str) -> TensorEntry:
        """The tensor's entry in the manifest. Raises MissingKeysError, which suggests similar names."""
        if name not in self.tensors:
            import difflib

            usual = [known for known in itertools.islice(self.tensors, _COMPARED) if len(known) <= _LONGEST]
            alike = difflib.get_close_matches(name[:_LONGEST], usual, n=3)
            hint = f"; did you mean {', '.join(map(repr, alike))}?" if alike else ""
            raise MissingKeysError(f"{self.url} has no tensor {name!r}{hint}")
        return self.tensors[name]

    def zarr(self) -> zarr.Group:
        """The tensors as a read-only zarr.Group, which reads and verifies chunks when it is indexed.

        Raises CorruptError if a pack in a local folder is missing or has another size.
        """
        if isinstance(self._place.root, LocalStorage):  # elsewhere it takes a request for each
            Fetcher(self._place, self.manifest).check_all_sizes()
        return open_group(self.url, self._options, manifest=self.manifest)

    def verify(self, progress: Callable[[int], object] | None = None) -> int:
        """Read every chunk and compare it with its checksum.

        Args:
            progress: called with the bytes of each finished request; from several threads.

        Returns the bytes of the chunks. Raises CorruptError, which names the first bad chunk; StorageError.
        """
        boxes = [(tensor.name, Box.whole(tensor.shape)) for tensor in self.manifest.tensors]
        reads = plan_reads(self.manifest, [b for b in boxes if b[1].volume])
        Fetcher(self._place, self.manifest).verify(reads, progress)
        return sum(read.stored.nbytes for read in reads)


@public_api
def open_checkpoint(
    url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Open a checkpoint for reading. Only its manifest is read.

    Args:
        url: a checkpoint, or a run, of which the newest good checkpoint is opened.
        storage_options: for `url`, as docs/storage.md has them.

    Raises NotACheckpointError, FormatError, StorageError.
    """
    return Checkpoint(find_place(url, storage_options), storage_options)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[Box, tuple[Any, ...]]:
    """The smallest box that contains what `index` selects, and the index that selects it from the box."""
    items = index if isinstance(index, tuple) else (index,)
    if sum(item is ... for item in items) > 1:
        raise IndexError("an index can have one ellipsis only")
    given = sum(item is not ... for item in items)
    if given > len(shape):
        raise IndexError(f"{given} indices for a tensor of {len(shape)} dimensions")
    if not any(item is ... for item in items):
        items = (*items, ...)
    at = next(i for i, item in enumerate(items) if item is ...)
    full = (*items[:at], *[slice(None)] * (len(shape) - given), *items[at + 1 :])
    offsets: list[int] = []
    sizes: list[int] = []
    rest: list[slice | int] = []
    for dim, (item, n) in enumerate(zip(full, shape, strict=True)):
        if isinstance(item, slice):
            chosen = range(n)[item]
            low = min(chosen[0], chosen[-1]) if chosen else 0
            high = max(chosen[0], chosen[-1]) + 1 if chosen else 0
            offsets.append(low)
            sizes.append(high - low)
            rest.append(slice(None, None, item.step))
        elif hasattr(item, "__index__"):
            number = item.__index__()
            if not -n <= number < n:
                raise IndexError(f"index {number} is out of range for dimension {dim} of size {n}")
            offsets.append(number % n)
            sizes.append(1)
            rest.append(0)
        else:
            raise IndexError(f"an index is made of integers, slices and an ellipsis, not of {item!r}")
    return Box(tuple(offsets), tuple(sizes)), tuple(rest)
