"""Modules and optimizers as named trees, whatever wraps them.

Names are those of the plain model: the prefixes of DDP, torch.compile, activation checkpointing and
AveragedModel are left out, so that a checkpoint does not depend on them
(`torch.distributed.checkpoint.state_dict` has the same names, but for AveragedModel's). An optimizer's state is
keyed by the names of its parameters, not by their order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from shardckpt.errors import UnsupportedValueError
from shardckpt.values import MAX_DEPTH

__all__ = [
    "AVERAGED_COUNT",
    "Stateful",
    "iter_modules",
    "local_part",
    "module_aliases",
    "module_tree",
    "optimizer_parameters",
    "optimizer_tree",
    "original_keys",
    "parameter_names",
    "reshard",
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


def module_tree(module: nn.Module, where: str) -> dict[str, Any]:
    """The module's state_dict under clean names. Its tensors share memory with the module's.

    Raises UnsupportedValueError for FSDP version 1, whose flat parameters the library does not store.
    """
    fsdp1 = _loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    for name, child in module.named_modules() if fsdp1 else ():
        if isinstance(child, fsdp1):
            raise UnsupportedValueError(
                f"state[{where!r}] has a FullyShardedDataParallel module (FSDP 1) at {name!r}, which "
                "is not supported; shard the model with torch.distributed.fsdp.fully_shard"
            )
    prefixes = _wrapper_prefixes(module)
    tree: dict[str, Any] = {}
    for key, value in module.state_dict().items():
        if (name := _clean(key, prefixes)) in tree:
            raise UnsupportedValueError(
                f"state[{where!r}] has two entries that would be named {name!r}, one of a wrapper (DDP, torch.compile "
                f"or AveragedModel) and one of the module in it, {key!r}. Rename one of them."
            )
        tree[name] = value
    return tree


def reshard(modules: Iterable[nn.Module]) -> None:
    """Have modules of fully_shard hold their shards, as between two steps of training.

    After a forward pass without a backward pass the root holds whole parameters, which are other objects than
    those that the optimizer has. state_dict() reshards them too.
    """
    fsdp = _loaded_class("torch.distributed.fsdp", "FSDPModule")
    if not fsdp:
        return
    waiting, seen = list(modules), set()
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, fsdp):
            module.reshard()
        waiting.extend(module._modules.values())


def original_keys(module: nn.Module) -> dict[str, str]:
    """Clean name -> the key that the module's own load_state_dict wants."""
    prefixes = _wrapper_prefixes(module)
    return {_clean(key, prefixes): key for key in module.state_dict()}


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, str]]:
    """id(parameter) -> (path of its module in the state, its clean name in that module)."""
    names: dict[int, tuple[str, str]] = {}
    for path, module in modules.items():
        prefixes = _wrapper_prefixes(module)
        for key, parameter in module.named_parameters():
            names.setdefault(id(parameter), (path, _clean(key, prefixes)))
    return names


def optimizer_parameters(
    optimizer: torch.optim.Optimizer, names: Mapping[int, tuple[str, str]]
) -> list[tuple[str, torch.Tensor]]:
    """The optimizer's parameters in its own order, each with its name.

    The name is the parameter's name in its module; with the module's path before it where the
    optimizer has parameters of several modules; and its number where it is in no module of the state.
    Should a name be taken already, the number follows it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    several = len({names[id(p)][0] for p in parameters if id(p) in names}) > 1
    named: dict[str, torch.Tensor] = {}
    for number, parameter in enumerate(parameters):
        path, name = names.get(id(parameter), ("", str(number)))
        full = f"{path}.{name}" if several and path else name
        named[full if full not in named else f"{full} (parameter {number})"] = parameter
    return list(named.items())


def optimizer_tree(
    optimizer: torch.optim.Optimizer, names: Mapping[int, tuple[str, str]]
) -> dict[str, Any]:
    """The optimizer's state_dict with parameters by name. Its tensors share memory with the optimizer's."""
    tree = dict(optimizer.state_dict())
    by_number = [name for name, _ in optimizer_parameters(optimizer, names)]
    tree["state"] = {
        by_number[key] if isinstance(key, int) else key: value for key, value in tree["state"].items()
    }
    tree["param_groups"] = [
        {**group, "params": [by_number[number] for number in group["params"]]}
        for group in tree["param_groups"]
    ]
    return tree


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, without a graph, and without the time that `to_local` takes to make one."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor._local_tensor
    return local if type(local) is torch.Tensor else tensor.to_local()


def module_aliases(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all of these tensors are memory of the module's own parameters and buffers."""
    own = {
        local_part(t).untyped_storage().data_ptr()
        for source in (module.parameters(), module.buffers())
        for t in source
    }
    return all(local_part(t).untyped_storage().data_ptr() in own for t in tensors.values())


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
            yield from iter_modules(value, f"{path}.{key}" if path else str(key), depth + 1)


def _loaded_class(module: str, name: str) -> tuple[type, ...]:
    """What isinstance takes: the class, if its module is imported, which takes torch a second; else nothing."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def _wrapper_prefixes(module: nn.Module) -> list[tuple[str, str]]:
    """(prefix of a wrapped module's keys, what it should be), the innermost first."""
    compiled = _loaded_class("torch._dynamo.eval_frame", "OptimizedModule")
    prefixes = []
    for path, child in module.named_modules(remove_duplicate=False):
        inner = (
            "module"
            if isinstance(child, (DistributedDataParallel, AveragedModel))
            else "_orig_mod"
            if isinstance(child, compiled)
            else None
        )
        if inner is not None:
            outer = f"{path}.".replace(_CHECKPOINT_WRAPPER, "") if path else ""
            prefixes.append((f"{outer}{inner}.", outer))
    return sorted(prefixes, key=lambda pair: -len(pair[0]))


def _clean(key: str, prefixes: list[tuple[str, str]]) -> str:
    """The key without wrapper prefixes; the innermost is taken away first, so that paths stay true."""
    key = key.replace(_CHECKPOINT_WRAPPER, "")
    for prefix, clean in prefixes:
        if key.startswith(prefix):
            key = clean + key[len(prefix) :]
    return key
