"""What a file format is to an export: the contract that each module of this folder fulfils."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy.typing as npt

from shardckpt.format.foreign import ForeignFormat
from shardckpt.format.manifest import TensorEntry

__all__ = ["FilePlan", "Format", "Selection"]


@dataclass(frozen=True)
class Selection:
    """What goes into a file.

    Attributes:
        step: the training step of the checkpoint.
        tree: the state, with a TensorRef, by the tensor's name in the checkpoint, wherever it has a tensor.
        tensors: the tensors of the tree by the name that each gets in the file.
        entries: every tensor of the checkpoint by its name there.
        tied: names of tensors that share the storage of another one -> that one's name.
    """

    step: int
    tree: Any
    tensors: Mapping[str, TensorEntry]
    entries: Mapping[str, TensorEntry]
    tied: Mapping[str, str]


@dataclass(frozen=True)
class FilePlan:
    """How a file is written.

    Attributes:
        nbytes: how large it gets at least, in bytes.
        tensors: the tensors to read, in the order of the file.
        write: writes the file. Takes an empty, seekable file, and the content of `tensors`, in order, each tensor
            in one or more pieces; yields the number of bytes of each piece once it is written.
    """

    nbytes: int
    tensors: Sequence[TensorEntry]
    write: Callable[[BinaryIO, Iterator[npt.NDArray[Any]]], Iterator[int]]


class Format(Protocol):
    """A file format. Importing its module must not import torch: every command does."""

    @property
    def foreign(self) -> ForeignFormat:
        """Its name, and how a file of it is recognized."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The ends of file names that select it, with their dot."""

    def plan(self, selection: Selection) -> FilePlan:
        """Plan a file with this content; nothing is read or written yet.

        Raises StateError for a type that the format lacks.
        """
