"""Flatten: from the user's state to named tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from shardckpt.errors import StateError, UnsupportedValueError
from shardckpt.format.names import join
from shardckpt.format.save_plan import Layout
from shardckpt.format.value_encoding import encode_value, reference_form
from shardckpt.state.cache import StateDictCache
from shardckpt.state.modules import (
    Stateful,
    iter_modules,
    module_state,
    parameter_names,
    reshard,
    state_of,
    unsynced_buffers,
)
from shardckpt.state.optimizers import optimizer_tree
from shardckpt.state.subclasses import expand
from shardckpt.state.tensors import TensorShard, tensor_shard

__all__ = ["FlatState", "PerRank", "check_state", "flatten", "per_rank_path"]


class PerRank:
    """Wraps a part of the state that every rank has its own of, such as a random generator's state.

    `value` may be anything that a state may hold. A load puts back what this rank number saved, into
    `value` itself; where the checkpoint's world was smaller, the ranks beyond it keep what they have.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


@dataclass(frozen=True)
class FlatState:
    """A state as this rank holds it.

    Attributes:
        tensors: every tensor that this rank holds a part of, or none of its elements.
        values: everything else, as JSON (see `shardckpt.format.values`); the same on every rank.
        per_rank: the content of each PerRank by path, as JSON.
    """

    tensors: list[TensorShard]
    values: Any
    per_rank: dict[str, Any]

    def layouts(self) -> list[Layout]:
        """What the plan needs to know, with tied tensors recognised by their memory."""
        first: dict[Any, str] = {}
        layouts = []
        for tensor in self.tensors:
            memory = tensor.memory()
            name = tensor.name if memory is None else first.setdefault(memory, tensor.name)
            layouts.append(tensor.layout(alias=name if name != tensor.name else None))
        return layouts


def check_state(state: object) -> None:
    """Raise StateError unless `state` is a dict with string keys, which the top level must be."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise StateError(
            f"the state must be a dict with string keys, like {{'model': model, 'optimizer': optimizer}}, "
            f"and is a {type(state).__qualname__}"
        )


def flatten(state: dict[str, Any], rank: int, memo: StateDictCache | None = None) -> FlatState:
    """Named tensors and plain values of a state, without copying a tensor.

    With a `memo`, modules and optimizers that are as they were are not walked again. Raises
    UnsupportedValueError, which names the path, for what cannot be stored as data.
    """
    check_state(state)
    modules = list(iter_modules(state))
    reshard(module for _, module in modules)
    if memo is not None:
        memo.begin(modules)
    walk = _Walk(rank, dict(modules), memo)
    with torch.no_grad():  # local parts of DTensors are taken without a graph
        values = encode_value(dict(state), "", walk.leaf)
    return FlatState(walk.tensors, values, walk.per_rank)


def per_rank_path(path: str, rank: int) -> str:
    """Below which name `rank` keeps the tensors of the PerRank at `path`."""
    return f"{path}/rank-{rank:05d}"


@dataclass
class _Walk:
    """The leaves of one walk over a state."""

    rank: int
    modules: Mapping[str, nn.Module]
    memo: StateDictCache | None
    tensors: list[TensorShard] = field(default_factory=list)
    per_rank: dict[str, Any] = field(default_factory=dict)
    unsynced: set[str] = field(default_factory=set)
    inside: str | None = None
    """The path of the PerRank that is being walked, if one is."""

    @cached_property
    def names(self) -> Mapping[int, tuple[str, str]]:
        """Of parameters; see `parameter_names`."""
        return parameter_names(self.modules)

    def leaf(self, value: Any, path: str) -> Any:
        """The JSON form of what is not plain data; tensors are noted on the way."""
        if isinstance(value, torch.Tensor):
            reference, parts = expand(value, path, first_holder=path in self.unsynced)
            self.tensors += parts
            return reference_form(reference)
        if isinstance(value, np.ndarray):
            self.tensors.append(tensor_shard(_from_numpy(value, path), path))
            return {"$ndarray": path}
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            plain = value.item()
            return (
                NotImplemented if plain is value else encode_value(plain, path)
            )  # longdouble is its own item
        if isinstance(value, PerRank):
            return self._own(value, path)
        if isinstance(value, (nn.Module, torch.optim.Optimizer)):
            return self._walked(value, path)
        if isinstance(value, Stateful) and not isinstance(value, type):
            return encode_value(state_of(value, path), path, self.leaf)
        return NotImplemented

    def _own(self, value: PerRank, path: str) -> Any:
        """The JSON form of a PerRank, whose content is noted."""
        if self.inside is not None:
            raise UnsupportedValueError(
                f"state[{path!r}] is a PerRank inside the PerRank at state[{self.inside!r}], which is this "
                "rank's own with all that is in it. Take the inner one away."
            )
        self.inside = path
        try:
            self.per_rank[path] = encode_value(value.value, per_rank_path(path, self.rank), self.leaf)
        finally:
            self.inside = None
        return {"$per_rank": path}

    def _walked(self, value: nn.Module | torch.optim.Optimizer, path: str) -> Any:
        """The JSON form of a module or an optimizer, whose tensors are noted: as they are known, if they are."""
        known = self.memo.recall(path, value) if self.memo is not None else None
        if known is not None:
            self.tensors += known.tensors
            if isinstance(value, nn.Module):
                return known.encoded
            groups = [
                {**{k: v for k, v in group.items() if k != "params"}, "params": before["params"]}
                for group, before in zip(value.param_groups, known.encoded["param_groups"], strict=True)
            ]
            return {
                **known.encoded,
                "param_groups": encode_value(groups, join(path, "param_groups"), self.leaf),
            }
        first = len(self.tensors)
        if isinstance(value, nn.Module):
            self.unsynced |= {join(path, name) for name in unsynced_buffers(value)}
            encoded = encode_value(module_state(value, path).tree, path, self.leaf)
        else:
            encoded = encode_value(optimizer_tree(value, self.names, path), path, self.leaf)
        if self.memo is not None:
            self.memo.remember(path, value, self.tensors[first:], encoded)
        return encoded


def _from_numpy(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    """The array as a tensor that shares its memory where it can."""
    if type(array) not in (np.ndarray, np.memmap):
        raise UnsupportedValueError(
            f"state[{path!r}] is a {type(array).__module__}.{type(array).__qualname__}, of which only the array "
            "itself could be stored. Pass its parts: for a masked array, a.data and a.mask."
        )
    if not array.dtype.isnative:
        raise UnsupportedValueError(
            f"state[{path!r}] is a NumPy array of the foreign byte order {array.dtype.str!r}. Convert it: "
            "a.astype(a.dtype.newbyteorder('='))."
        )
    plain = array.flags.writeable and all(n >= 0 and n % array.itemsize == 0 for n in array.strides)
    try:
        return torch.from_numpy(array if plain else array.copy())
    except (TypeError, ValueError) as error:
        raise UnsupportedValueError(
            f"state[{path!r}] is a NumPy array of {array.dtype}, which cannot be stored. Convert it to a "
            "number type, or leave it out."
        ) from error
