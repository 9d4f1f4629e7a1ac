"""Modules as targets of a load: filled in place, or through their own load_state_dict."""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from shardckpt.errors import MissingKeysError, ShapeMismatchError, ShardckptError
from shardckpt.format.names import join
from shardckpt.format.tree import TensorRef, WrapperRef
from shardckpt.state.modules import AVERAGED_COUNT, ModuleState, loading_module, module_state
from shardckpt.state.overrides import has_override, load_overrides
from shardckpt.state.subclasses import expand
from shardckpt.state.target_builder import TargetBuilder, mismatch
from shardckpt.state.wrapped import inner_names, is_wrapper, memory_parts, own_part, storages

__all__ = ["bind_module"]

_EXTRA_STATE = "_extra_state"
"""The last part of a state_dict key whose value has any type and shape: only the module knows it."""


def bind_module(builder: TargetBuilder, module: nn.Module, saved: Any, path: str, *, strict: bool) -> None:
    """Add to `builder` what a load of `saved` into the module at `path` fills.

    A plain module's tensors are filled in place, and no method of it is called. Where a module has hooks, methods
    or extra state of its own, its load_state_dict is called, with new memory for every value that such code sees.
    If names or shapes differ, which such code may accept, it is called before anything else of the state changes.
    """
    if not isinstance(saved, dict):
        raise mismatch(path, "module", saved)
    module = loading_module(module)
    state = module_state(module, path)
    saved = {
        name: value for name, value in saved.items() if name in state.tree or not _is_count(name, value)
    }
    overrides = load_overrides(module, state.name)
    if overrides and not _agrees(builder, state.tree, saved, path):
        for name, live in _tensors(state.tree).items():
            if name in saved and not overrides.see(name):
                builder.check_fit(live, join(path, name), saved[name])
        _offer(builder, module, state, saved, path, strict=strict)
        return
    handed: dict[str, Callable[[], Any]] = {}
    filled: dict[str, torch.Tensor] = {}
    wrappers = _wrappers(module, state)
    memory = {s for source in (module.parameters(), module.buffers()) for t in source for s in storages(t)}
    for name, live in state.tree.items():
        place = join(path, name)
        if name not in saved:
            builder.add_missing(place)
        elif not isinstance(live, torch.Tensor) or _is_extra(name):
            handed[state.key(name)] = builder.new_value(saved[name], live, place)
        elif not isinstance(saved[name], (TensorRef, WrapperRef)):
            raise mismatch(place, "tensor", saved[name])
        elif overrides.see(name) or not storages(live) <= memory:
            handed[state.key(name)] = builder.new_value(saved[name], live, place)
        else:
            builder.fill(live, place, saved[name])
            if name in wrappers:
                builder.on_filled(path, partial(_drop_caches, own_part(wrappers[name]), own_part(live)))
            filled[state.key(name)] = live
    for name, value in saved.items():
        if name not in state.tree:
            builder.add_unexpected(value, join(path, name))
    if handed or overrides:
        builder.on_filled(
            path,
            lambda: _load(module, state, {**filled, **_made(handed)}, strict=None if strict else False),
        )


def _wrappers(module: nn.Module, state: ModuleState) -> dict[str, torch.Tensor]:
    """The module's wrapper subclasses by clean name; state_dict() returns other objects of the same memory."""
    tensors = itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    return {state.name(key): tensor for key, tensor in tensors if is_wrapper(own_part(tensor))}


def _drop_caches(wrapper: torch.Tensor, detached: torch.Tensor) -> None:
    """Clear inner tensors that detach() does not keep, as the scale of a float8 weight's old elements."""
    for name in set(inner_names(wrapper)) - set(inner_names(detached)):
        setattr(wrapper, name, None)


def _agrees(builder: TargetBuilder, tree: Mapping[str, Any], saved: dict[str, Any], path: str) -> bool:
    """True if names, shapes and types are those of the module, so that its code will accept them."""
    live = _tensors(tree)
    for name, tensor in live.items():
        expand(tensor, join(path, name))  # refuses what cannot be loaded into
    return tree.keys() == saved.keys() and all(
        builder.fits(tensor, saved[name], join(path, name)) for name, tensor in live.items()
    )


def _tensors(tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tree.items() if isinstance(t, torch.Tensor) and not _is_extra(name)}


def _offer(
    builder: TargetBuilder,
    module: nn.Module,
    state: ModuleState,
    saved: dict[str, Any],
    path: str,
    *,
    strict: bool,
) -> None:
    """Have the module's load_state_dict called with everything that was saved, before the state changes.

    Only its hooks and methods know what they rename, reshape or do without. If it refuses, or if the load fails
    later, its tensors get their former content.
    """
    lacking = {name: live for name, live in state.tree.items() if name not in saved}
    handed = {
        state.key(name): builder.offered_value(
            value, state.tree.get(name, _same_shape(builder, value, lacking, path)), join(path, name)
        )
        for name, value in saved.items()
    }
    missing = [join(path, name) for name in state.tree if name not in saved]
    unexpected = [join(path, name) for name in saved if name not in state.tree]

    def load() -> Callable[[], None]:
        places: list[Any] = [
            place for child in module.modules() for place in (child._parameters, child._buffers)
        ]
        tensors = [dict(place) for place in places]
        with torch.no_grad():
            before = [
                (part, part.clone())
                for tensor in (*module.parameters(), *module.buffers())
                for part in memory_parts(tensor)
            ]

        def undo() -> None:
            for place, former in zip(places, tensors, strict=True):
                place.clear()
                place.update(former)
            with torch.no_grad():
                for live, content in before:
                    live.copy_(content)

        try:
            result = _load(module, state, _made(handed), strict=strict)
        except Exception as error:
            undo()
            raise _refusal(path, module, missing, unexpected, error) from error
        if not strict:
            _report(builder, state, path, result, missing, unexpected)
        return undo

    builder.on_verified(path, load)


def _same_shape(builder: TargetBuilder, saved: Any, lacking: Mapping[str, Any], path: str) -> Any:
    """A tensor of the module that gets nothing, of the saved tensor's shape: the layout for that one."""
    if not isinstance(saved, TensorRef):
        return None
    shape = builder.entry(saved.name, path).shape
    return next((t for t in lacking.values() if isinstance(t, torch.Tensor) and t.shape == shape), None)


def _load(module: nn.Module, state: ModuleState, values: dict[str, Any], *, strict: bool | None) -> Any:
    """Call the module's load_state_dict. `strict` is None if the names have been compared already."""
    tree: Any = OrderedDict(values)
    if state.metadata is not None:
        tree._metadata = state.metadata
    if not has_override(module, "load_state_dict", [nn.Module.load_state_dict]):
        return module.load_state_dict(tree, strict=bool(strict))
    if strict is False and "strict" in inspect.signature(module.load_state_dict).parameters:
        return module.load_state_dict(tree, strict=False)
    return module.load_state_dict(tree)


def _refusal(
    path: str, module: nn.Module, missing: list[str], unexpected: list[str], error: Exception
) -> ShardckptError:
    kind = MissingKeysError if missing or unexpected else ShapeMismatchError
    return kind(
        f"state[{path!r}], a {type(module).__qualname__}, has other names, shapes or types than the checkpoint, "
        f"and its load_state_dict did not accept them: {type(error).__name__}: {error} Nothing was loaded."
    )


def _report(
    builder: TargetBuilder,
    state: ModuleState,
    path: str,
    result: Any,
    missing: list[str],
    unexpected: list[str],
) -> None:
    """Add the names that were not loaded: those that load_state_dict returned, or else all that differ."""
    for attribute, names, told in (
        ("missing_keys", missing, builder.targets.missing),
        ("unexpected_keys", unexpected, builder.targets.unexpected),
    ):
        keys = getattr(result, attribute, None)
        told.extend(names if keys is None else [join(path, state.name(key)) for key in keys])


def _made(values: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    return {key: make() for key, make in values.items()}


def _is_count(name: str, saved: Any) -> bool:
    """True for the counter that an AveragedModel adds to the names of its module."""
    return isinstance(saved, TensorRef) and name.rpartition(".")[2] == AVERAGED_COUNT


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE
