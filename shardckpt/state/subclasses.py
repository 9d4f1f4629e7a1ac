"""Expand: from tensors of every kind to named tensors with memory of their own, to save them or to load into
them.

A plain tensor and a DTensor are one named tensor each. A wrapper subclass is one for each tensor that it consists
of, below its own name. A DTensor of a wrapper is sharded. If an inner tensor has the shape of the DTensor's local
tensor, its elements are placed as the DTensor's are, and it can be loaded in any other sharding. Of other inner
tensors (scales of blocks, packed codes) only the wrapper knows which elements they belong to: each shard's is
stored by itself, and can be loaded in the same sharding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardckpt.errors import StateError
from shardckpt.format.names import join
from shardckpt.format.tree import TensorRef, WrapperRef
from shardckpt.state.sharding import Sharding, sharding_of
from shardckpt.state.tensors import TensorShard, tensor_shard
from shardckpt.state.wrapped import flat, is_wrapper, own_part

__all__ = ["empty_wrapper", "expand", "pair"]


def expand(
    tensor: torch.Tensor, path: str, *, first_holder: bool = False
) -> tuple[TensorRef | WrapperRef, list[TensorShard]]:
    """The reference to the tensor at `path`, and this rank's shards of the named tensors that it refers to.

    Args:
        tensor: of any kind.
        path: its place in the state.
        first_holder: see `Layout`.

    Raises UnsupportedValueError, which names the path, for a tensor without memory, or of a type that the format
    lacks.
    """
    if type(tensor) is torch.Tensor:  # most are
        return TensorRef(path), [tensor_shard(tensor, path, own=tensor, first_holder=first_holder)]
    return _expand(tensor, own_part(tensor), path, first_holder)


def _expand(
    whole: torch.Tensor, local: torch.Tensor, path: str, first_holder: bool
) -> tuple[Any, list[TensorShard]]:
    if not is_wrapper(local):
        return TensorRef(path), [tensor_shard(whole, path, own=local, first_holder=first_holder)]
    inner, context = flat(local)
    sharding = sharding_of(whole, path) if isinstance(whole, DTensor) else None
    forms: dict[str, Any] = {}
    parts: list[TensorShard] = []
    is_fixed = False
    for name, held in inner:
        place = join(path, name)
        if sharding is not None and held.shape == local.shape:
            forms[name], found = _expand(whole, held, place, first_holder)
        elif sharding is None or sharding.count == 1 or not held.shape:
            forms[name], found = expand(held, place, first_holder=first_holder)
        else:
            is_fixed = True
            forms[name], found = _by_shard(held, place, sharding, first_holder)
        parts += found
    form = WrapperRef(
        forms,
        type=f"{type(local).__module__}.{type(local).__qualname__}",
        dtype=str(whole.dtype).removeprefix("torch."),
        shape=tuple(whole.shape),
        sharding=sharding.ways if sharding is not None and is_fixed else (),
        context=context,
    )
    return form, parts


def _by_shard(
    held: torch.Tensor, path: str, sharding: Sharding, first_holder: bool
) -> tuple[list[Any], list[TensorShard]]:
    forms, parts = [], []
    for number in range(sharding.count):
        form, found = expand(held, join(path, number), first_holder=first_holder)
        forms.append(form)
        if number == sharding.index:
            parts += [replace(part, is_own=True) for part in found]
    return forms, parts


def empty_wrapper(like: torch.Tensor) -> torch.Tensor:
    """A tensor like a wrapper subclass, or a DTensor of one, that consists of new memory."""
    local: Any = own_part(like)
    if not is_wrapper(local):
        made = torch.empty_like(local, requires_grad=False)
    else:
        names, context = local.__tensor_flatten__()
        inner = {name: empty_wrapper(getattr(local, name)) for name in names}
        made = type(local).__tensor_unflatten__(inner, context, local.shape, local.stride())
    if not isinstance(like, DTensor):
        return made
    return DTensor(made, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def pair(held: Any, saved: Any, path: str) -> Iterator[tuple[str, str]]:
    """For a tensor of the state: (name, name in the checkpoint) of each named tensor that it consists of.

    `held` is the reference that `expand` returns for it, `saved` the reference that was saved at its place.
    Raises StateError unless both consist of the same tensors, with the same meaning.
    """
    if isinstance(held, list) and isinstance(saved, list):
        for number, (one, other) in enumerate(zip(held, saved, strict=True)):
            yield from pair(one, other, join(path, number))
    elif isinstance(held, WrapperRef) and isinstance(saved, WrapperRef):
        for what, one, other in (
            ("type", held.type.rpartition(".")[2], saved.type.rpartition(".")[2]),
            ("shape", list(held.shape), list(saved.shape)),
            ("element type", held.dtype, saved.dtype),
            ("sharding (dimension, parts, factor)", held.sharding, saved.sharding),
            ("meaning", held.context, saved.context),
            ("inner tensors", sorted(held), sorted(saved)),
        ):
            if one != other:
                raise StateError(
                    f"state[{path!r}] is a {held.type}, and its {what} is {one}, but {other} in the "
                    "checkpoint. Build it as it was when it was saved, or leave it out of the state."
                )
        for name in held:
            yield from pair(held[name], saved[name], join(path, name))
    elif isinstance(held, TensorRef) and isinstance(saved, TensorRef):
        yield held.name, saved.name
    else:
        raise StateError(
            f"state[{path!r}] is {_kind(held)} here, but {_kind(saved)} in the checkpoint. Build it as it was "
            "when it was saved, or leave it out of the state."
        )


def _kind(form: Any) -> str:
    if isinstance(form, WrapperRef):
        return f"a tensor subclass {form.type}"
    return "a plain tensor" if isinstance(form, TensorRef) else f"a {type(form).__qualname__}"
