"""Modules and optimizers as named trees, whatever wraps them.

Names are those of the plain model: the prefixes of DDP, torch.compile, activation checkpointing and
AveragedModel are left out, so that a checkpoint does not depend on them
(`torch.distributed.checkpoint.state_dict` has the same names, but for AveragedModel's). An optimizer's state is
keyed by the names of its parameters, not by their order.
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
"""What activation checkpointing puts into parameter names, and takes out of state_dict keys itself."""

AVERAGED_COUNT = "n_averaged"
"""What AveragedModel adds to the names of its module: a number that a plain model has no use for."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that can give its state as data and take it back."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as a tree of tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over a state."""


@dataclass(frozen=True)
class ModuleState:
    """A module's state_dict under clean names.

    Attributes:
        tree: by clean name; its tensors share memory with the module's.
        metadata: what torch keeps beside a state_dict: the version of each submodule's layout.
    """

    tree: dict[str, Any]
    metadata: Any
    _keys: Mapping[str, str]
    _prefixes: Sequence[tuple[str, str]]

    def key(self, name: str) -> str:
        """What the module's own state_dict calls a clean name; one that it lacks, as if it had it."""
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

    Raises UnsupportedValueError for FSDP version 1, whose flat parameters the library does not store, and as
    `state_of` does.
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
    """Whether it has parameters of which a rank holds a part."""
    return any(
        isinstance(parameter, DTensor)
        and any(not placement.is_replicate() for placement in parameter.placements)
        for parameter in module.parameters()
    )


def loading_module(module: nn.Module) -> nn.Module:
    """The module whose load_state_dict is to be called for a load into `module`.

    It is the module itself, unless that is a wrapper around one with a load_state_dict of its own, which the
    wrapper's would pass by.
    """
    inner = module
    while (inside := _wrapped(inner)) is not None:
        inner = inside
    return inner if has_override(inner, "load_state_dict", [nn.Module.load_state_dict]) else module


def reshard(modules: Iterable[nn.Module]) -> None:
    """Have modules of fully_shard hold their shards, as between two steps of training.

    After a forward pass without a backward pass the root holds whole parameters, which are other objects than
    those that the optimizer has. state_dict() reshards them too.
    """
    fsdp = _loaded_class("torch.distributed.fsdp", "FSDPModule")
    if not fsdp:
        return
    waiting: list[nn.Module | None] = list(modules)
    seen: set[nn.Module] = set()
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, fsdp):
            module.reshard()  # type: ignore[operator]
        waiting.extend(module._modules.values())


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, str]]:
    """id(parameter) -> (path of its module in the state, its clean name in that module)."""
    names: dict[int, tuple[str, str]] = {}
    for path, module in modules.items():
        prefixes = _wrapper_prefixes(module)
        for key, parameter in module.named_parameters():
            names.setdefault(id(parameter), (path, _clean(key, prefixes)))
    return names


def state_of(value: Stateful, where: str) -> Any:
    """What the object's own state_dict() returns. Raises StateError, which names `where`, if it raises."""
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
    """Every module in a state's dicts, lists and tuples, with its path; none deeper than a state can be."""
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
    """What isinstance takes: the class, if its module is imported, which takes torch a second; else nothing."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper that adds nothing to the state wraps; None for other modules."""
    name = _inner_name(module)
    if type(module).__name__ == "CheckpointWrapper":
        name = _CHECKPOINT_WRAPPER.removesuffix(".")
    return None if name is None or isinstance(module, AveragedModel) else module._modules.get(name)


def _inner_name(module: nn.Module) -> str | None:
    """Under which name a wrapper has what it wraps, where that is part of the names in its state_dict."""
    if isinstance(module, (DistributedDataParallel, AveragedModel)):
        return "module"
    return (
        "_orig_mod"
        if isinstance(module, _loaded_class("torch._dynamo.eval_frame", "OptimizedModule"))
        else None
    )


def _wrapper_prefixes(module: nn.Module) -> list[tuple[str, str]]:
    """(prefix of a wrapped module's keys, what it should be), the innermost first."""
    prefixes = []
    for path, child in module.named_modules(remove_duplicate=False):
        inner = _inner_name(child)
        if inner is not None:
            outer = f"{path}.".replace(_CHECKPOINT_WRAPPER, "") if path else ""
            prefixes.append((f"{outer}{inner}.", outer))
    return sorted(prefixes, key=lambda pair: -len(pair[0]))


def _clean(key: str, prefixes: Sequence[tuple[str, str]]) -> str:
    """The key without wrapper prefixes; the innermost is taken away first, so that paths stay true."""
    key = key.replace(_CHECKPOINT_WRAPPER, "")
    for prefix, clean in prefixes:
        if key.startswith(prefix):
            key = clean + key[len(prefix) :]
    return key
