"""TensorShard: what one rank holds of a tensor, and which boxes of it lie where in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parameter import is_lazy

from shardckpt.errors import StateError, UnsupportedValueError
from shardckpt.format.box import Box, Piece, Runs, pieces_of_runs, split_strided
from shardckpt.format.dtypes import DTYPES, itemsize
from shardckpt.format.manifest import shape_problem
from shardckpt.format.save_plan import Layout
from shardckpt.memory import prefer_huge_pages
from shardckpt.state.wrapped import PLAIN_TYPES, is_wrapper, own_part

__all__ = [
    "Sharding",
    "TensorShard",
    "as_array",
    "check_memory",
    "dense",
    "dtype_name",
    "empty_like_saved",
    "extent",
    "flat_bytes",
    "is_plain",
    "sharding_of",
    "tensor_shard",
    "torch_dtype",
]

_PARTS = (Replicate, Shard, _StridedShard)
"""Placements of which it is known what part of a tensor a rank holds. Their subclasses may differ."""

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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    data: torch.Tensor
    first_holder: bool = False
    is_new: bool = False

    def layout(self, alias: str | None) -> Layout:
        """The shard as `plan_save` takes it. `alias` is the first name of the same memory on this rank."""
        boxes = tuple(piece.box for piece in self.pieces if piece.box.volume)
        return Layout(self.name, self.dtype, self.shape, boxes, alias, self.first_holder)

    def memory(self) -> tuple[Any, ...] | None:
        """Equal for two shards of one rank only if they are the same memory; None for a shard without elements."""
        data = self.data
        if not data.numel():
            return None
        place = (data.device, data.data_ptr(), data.dtype, data.shape, data.stride())
        return (*place, data.is_conj(), data.is_neg(), self.shape, self.pieces)


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The format's name of a torch type. Raises UnsupportedValueError, which names `where`, if it has none."""
    name = str(dtype).removeprefix("torch.")
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
    if isinstance(tensor, DTensor):
        pieces = sharding_of(tensor, name).pieces
        wanted = tuple(
            max((p.at[d] + p.box.shape[d] for p in pieces), default=0) for d in range(len(shape))
        )
        if sum(p.box.volume for p in pieces) != data.numel() or (pieces and wanted != tuple(data.shape)):
            raise UnsupportedValueError(
                f"state[{name!r}] is a DTensor of shape {list(shape)} with placements {tensor.placements}, "
                f"of which this rank should hold a part of shape {list(wanted)}, but its local tensor has the "
                f"shape {list(data.shape)}. Make it with distribute_tensor, or pass its true shape to from_local."
            )
    else:
        pieces = (Piece(Box.whole(shape), (0,) * len(shape)),) if math.prod(shape) else ()
    dtype = dtype_name(data.dtype, name)
    if problem := _shape_problem(dtype, shape):
        raise UnsupportedValueError(f"state[{name!r}] {problem}. Reshape it, or leave it out.")
    return TensorShard(name, dtype, shape, pieces, data, first_holder)


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
        held = made = torch.empty(shape, dtype=kind, device="cpu")
    elif isinstance(like, DTensor):
        held = _empty_like(own_part(like), kind)
        # Not empty_like(like), which works out anew for each shape how the result is sharded.
        made = DTensor.from_local(
            held, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    else:
        held = made = _empty_like(like, kind)
    if held.is_cpu and held.layout is torch.strided:
        prefer_huge_pages(held.data_ptr(), held.nbytes)
    return made


def _empty_like(local: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if is_wrapper(local):  # which might make another wrapper
        return torch.empty(local.shape, dtype=dtype, device=local.device)
    return torch.empty_like(local, dtype=dtype, requires_grad=False)


@dataclass(frozen=True)
class Sharding:
    """How a DTensor is split, and which part this rank has.

    Attributes:
        splits: (dimension, parts, split factor) of each split, in order.
        index: the number of this rank's part, from 0; None if it is not in the DTensor's mesh.
        pieces: the boxes of that part, each with its place in the rank's memory.
    """

    splits: tuple[tuple[int, int, int], ...]
    index: int | None
    pieces: tuple[Piece, ...]

    @property
    def count(self) -> int:
        """The number of different parts: replicas of a part count once."""
        return math.prod(parts for _, parts, _ in self.splits)


def sharding_of(tensor: DTensor, name: str) -> Sharding:
    """How a DTensor is split according to its placements, which apply from the left mesh dimension to the right.

    torch's own helper returns the first offset only, which is not enough for a strided shard of a dimension that
    does not divide evenly. Raises UnsupportedValueError, which names `name`, for other placements.
    """
    mesh = tensor.device_mesh
    for placement in tensor.placements:
        if type(placement) not in _PARTS:
            remedy = (
                "call redistribute() first" if isinstance(placement, Partial) else "replicate or shard it"
            )
            raise UnsupportedValueError(
                f"state[{name!r}] is a DTensor with the placement {placement!r}, which is not a part of the "
                f"tensor that is known here; {remedy}."
            )
    if not _is_default_order(tensor._spec):
        raise UnsupportedValueError(
            f"state[{name!r}] is a DTensor with placements {tensor.placements} in the explicit order "
            f"{tensor._spec.shard_order}, which is not supported; redistribute() it to the default order, in "
            "which mesh dimensions split from the left to the right."
        )
    coordinate = mesh.get_coordinate()
    sizes = tuple(mesh.shape)
    splits = _splits(tensor.placements, sizes, tuple(coordinate) if coordinate else (0,) * len(sizes))
    ways = tuple((dim, parts, factor) for dim, parts, _, factor in splits)
    if coordinate is None:  # this rank is not in the tensor's mesh
        return Sharding(ways, None, ())
    index = 0
    for _, parts, own, _ in splits:
        index = index * parts + own
    return Sharding(ways, index, _pieces(tuple(tensor.shape), splits))


def _is_default_order(spec: DTensorSpec) -> bool:
    """True if the placements alone tell how the tensor is split: since torch 2.10 a spec may have an order, too."""
    order = getattr(spec, "shard_order", None)
    if order is None or spec.use_strided_shard_as_shard_order:
        return True
    return bool(order == _default_order(spec.placements))


@lru_cache(maxsize=1 << 10)
def _default_order(placements: tuple[Placement, ...]) -> Any:
    return DTensorSpec.compute_default_shard_order(placements)


@lru_cache(maxsize=1 << 16)
def _pieces(shape: tuple[int, ...], splits: tuple[tuple[int, int, int, int], ...]) -> tuple[Piece, ...]:
    """The boxes of a shape that a rank has after splits of (dimension, parts, own part, split factor)."""
    runs: list[Runs] = [((0, n),) for n in shape]
    for dim, parts, index, split_factor in splits:
        runs[dim] = split_strided(runs[dim], parts, index, split_factor)
    return pieces_of_runs(runs)


@lru_cache(maxsize=1 << 12)
def _splits(
    placements: tuple[Placement, ...], sizes: tuple[int, ...], coordinate: tuple[int, ...]
) -> tuple[tuple[int, int, int, int], ...]:
    """The splits of a tensor on a mesh of these sizes: (dimension, parts, own part, split factor), in order.

    Mesh dimensions split from the left to the right; but a strided shard is split last, after the mesh dimensions
    to its right that make up its split factor, as FSDP does after tensor parallelism. Only this order is right
    where a dimension does not divide evenly. A factor that is no product of those dimensions' sizes is used as it
    is.
    """
    order: list[tuple[int, int]] = []
    dims = [getattr(placement, "dim", None) for placement in placements]
    for mesh_dim in reversed(range(len(dims))):
        factor = int(getattr(placements[mesh_dim], "split_factor", 1))
        left, at = factor, 0
        while left > 1 and at < len(order):
            other, parts = order[at][0], sizes[order[at][0]]
            if dims[other] == dims[mesh_dim]:
                left = left // parts if left % parts == 0 else 0
            at += 1
        order.insert(at if left == 1 else 0, (mesh_dim, 1 if left == 1 else factor))
    return tuple(
        (dim, sizes[mesh_dim], coordinate[mesh_dim], factor)
        for mesh_dim, factor in order
        if (dim := dims[mesh_dim]) is not None
    )
