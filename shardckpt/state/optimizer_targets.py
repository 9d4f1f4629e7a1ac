"""Optimizers as targets of a load: state by parameter name, options by group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.format.names import join
from shardckpt.state.modules import Stateful, state_of
from shardckpt.state.optimizers import check_optimizer, has_groups, is_by_number, optimizer_parameters
from shardckpt.state.overlaps import overlaps_itself
from shardckpt.state.overrides import has_override, optimizer_loads_plainly
from shardckpt.state.target_builder import TargetBuilder, mismatch
from shardckpt.state.wrapped import own_part, storages

__all__ = ["bind_optimizer", "with_layouts"]

_DEPTH = 4
"""Levels of an object's attributes that are searched for optimizers."""

_OWN = ("params", "param_names")
"""Keys of a group that are not loaded: the parameters of the live group, and their names."""


def bind_optimizer(
    builder: TargetBuilder,
    optimizer: torch.optim.Optimizer,
    saved: Any,
    path: str,
    names: Mapping[int, tuple[str, str]],
) -> None:
    """Add to `builder` what a load of `saved` into the optimizer at `path` fills, and call its load_state_dict.

    State is matched by parameter name, so that neither the order of parameters nor their groups need to agree.
    The state of a plain optimizer is filled in place where it fits; one with hooks or methods of its own is given
    new memory for all of it. `names` is what `parameter_names` returns for the state's modules.
    """
    check_optimizer(optimizer, path)
    is_plain = optimizer_loads_plainly(optimizer)
    tree = None if is_plain else state_of(optimizer, path)
    if tree is not None and not is_by_number(tree, optimizer):
        make = builder.new_value(saved, with_layouts(optimizer, path), path)
        builder.on_filled(path, lambda: optimizer.load_state_dict(make()))
        return
    if not _is_by_name(saved):
        raise mismatch(path, "optimizer", saved)
    parameters = optimizer_parameters(optimizer, names)
    groups = {name: group for group in saved["param_groups"] for name in group["params"]}
    place = join(path, "state")
    state: dict[Any, Callable[[], Any]] = {}
    for number, (name, parameter) in enumerate(parameters):
        live = optimizer.state.get(parameter, {}) if tree is None else tree["state"].get(number, {})
        if name not in groups:
            builder.add_missing(join(place, name))
            state[number] = partial(_same, live)
        elif name in saved["state"]:
            state[number] = _made_state(
                builder, saved["state"][name], live, parameter, join(place, name), in_place=is_plain
            )
    own = {name for name, _ in parameters}
    for name in groups:
        if name not in own:
            builder.add_unexpected(None, join(place, name))
    for key, value in saved["state"].items():
        if key not in groups:  # of no parameter
            state[key] = builder.new_value(value, optimizer.state.get(key), join(place, key))
    made_groups = _made_groups(builder, optimizer, [name for name, _ in parameters], groups, path)
    rest = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    others = builder.new_value(rest, tree, path)

    def finish() -> None:
        filled = {key: make() for key, make in state.items()}
        optimizer.load_state_dict(
            {
                **others(),
                "state": {
                    key: entry for key, entry in filled.items() if entry or key not in range(len(own))
                },
                "param_groups": [make() for make in made_groups],
            }
        )
        if not has_override(optimizer, "load_state_dict", [torch.optim.Optimizer.load_state_dict]):
            _keep_precision(optimizer, [p for _, p in parameters], filled)

    builder.on_filled(path, finish)


def with_layouts(held: Stateful, path: str) -> Any:
    """The object's state_dict, which shows how the tensors that it will be given are laid out.

    If it contains the state_dict of an optimizer among the object's attributes, state that this optimizer lacks
    is laid out like its parameter.
    """
    tree = state_of(held, path)
    optimizers = list(_optimizers(held))
    return _laid_out(tree, optimizers) if optimizers else tree


def _is_by_name(saved: Any) -> bool:
    """True if this has the form that `optimizer_tree` returns."""
    return has_groups(saved) and all(
        isinstance(saved["state"].get(name, {}), dict)
        for group in saved["param_groups"]
        for name in group["params"]
    )


def _made_state(
    builder: TargetBuilder,
    saved: dict[str, Any],
    live: Mapping[str, Any],
    parameter: torch.Tensor,
    path: str,
    *,
    in_place: bool,
) -> Callable[[], Any]:
    """A function that returns a parameter's state: live tensors that are filled, or new ones laid out like it.

    A live tensor is not filled if it shares memory with the parameter, which has a value of its own, or if its
    elements share memory.
    """
    memory = storages(parameter)
    parts: dict[str, Callable[[], Any]] = {}
    for key, value in saved.items():
        held = live.get(key)
        place = join(path, key)
        is_own = held is not None and not (
            isinstance(held, torch.Tensor) and (storages(held) & memory or overlaps_itself(own_part(held)))
        )
        if in_place and is_own and builder.fits(held, value, place):
            builder.fill(cast("torch.Tensor", held), place, value)
            parts[key] = partial(_same, held)
        else:
            parts[key] = builder.new_value(value, held if is_own else parameter, place)
    return lambda: {key: make() for key, make in parts.items()}


def _made_groups(
    builder: TargetBuilder,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    saved: Mapping[str, dict[str, Any]],
    path: str,
) -> list[Callable[[], dict[str, Any]]]:
    """A function for each group that returns it as load_state_dict expects it: saved options, live parameters.

    `names` has all parameters' names in order; `saved` has the saved group of each name.
    """
    made: list[Callable[[], dict[str, Any]]] = []
    numbers = iter(range(len(names)))
    for index, group in enumerate(optimizer.param_groups):
        own: dict[str, Any] = {"params": [next(numbers) for _ in group["params"]]}
        if "param_names" in group:
            own["param_names"] = group["param_names"]
        sources = {id(g): g for number in own["params"] if (g := saved.get(names[number])) is not None}
        if len(sources) > 1:
            raise StateError(
                f"state[{path!r}]: the parameters of group {index} were in {len(sources)} groups when "
                "the checkpoint was written, so its learning rate and other options are unknown. Group "
                "the parameters as they were then."
            )
        source = next(iter(sources.values()), group)
        options = {key: value for key, value in source.items() if key not in _OWN}
        make = builder.new_value(options, group, join(join(path, "param_groups"), index))
        made.append(partial(_joined, make, own))
    return made


def _same(value: Any) -> Any:
    return value


def _joined(make: Callable[[], dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    return {**make(), **own}


def _keep_precision(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], filled: Mapping[Any, Any]
) -> None:
    """Revert load_state_dict's cast of state to the parameter's type, so that it has exactly what was saved."""
    for number, parameter in enumerate(parameters):
        held = optimizer.state.get(parameter)
        if held is not None and number in filled:
            held.update({key: _exact(held[key], v) for key, v in filled[number].items() if key in held})


def _exact(held: Any, loaded: Any) -> Any:
    """The value that load_state_dict made of `loaded`, in the type of `loaded` where it was only cast."""
    if isinstance(held, torch.Tensor) and isinstance(loaded, torch.Tensor):
        is_cast = held.dtype != loaded.dtype and torch.equal(held, loaded.to(held))
        return loaded.to(held.device) if is_cast else held
    if isinstance(held, dict) and isinstance(loaded, dict):
        return {key: _exact(value, loaded.get(key)) for key, value in held.items()}
    if type(held) in (list, tuple) and isinstance(loaded, (list, tuple)) and len(held) == len(loaded):
        return type(held)(_exact(one, other) for one, other in zip(held, loaded, strict=True))
    return held


def _optimizers(held: object, depth: int = 0) -> Iterator[torch.optim.Optimizer]:
    """The optimizers among an object's attributes, also in wrappers, lists and dicts."""
    values: Iterable[Any] = ()
    if isinstance(held, torch.optim.Optimizer) and depth:
        yield held
    elif isinstance(held, (list, tuple)):
        values = held
    elif isinstance(held, Mapping):
        values = held.values()
    elif isinstance(held, Stateful) and not isinstance(held, (type, nn.Module)):
        values = getattr(held, "__dict__", {}).values()
    if depth < _DEPTH:
        for value in values:
            yield from _optimizers(value, depth + 1)


def _laid_out(tree: Any, optimizers: list[torch.optim.Optimizer]) -> Any:
    """The tree, in which each optimizer's state_dict shows a layout for any state of its parameters."""
    if not isinstance(tree, Mapping):
        return tree
    found = next((o for o in optimizers if is_by_number(tree, o)), None)
    if found is None:
        return {key: _laid_out(value, optimizers) for key, value in tree.items()}
    parameters = [p for group in found.param_groups for p in group["params"]]
    state = {n: _LikeParameter(tree["state"].get(n, {}), p) for n, p in enumerate(parameters)}
    return {**tree, "state": {**tree["state"], **state}}


class _LikeParameter(dict[Any, Any]):
    """A parameter's state, in which the parameter stands for every key that it lacks."""

    def __init__(self, state: Mapping[Any, Any], parameter: torch.Tensor) -> None:
        super().__init__(state)
        self._parameter = parameter

    def get(self, key: Any, _default: Any = None) -> Any:
        return super().get(key, self._parameter)
