"""Tensors that share memory, where a load that fills one changes another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from shardckpt.state.tensors import dense, extent, flat_bytes

__all__ = ["find_conflict", "find_overlaps", "overlaps_itself"]

_ALIGNMENT = 16
"""A multiple of every element's size."""


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """True if two elements of a strided tensor share memory, so that some content cannot be loaded into it."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    dims = sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    reach = 0
    for stride, n in dims:
        if stride <= reach:
            break
        reach += stride * (n - 1)
    else:
        return False  # each stride exceeds the reach of all smaller ones
    if dims[0][0] == 0:
        return True
    places: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)
    for stride, n in dims:
        places = np.add.outer(places, stride * np.arange(n, dtype=np.int64)).ravel()
    return bool(np.unique(places).size < places.size)


def find_overlaps(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Groups of tensors, by number, whose memory may overlap. A tensor that shares no memory is in no group."""
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent(tensor), number)
        for number, tensor in enumerate(tensors)
        if tensor.numel()
    )
    groups: list[list[int]] = []
    group: list[int] = []
    place, end = "", 0
    for device, start, stop, number in spans:
        if group and device == place and start < end:
            group.append(number)
            end = max(end, stop)
        else:
            groups.append(group)
            group, place, end = [number], device, stop
    return [group for group in [*groups, group] if len(group) > 1]


def find_conflict(
    targets: Sequence[torch.Tensor], contents: Sequence[torch.Tensor]
) -> tuple[int, int] | None:
    """Numbers of two targets in one storage that cannot both have their content; None if all can.

    Nothing is written to the targets: it is tried in other memory of the same layout.
    """
    storage = targets[0].untyped_storage().data_ptr()
    first = min(target.data_ptr() for target in targets) - storage
    low = storage + first // _ALIGNMENT * _ALIGNMENT
    high = max(target.data_ptr() + extent(target) for target in targets)
    size = -(-(high - low) // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(size, dtype=torch.uint8, device=targets[0].device)
    views = [_same_view(memory, target, target.data_ptr() - low) for target in targets]

    def is_kept(number: int) -> bool:
        return _same_bits(views[number], contents[number])

    for view, content in zip(views, contents, strict=True):
        view.copy_(content)
    lost = next((number for number in range(len(views)) if not is_kept(number)), None)
    if lost is None:
        return None
    for other in (number for number in range(len(views)) if number != lost):
        views[lost].copy_(contents[lost])
        views[other].copy_(contents[other])
        if not is_kept(lost):
            return lost, other
    raise AssertionError("a target lost its content to none of the others")


def _same_view(memory: torch.Tensor, tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor with the layout of `tensor`, at `offset` of other memory."""
    flat = memory.view(tensor.dtype)
    view = flat.as_strided(tensor.shape, tensor.stride(), offset // tensor.itemsize)
    view = view.conj() if tensor.is_conj() else view
    return torch._neg_view(view) if tensor.is_neg() else view


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if all elements are equal in every bit, also NaNs."""
    return torch.equal(flat_bytes(dense(one)), flat_bytes(dense(other)))
