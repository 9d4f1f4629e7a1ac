"""Flatten: from the state of a training script to named tensors and plain values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from shardckpt.errors import StateError, UnsupportedValueError
from shardckpt.format.layouts import OWN, Layout, RankLayout
from shardckpt.format.names import join
from shardckpt.format.tree import MAX_DEPTH
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
from shardckpt.state.sharding import MeshPlace
from shardckpt.state.signature import container_signature
from shardckpt.state.subclasses import expand
from shardckpt.state.tensors import TensorShard, tensor_shard

__all__ = ["FlatState", "PerRank", "check_state", "flatten", "per_rank_path"]

_MANY = 64
"""Tensors of a container from which on its walk is kept: a smaller one is walked as fast as it is compared."""


class PerRank:
    """Wraps a value that differs between ranks, such as the state of a random generator.

    Args:
        value: anything that a state may contain, except another PerRank. A load replaces or fills it with what
            the rank of the same number saved. If fewer ranks saved the checkpoint, the other ranks keep what they
            have.

    >>> state = {"rng": PerRank(torch.get_rng_state())}
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


@dataclass(frozen=True)
class FlatState:
    """A state as this rank holds it.

    Attributes:
        tensors: every tensor of the state, also one of which this rank holds no element.
        values: everything else in its JSON form (`shardckpt.format.value_encoding`); the same on every rank. With
            a cache, parts of it are text (`msgspec.Raw`).
        per_rank: path of each PerRank -> the JSON form of its value.
    """

    tensors: list[TensorShard]
    values: Any
    per_rank: dict[str, Any]

    def layout(self, rank: int) -> RankLayout:
        """What this rank, `rank`, holds. Tied tensors are recognised by their memory."""
        first: dict[Any, str] = {}
        places: dict[MeshPlace, int] = {}
        common: list[Layout | None] = []
        own: list[Layout] = []
        for tensor in self.tensors:
            name, memory, alias = self._common_name(tensor.name, rank), tensor.memory(), None
            if memory is not None and (same := first.setdefault(memory, tensor.name)) != tensor.name:
                alias = self._common_name(same, rank)
            layout = Layout(name, tensor.dtype, tensor.shape, (), alias, tensor.first_holder)
            if (sharding := tensor.sharding) is not None:
                mesh = places.setdefault(sharding.place, len(places))
                layout = replace(layout, mesh=mesh, splits=sharding.splits)
            else:
                boxes = tuple(piece.box for piece in tensor.pieces if piece.box.volume)
                layout = replace(layout, boxes=boxes)
            is_own = tensor.is_own or name != tensor.name
            common.append(None if is_own else layout)
            if is_own:
                own.append(layout)
        coordinates = [place.coordinate or (-1,) * len(place.shape) for place in places]
        return RankLayout(
            meshes=tuple(place.shape for place in places),
            coordinates=tuple(itertools.chain(*coordinates)),
            common=tuple(common),
            own=tuple(own),
        )

    def _common_name(self, name: str, rank: int) -> str:
        """The name as all ranks have it: inside a PerRank, with `OWN` instead of the rank."""
        folder = per_rank_path("", rank)
        start = name.find(folder) if self.per_rank else -1
        while start >= 0:
            path, rest = name[:start], name[start + len(folder) :]
            if path in self.per_rank and rest[:1] in ("", "/"):
                return f"{path}{OWN}{rest}"
            start = name.find(folder, start + 1)
        return name


def check_state(state: object) -> None:
    """Raise StateError unless `state` is a dict with string keys."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise StateError(
            f"the state must be a dict with string keys, like {{'model': model, 'optimizer': optimizer}}, "
            f"and is a {type(state).__qualname__}"
        )


def flatten(state: dict[str, Any], rank: int, cache: StateDictCache | None = None) -> FlatState:
    """Take a state apart into named tensors and plain values, without copying a tensor.

    Args:
        state: a dict with string keys; see `load` for what it may contain.
        rank: this rank.
        cache: walks over modules and optimizers to reuse while their tensors are the same objects; None: walk
            all.

    Raises StateError, and UnsupportedValueError, which names the path, for what cannot be stored as data.

    >>> flat = flatten({"layer": torch.nn.Linear(2, 1), "lr": 0.1}, rank=0)
    >>> [(tensor.name, tensor.shape) for tensor in flat.tensors]
    [('layer/weight', (1, 2)), ('layer/bias', (1,))]
    >>> flat.values
    {'layer': {'weight': {'$tensor': 'layer/weight'}, 'bias': {'$tensor': 'layer/bias'}}, 'lr': 0.1}
    """
    check_state(state)
    tree = _with_containers(dict(state)) if cache is not None else dict(state)
    modules = list(iter_modules(tree))
    reshard(module for _, module in modules)
    walk = _Walk(rank, dict(modules), cache)
    with torch.no_grad():  # shards of DTensors are taken without a graph
        if cache is not None:
            cache.begin(modules)
        values = encode_value(tree, "", walk.leaf)
    return FlatState(walk.tensors, values, walk.per_rank)


@dataclass(frozen=True)
class _Container:
    """A dict, list or tuple of nothing but tensors, and its signature."""

    content: Any
    signature: tuple[list[Any], list[Any]]


def _with_containers(value: Any, depth: int = 0) -> Any:
    """A state in which each dict, list or tuple of nothing but many tensors is replaced by a `_Container`."""
    if type(value) not in (dict, list, tuple) or depth > MAX_DEPTH:  # it contains itself
        return value
    signature = container_signature(value)
    if signature is not None:
        return _Container(value, signature) if len(signature[1]) >= _MANY else value
    if isinstance(value, dict):
        return {key: _with_containers(item, depth + 1) for key, item in value.items()}
    return type(value)(_with_containers(item, depth + 1) for item in value)


def per_rank_path(path: str, rank: int) -> str:
    """The name below which the tensors of a rank's PerRank at `path` are stored."""
    return f"{path}/rank-{rank:05d}"


@dataclass
class _Walk:
    """One walk over a state: handles what is not plain data, and collects the tensors."""

    rank: int
    modules: Mapping[str, nn.Module]
    cache: StateDictCache | None
    tensors: list[TensorShard] = field(default_factory=list)
    per_rank: dict[str, Any] = field(default_factory=dict)
    unsynced: set[str] = field(default_factory=set)
    inside: str | None = None
    """The path of the PerRank that is being walked, if one is."""

    @cached_property
    def names(self) -> Mapping[int, tuple[str, str]]:
        """See `parameter_names`."""
        return parameter_names(self.modules)

    def leaf(self, value: Any, path: str) -> Any:
        """The JSON form of a value that is not plain data; its tensors are collected."""
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
        if isinstance(value, _Container):
            return self._container_form(value, path)
        if isinstance(value, PerRank):
            return self._per_rank_form(value, path)
        if isinstance(value, (nn.Module, torch.optim.Optimizer)):
            return self._object_form(value, path)
        if isinstance(value, Stateful) and not isinstance(value, type):
            return encode_value(state_of(value, path), path, self.leaf)
        return NotImplemented

    def _per_rank_form(self, value: PerRank, path: str) -> Any:
        """The JSON form of a PerRank, whose value is collected."""
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

    def _container_form(self, value: _Container, path: str) -> Any:
        """The JSON form of a container of tensors, which are collected; cached."""
        assert self.cache is not None
        cached = self.cache.find_container(path, value.signature)
        if cached is not None:
            self.tensors += cached.tensors
            return cached.encoded
        first = len(self.tensors)
        encoded = encode_value(value.content, path, self.leaf)
        return self.cache.add_container(path, value.signature, self.tensors[first:], encoded)

    def _object_form(self, value: nn.Module | torch.optim.Optimizer, path: str) -> Any:
        """The JSON form of a module or an optimizer, whose tensors are collected; cached if possible."""
        cached = self.cache.find(path, value) if self.cache is not None else None
        if cached is not None:
            self.tensors += cached.tensors
            if isinstance(value, nn.Module):
                return cached.encoded
            groups = [
                {**{k: v for k, v in group.items() if k != "params"}, "params": before["params"]}
                for group, before in zip(value.param_groups, cached.encoded["param_groups"], strict=True)
            ]
            return {
                **cached.encoded,
                "param_groups": encode_value(groups, join(path, "param_groups"), self.leaf),
            }
        first = len(self.tensors)
        if isinstance(value, nn.Module):
            self.unsynced |= {join(path, name) for name in unsynced_buffers(value)}
            encoded = encode_value(module_state(value, path).tree, path, self.leaf)
        else:
            encoded = encode_value(optimizer_tree(value, self.names, path), path, self.leaf)
        if self.cache is not None:
            encoded = self.cache.add(path, value, self.tensors[first:], encoded)
        return encoded


def _from_numpy(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    """The array as a tensor, which shares its memory if torch can address it."""
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
