"""Modules as named trees, whatever wraps them.

Names are those of the plain model: the prefixes of DDP, torch.compile, activation checkpointing and AveragedModel
are removed, so that a checkpoint does not depend on them (`torch.distributed.checkpoint.state_dict` has the same
names, except AveragedModel's).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from shardckpt.errors import ShardckptError, StateError, UnsupportedValueError
from shardckpt.format.names import join, key_text
from shardckpt.format.tree import MAX_DEPTH
from shardckpt.state.overrides import has_override
from shardckpt.state.signature import all_modules
from shardckpt.state.tensors import check_memory
from shardckpt.state.wrapped import memory_parts

__all__ = [
    "AVERAGED_COUNT",
    "Stateful",
    "is_sharded",
    "iter_modules",
    "loading_module",
    "module_state",
    "parameter_names",
    "reshard",
    "state_of",
    "unsynced_buffers",
]

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""What activation checkpointing adds to parameter names, and removes from state_dict keys itself."""

AVERAGED_COUNT = "n_averaged"
"""The counter that AveragedModel adds to the names of its module, and a plain model does not need."""


@runtime_checkable
class Stateful(Protocol):
    """An object that returns its state as data, and takes it back."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as a tree of tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Replace the state."""


@dataclass(frozen=True)
class ModuleState:
    """A module's state_dict under clean names.

    Attributes:
        tree: clean name -> value; its tensors share memory with the module's.
        metadata: what torch keeps beside a state_dict: the version of each submodule's state_dict.
    """

    tree: dict[str, Any]
    metadata: Any
    _keys: Mapping[str, str]
    _prefixes: Sequence[tuple[str, str]]

    def key(self, name: str) -> str:
        """The key of a clean name in the module's own state_dict, also of a name that it lacks."""
        if name in self._keys:
            return self._keys[name]
        for prefix, clean in reversed(self._prefixes):
            if name.startswith(clean):
                name = prefix + name[len(clean) :]
        return name

    def name(self, key: str) -> str:
        """The clean name of a key of the module's own state_dict."""
        return _clean(key, self._prefixes)


def module_state(module: nn.Module, where: str) -> ModuleState:
    """The module's state_dict under clean names.

    `where` is the module's path in the state. Raises UnsupportedValueError for FSDP version 1, whose flat
    parameters are not supported; and as `state_of` does.
    """
    fsdp1 = _loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    for name, child in module.named_modules() if fsdp1 else ():
        if isinstance(child, fsdp1):
            raise UnsupportedValueError(
                f"state[{where!r}] has a FullyShardedDataParallel module (FSDP 1) at {name!r}, which "
                "is not supported; shard the model with torch.distributed.fsdp.fully_shard"
            )
    prefixes = _wrapper_prefixes(module)
    values = state_of(module, where)
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise StateError(
            f"state[{where!r}], a {type(module).__qualname__}, has a state_dict() that does not return a dict "
            "with texts as keys, as a module's must."
        )
    keys: dict[str, str] = {}
    for key in values:
        if (name := _clean(key, prefixes)) in keys:
            raise UnsupportedValueError(
                f"state[{where!r}] has two entries that would be named {name!r}, one of a wrapper (DDP, "
                f"torch.compile or AveragedModel) and one of the module in it, {key!r}. Rename one of them."
            )
        keys[name] = key
    tree = {name: values[key] for name, key in keys.items()}
    return ModuleState(tree, getattr(values, "_metadata", None), keys, prefixes)


def is_sharded(module: nn.Module) -> bool:
    """True if it has parameters of which each rank holds a part only."""
    return any(
        isinstance(parameter, DTensor)
        and any(not placement.is_replicate() for placement in parameter.placements)
        for parameter in module.parameters()
    )


def loading_module(module: nn.Module) -> nn.Module:
    """The module whose load_state_dict a load into `module` calls.

    It is the module itself, unless that wraps one with a load_state_dict of its own, which the wrapper's
    load_state_dict would not call.
    """
    inner = module
    while (inside := _wrapped(inner)) is not None:
        inner = inside
    return inner if has_override(inner, "load_state_dict", [nn.Module.load_state_dict]) else module


def reshard(modules: Iterable[nn.Module]) -> None:
    """Reshard modules of fully_shard, as they are between two steps of training.

    After a forward pass without a backward pass the root has whole parameters, which are other objects than the
    optimizer's. state_dict() reshards them, too.
    """
    fsdp = _loaded_class("torch.distributed.fsdp", "FSDPModule")
    if not fsdp:
        return
    for module in modules:
        for child in all_modules(module):
            if isinstance(child, fsdp):
                child.reshard()  # type: ignore[operator]


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, str]]:
    """id(parameter) -> (path of its module in the state, its clean name in that module)."""
    names: dict[int, tuple[str, str]] = {}
    for path, module in modules.items():
        prefixes = _wrapper_prefixes(module)
        for key, parameter in module.named_parameters():
            names.setdefault(id(parameter), (path, _clean(key, prefixes)))
    return names


def state_of(value: Stateful, where: str) -> Any:
    """What `value.state_dict()` returns. Raises StateError, which names `where`, if that raises."""
    try:
        return value.state_dict()
    except ShardckptError:
        raise
    except Exception as error:
        if isinstance(value, nn.Module):
            for name, tensor in itertools.chain(value.named_parameters(), value.named_buffers()):
                for part in memory_parts(tensor):  # what has no elements cannot give them
                    check_memory(part, join(where, name))
        raise StateError(
            f"state[{where!r}], a {type(value).__qualname__}, could not give its state: its state_dict() raised "
            f"{type(error).__name__}: {error}"
        ) from error


def unsynced_buffers(module: nn.Module) -> set[str]:
    """Clean names of the buffers that DDP takes from rank 0 before each forward.

    Between two forwards they may differ between ranks (BatchNorm's running statistics), and rank 0's
    are the ones that count.
    """
    prefixes = _wrapper_prefixes(module)
    return {
        _clean(f"{path}.{name}" if path else name, prefixes)
        for path, child in module.named_modules()
        if isinstance(child, DistributedDataParallel) and child.broadcast_buffers
        for name, _ in child.named_buffers()
    }


def iter_modules(state: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module in a state's dicts, lists and tuples, down to MAX_DEPTH levels."""
    if isinstance(state, nn.Module):
        yield path, state
    elif depth > MAX_DEPTH or not isinstance(state, (Mapping, list, tuple)):
        return
    else:
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            text = key_text(key, path)
            place = f"{path}.{text}" if path else text
            yield from iter_modules(value, place, depth + 1)


def _loaded_class(module: str, name: str) -> tuple[type, ...]:
    """A class for isinstance if its module is imported, which may take a second; otherwise nothing."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper that adds nothing to the state; None for any other module."""
    name = _inner_name(module)
    if type(module).__name__ == "CheckpointWrapper":
        name = _CHECKPOINT_WRAPPER.removesuffix(".")
    return None if name is None or isinstance(module, AveragedModel) else module._modules.get(name)


def _inner_name(module: nn.Module) -> str | None:
    """The name under which a wrapper has its module, if that is a part of the keys of its state_dict."""
    if isinstance(module, (DistributedDataParallel, AveragedModel)):
        return "module"
    return (
        "_orig_mod"
        if isinstance(module, _loaded_class("torch._dynamo.eval_frame", "OptimizedModule"))
        else None
    )


def _wrapper_prefixes(module: nn.Module) -> list[tuple[str, str]]:
    """(prefix of a wrapped module's keys, prefix in clean names) of each wrapper, the innermost first."""
    prefixes = []
    for path, child in module.named_modules(remove_duplicate=False):
        inner = _inner_name(child)
        if inner is not None:
            outer = f"{path}.".replace(_CHECKPOINT_WRAPPER, "") if path else ""
            prefixes.append((f"{outer}{inner}.", outer))
    return sorted(prefixes, key=lambda pair: -len(pair[0]))


def _clean(key: str, prefixes: Sequence[tuple[str, str]]) -> str:
    """The key without wrapper prefixes, the innermost removed first: prefixes contain those around them."""
    key = key.replace(_CHECKPOINT_WRAPPER, "")
    for prefix, clean in prefixes:
        if key.startswith(prefix):
            key = clean + key[len(prefix) :]
    return key
