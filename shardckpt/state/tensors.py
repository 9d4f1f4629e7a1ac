"""TensorShard: what one rank holds of a tensor, and which boxes of it lie where in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from shardckpt.errors import StateError, UnsupportedValueError
from shardckpt.format.box import Box, Piece
from shardckpt.format.dtypes import DTYPES, itemsize
from shardckpt.format.manifest import shape_problem
from shardckpt.state.sharding import Sharding, sharding_of
from shardckpt.state.wrapped import PLAIN_TYPES, is_wrapper, own_part

__all__ = [
    "TensorShard",
    "as_array",
    "check_memory",
    "dense",
    "dtype_name",
    "empty_like_saved",
    "extent",
    "flat_bytes",
    "is_plain",
    "tensor_shard",
    "torch_dtype",
]


_shape_problem = lru_cache(maxsize=1 << 12)(shape_problem)


@dataclass(frozen=True, slots=True)
class TensorShard:
    """What this rank holds of a named tensor: all of it, if the tensor is not sharded.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: the name of its element type.
        shape: its global shape.
        pieces: the boxes that this rank holds, each with its place in `data`.
        data: this rank's memory, detached; writing to it changes the state.
        first_holder: see `Layout`.
        is_new: True if `data` is new memory for a load, which is not yet a part of the state.
        sharding: how a DTensor is split, from which `pieces` follow; None for other tensors.
        is_own: True if ranks that are alike otherwise hold other tensors instead of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    data: torch.Tensor
    first_holder: bool = False
    is_new: bool = False
    sharding: Sharding | None = None
    is_own: bool = False

    def memory(self) -> tuple[Any, ...] | None:
        """Equal for two shards of one rank only if they are the same memory; None without elements."""
        data = self.data
        if not data.numel():
            return None
        place = (data.device, data.data_ptr(), data.dtype, data.shape, data.stride())
        return (*place, data.is_conj(), data.is_neg(), self.shape, self.pieces)


@lru_cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The format's name of a torch type. Raises UnsupportedValueError, which names `where`, if it has none."""
    name = _name_of(dtype)
    if name not in DTYPES:
        raise UnsupportedValueError(
            f"state[{where!r}] is a tensor of {dtype}, which the format does not have. "
            f"It has: {', '.join(DTYPES)}. Convert it, or leave it out."
        )
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a name of the format. Raises UnsupportedValueError if this torch lacks it."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedValueError(f"torch {torch.__version__} has no element type {name!r}")
    return dtype


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, in the same memory."""
    # view(-1) would keep the stride of a single element, which may be any number.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in C order without conjugate or negative bits: the tensor itself if it is, otherwise a copy."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor, which must have one, to the end of the furthest in memory."""
    if tensor.is_contiguous():
        return tensor.nbytes
    reach = sum(stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return (reach + 1) * tensor.itemsize


def as_array(tensor: torch.Tensor, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The memory of a strided CPU tensor as an array of `dtype`, whose elements are as large as the tensor's.

    `tensor.numpy()` would make the storage of the user's tensor impossible to resize from then on.
    """
    return np.asarray(_Memory(tensor, np.dtype(dtype)))


class _Memory:
    def __init__(self, tensor: torch.Tensor, dtype: np.dtype[Any]) -> None:
        self._keeps = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": dtype.str,
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * dtype.itemsize for stride in tensor.stride()),
        }


def is_plain(tensor: torch.Tensor) -> bool:
    """True if the tensor's elements lie in CPU memory in C order, and mean what their bits say."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous()
    return plain and not tensor.is_conj() and not tensor.is_neg()


def tensor_shard(
    tensor: torch.Tensor, name: str, *, own: torch.Tensor | None = None, first_holder: bool = False
) -> TensorShard:
    """This rank's shard of `tensor`: a plain tensor, of which each rank holds all, or a DTensor.

    Args:
        tensor: tells the global shape, and which part of it this rank holds.
        name: its name in the checkpoint, also for error messages.
        own: the memory, if it is not `own_part(tensor)`, but has the same shape.
        first_holder: see `Layout`.

    Raises UnsupportedValueError for tensors whose elements do not lie in memory of their own (sparse, quantized,
    nested, meta and fake tensors), and for DTensors whose placements do not tell which part this rank holds.
    """
    data = own_part(tensor) if own is None else own
    check_memory(data, name)
    data = data.detach()
    shape = tuple(tensor.shape)
    sharding = None
    if isinstance(tensor, DTensor):
        sharding = sharding_of(tensor, name)
        pieces = sharding.pieces
        if sharding.volume != data.numel() or (pieces and sharding.shape != data.shape):
            wanted = list(sharding.shape) if pieces else [0] * len(shape)
            raise UnsupportedValueError(
                f"state[{name!r}] is a DTensor of shape {list(shape)} with placements {tensor.placements}, "
                f"of which this rank should hold a part of shape {wanted}, but its local tensor has the "
                f"shape {list(data.shape)}. Make it with distribute_tensor, or pass its true shape to from_local."
            )
    else:
        pieces = _whole(shape)
    dtype = dtype_name(data.dtype, name)
    if problem := _shape_problem(dtype, shape):
        raise UnsupportedValueError(f"state[{name!r}] {problem}. Reshape it, or leave it out.")
    return TensorShard(name, dtype, shape, pieces, data, first_holder, sharding=sharding)


@lru_cache(maxsize=1 << 12)
def _whole(shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces of a tensor of this shape that a rank holds all of."""
    return (Piece(Box.whole(shape), (0,) * len(shape)),) if math.prod(shape) else ()


def check_memory(data: torch.Tensor, name: str) -> None:
    """Raise UnsupportedValueError unless `data` has memory of its own for all its elements."""
    kind = remedy = None
    if type(data) not in PLAIN_TYPES and is_lazy(data):
        kind, remedy = "an uninitialized parameter or buffer", "Run the model once, which gives it a shape."
    elif data.is_nested:
        kind, remedy = "a nested tensor", "Pass its parts: t.values() and t.offsets(), or list(t.unbind())."
    elif data.is_meta:
        kind, remedy = "a meta tensor", "Give it memory first: module.to_empty(device=...)."
    elif data.is_quantized:
        kind, remedy = (
            "a quantized tensor",
            "Pass int_repr(), q_scale() and q_zero_point(), or dequantize it.",
        )
    elif data.layout is not torch.strided:
        kind, remedy = f"a tensor of layout {data.layout}", "Convert it with to_dense(), or pass its parts."
    elif is_wrapper(data) or not _is_backed(data):
        kind = f"a {type(data).__module__}.{type(data).__qualname__} without memory of its own"
        remedy = "If its storage was freed, fill it again; if it stands for other tensors, pass those."
    if kind is not None:
        raise UnsupportedValueError(
            f"state[{name!r}] is {kind}, which can be neither stored nor loaded into. {remedy}"
        )


def _is_backed(data: torch.Tensor) -> bool:
    """True if the storage is real, and as large as shape and strides need."""
    if not data.numel():
        return True
    try:
        storage = data.untyped_storage()
        needed = data.storage_offset() * data.itemsize + extent(data)
        return storage.device == data.device and storage.nbytes() >= needed and storage.data_ptr() != 0
    except (NotImplementedError, RuntimeError):  # what a subclass without storage raises
        return False


def empty_like_saved(dtype: str, shape: tuple[int, ...], like: torch.Tensor | None) -> torch.Tensor:
    """A new tensor to load into, of this type and global shape.

    It is laid out, and placed, as `like` is, if that has the same shape; otherwise it is a plain tensor in CPU
    memory. Raises CannotAllocateError.
    """
    try:
        return _empty_like_saved(torch_dtype(dtype), shape, like)
    except (RuntimeError, MemoryError) as error:
        nbytes = math.prod(shape) * itemsize(dtype)
        raise CannotAllocateError(
            f"a tensor of shape {list(shape)} and type {dtype} has {nbytes} bytes, for which there is no memory: "
            f"{str(error).splitlines()[0]}"
        ) from error


class CannotAllocateError(StateError, MemoryError):
    """There is no memory for a tensor of the checkpoint: it is too large, or its size is forged."""


def _empty_like_saved(kind: torch.dtype, shape: tuple[int, ...], like: torch.Tensor | None) -> torch.Tensor:
    if like is None or tuple(like.shape) != shape or like.is_meta:
        return torch.empty(shape, dtype=kind, device="cpu")
    if not isinstance(like, DTensor):
        return _empty_like(like, kind)
    # Not empty_like(like), which works out anew for each shape how the result is sharded.
    held = _empty_like(own_part(like), kind)
    if kind == like.dtype and type(like) is DTensor:  # in half the time of from_local
        return DTensor(held, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return DTensor.from_local(
        held, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _empty_like(local: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if is_wrapper(local):  # which might make another wrapper
        return torch.empty(local.shape, dtype=dtype, device=local.device)
    return torch.empty_like(local, dtype=dtype, requires_grad=False)
