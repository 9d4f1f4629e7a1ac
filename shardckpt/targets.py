"""The inverse of flatten: what a load fills, and how it is handed to the state's objects.

`bind` compares a state with a checkpoint and changes nothing. It returns the tensors to fill; once they
are filled, `Targets.apply` gives everything else to the modules, optimizers and other objects.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardckpt.errors import FormatError, MissingKeysError, ShapeMismatchError, StateError
from shardckpt.local import LocalTensor, empty_like_saved, local_tensor
from shardckpt.manifest import Manifest, Tensor
from shardckpt.objects import (
    AVERAGED_COUNT,
    Stateful,
    iter_modules,
    local_part,
    module_aliases,
    module_tree,
    optimizer_parameters,
    original_keys,
    parameter_names,
    reshard,
)
from shardckpt.progress import doing
from shardckpt.state import PerRank, check_state, per_rank_path
from shardckpt.values import PerRankRef, TensorRef, decode, join

__all__ = ["Targets", "bind"]

_ABSENT = object()
_LISTED = 8
_EXTRA_STATE = "_extra_state"
"""The end of a state_dict key whose value is the module's own affair, of any type and shape."""


@dataclass
class Targets:
    """What a load fills.

    Attributes:
        tensors: memory to fill; partly the state's own, partly new and handed over by `apply`.
        missing: names that the state has and the checkpoint has not.
        unexpected: names that the checkpoint has, in an object of the state, and the state has not.
        unused: top-level names of the checkpoint that the state does not ask for.
        kept: PerRank paths of which this rank has no saved value, because the world was smaller.
    """

    tensors: list[LocalTensor] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    _finish: list[tuple[str, Callable[[], object]]] = field(default_factory=list)

    def apply(self) -> None:
        """Hand what was loaded to the state's objects. Call once, when every tensor is filled."""
        for path, finish in self._finish:
            try:
                with doing(f"load_state_dict of {path!r}"):  # of the user's own, which may hang
                    finish()
            except Exception as error:
                raise StateError(
                    f"state[{path!r}] did not accept what was loaded: {type(error).__name__}: {error}. "
                    "The state is partly loaded: do not go on with it."
                ) from error


def bind(state: dict[str, Any], manifest: Manifest, rank: int, *, strict: bool) -> Targets:
    """What loading `manifest` into `state` fills on this rank. Changes nothing.

    Raises ShapeMismatchError; with `strict` also MissingKeysError, if the names below any top-level key
    of the state differ from the checkpoint's.
    """
    check_state(state)
    modules = dict(iter_modules(state))
    reshard(modules.values())
    binder = _Binder(manifest, rank, parameter_names(modules))
    saved = decode(manifest.values)
    binder.entries(state, saved, "")
    targets = binder.targets
    targets.unused = [key for key in saved if key not in state]
    if strict and (targets.missing or targets.unexpected):
        raise MissingKeysError(_difference(targets))
    return targets


class _Binder:
    """One walk over a state and, side by side, what was saved of it."""

    def __init__(self, manifest: Manifest, rank: int, names: Mapping[int, tuple[str, str]]) -> None:
        self.targets = Targets()
        self._manifest = manifest
        self._rank = rank
        self._names = names
        self._tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in manifest.tensors}

    def entries(self, held: Any, saved: Any, path: str) -> None:
        """The entries of a dict or list of the state that is not plain data throughout."""
        pairs = list(held.items() if isinstance(held, dict) else enumerate(held))
        if not isinstance(saved, dict if isinstance(held, dict) else (list, tuple)):
            raise self._mismatch(path, type(held).__qualname__, saved)
        wanted = dict(saved if isinstance(saved, dict) else enumerate(saved))
        for key, value in pairs:
            self._entry(held, key, value, wanted.pop(key, _ABSENT), join(path, key))
        if path:
            for key, value in wanted.items():
                self._unexpected(value, join(path, key))

    def _entry(self, parent: Any, key: Any, held: Any, saved: Any, path: str) -> None:
        if saved is _ABSENT:
            self.targets.missing.append(path)
        elif isinstance(held, PerRank):
            self._per_rank(held, saved, path)
        elif isinstance(held, nn.Module):
            self._module(held, saved, path)
        elif isinstance(held, torch.optim.Optimizer):
            self._optimizer(held, saved, path)
        elif isinstance(held, torch.Tensor) and isinstance(saved, TensorRef):
            self._fill(local_tensor(held, path), saved.name)
        elif isinstance(held, torch.Tensor):
            raise self._mismatch(path, "tensor", saved)
        elif isinstance(held, Stateful) and not isinstance(held, type):
            tree = self._made(saved, held.state_dict(), path)
            self.targets._finish.append((path, lambda: held.load_state_dict(tree())))
        elif isinstance(held, (dict, list, tuple)) and _has_objects(held):
            self.entries(held, saved, path)
        elif not isinstance(parent, tuple):
            made = self._made(saved, held, path)
            self.targets._finish.append((path, lambda: parent.__setitem__(key, made())))
        elif repr(saved) != repr(held):
            raise StateError(
                f"state[{path!r}] is {held!r} in a tuple, which cannot be changed, and {saved!r} in the "
                "checkpoint. Use a list instead of the tuple."
            )

    def _per_rank(self, held: PerRank, saved: Any, path: str) -> None:
        if not isinstance(saved, PerRankRef):
            raise self._mismatch(path, "PerRank", saved)
        saved_values = {}
        if self._rank < self._manifest.world_size:
            saved_values = self._manifest.per_rank[self._rank]
        if not saved_values:  # a smaller world saved it, perhaps resharded since
            self.targets.kept.append(path)
            return
        if saved.path not in saved_values:
            raise FormatError(f"the checkpoint lacks rank {self._rank}'s value of state[{path!r}]")
        content = decode(saved_values[saved.path])
        holder = {"value": held.value}
        self._entry(holder, "value", held.value, content, per_rank_path(path, self._rank))
        self.targets._finish.append((path, lambda: setattr(held, "value", holder["value"])))

    def _module(self, module: nn.Module, saved: Any, path: str) -> None:
        """Tensors are filled in place; load_state_dict is called only for what is not plain memory."""
        tree = module_tree(module, path)
        wanted = dict(saved) if isinstance(saved, dict) else {}
        if not isinstance(saved, dict):
            raise self._mismatch(path, "module", saved)
        loaded: dict[str, Any] = {}
        extra: dict[str, Callable[[], Any]] = {}
        for name, held in tree.items():
            place = join(path, name)
            value = wanted.pop(name, _ABSENT)
            if value is _ABSENT:
                self.targets.missing.append(place)
            elif not isinstance(held, torch.Tensor) or name.rpartition(".")[2] == _EXTRA_STATE:
                extra[name] = self._made(value, held, place)
            elif isinstance(value, TensorRef):
                self._fill(local_tensor(held, place), value.name)
                loaded[name] = held
            else:
                raise self._mismatch(place, "tensor", value)
        for name, value in wanted.items():
            if name.rpartition(".")[2] != AVERAGED_COUNT or not isinstance(value, TensorRef):
                self._unexpected(value, join(path, name))
        if extra or not module_aliases(module, loaded):
            keys = original_keys(module)

            def finish() -> object:
                loaded.update({name: make() for name, make in extra.items()})
                return module.load_state_dict({keys[n]: v for n, v in loaded.items()}, strict=False)

            self.targets._finish.append((path, finish))

    def _optimizer(self, optimizer: torch.optim.Optimizer, saved: Any, path: str) -> None:
        """State by parameter name, so neither the order of parameters nor their groups need to agree."""
        if not _is_optimizer(saved):
            raise self._mismatch(path, "optimizer", saved)
        parameters = optimizer_parameters(optimizer, self._names)
        groups = {name: group for group in saved["param_groups"] for name in group["params"]}
        state: dict[Any, Callable[[], Any]] = {}
        for number, (name, parameter) in enumerate(parameters):
            live = optimizer.state.get(parameter, {})
            if name not in groups:
                self.targets.missing.append(join(join(path, "state"), name))
                state[number] = lambda live=live: live  # type: ignore[misc]
            elif name in saved["state"]:
                place = join(join(path, "state"), name)
                state[number] = self._made_state(saved["state"][name], live, parameter, place)
        names = [name for name, _ in parameters]
        for name in groups:
            if name not in set(names):
                self.targets.unexpected.append(join(join(path, "state"), name))
        numbers = iter(range(len(names)))
        made_groups = []
        for index, group in enumerate(optimizer.param_groups):
            own = [next(numbers) for _ in group["params"]]
            sources = {id(g): g for number in own if (g := groups.get(names[number])) is not None}
            if len(sources) > 1:
                raise StateError(
                    f"state[{path!r}]: the parameters of group {index} were in {len(sources)} groups when "
                    "the checkpoint was written, so its learning rate and other options are unknown. Group "
                    "the parameters as they were then."
                )
            source = next(iter(sources.values()), {k: v for k, v in group.items() if k != "params"})
            options = {key: value for key, value in source.items() if key != "params"}
            place = join(join(path, "param_groups"), index)
            made_groups.append((own, self._made(options, group, place)))
        rest = {k: v for k, v in saved.items() if k not in ("state", "param_groups")}
        others = self._made(rest, None, path)

        def finish() -> None:
            filled = {number: make() for number, make in state.items()}
            tree = {
                **others(),
                "state": {number: entry for number, entry in filled.items() if entry},
                "param_groups": [{**make(), "params": own} for own, make in made_groups],
            }
            optimizer.load_state_dict(tree)
            _keep_precision(optimizer, [p for _, p in parameters], filled)

        self.targets._finish.append((path, finish))

    def _made_state(
        self, saved: dict[str, Any], live: Mapping[str, Any], parameter: torch.Tensor, path: str
    ) -> Callable[[], Any]:
        """What makes a parameter's state: its own tensors filled where they fit, else new ones laid out like it.

        A live tensor that shares the parameter's memory is never filled: the parameter has its own value.
        """
        memory = _storage(parameter)
        parts = {}
        for key, value in saved.items():
            held = live.get(key)
            is_own = held is not None and not (isinstance(held, torch.Tensor) and _storage(held) == memory)
            parts[key] = self._made(value, held if is_own else parameter, join(path, key), in_place=is_own)
        return lambda: {key: make() for key, make in parts.items()}

    def _made(self, saved: Any, like: Any, path: str, *, in_place: bool = False) -> Callable[[], Any]:
        """What makes the saved value, to be called when tensors are filled.

        Its tensors are new, laid out like those of `like` at the same place; or `like`'s own, where
        `in_place` allows it and they fit.
        """
        if isinstance(saved, TensorRef):
            return self._made_tensor(saved, like, path, in_place=in_place)
        if isinstance(saved, PerRankRef):
            raise self._mismatch(path, "PerRank", saved)
        if isinstance(saved, dict):
            of = like if isinstance(like, Mapping) else {}
            parts = {
                key: self._made(value, of.get(key), join(path, key), in_place=in_place)
                for key, value in saved.items()
            }
            return lambda: _dict_like(like, {key: make() for key, make in parts.items()})
        if isinstance(saved, (list, tuple)):
            given = like if isinstance(like, (list, tuple)) and len(like) == len(saved) else ()
            items = [
                self._made(value, given[i] if given else None, join(path, i), in_place=in_place)
                for i, value in enumerate(saved)
            ]
            kind = type(saved)
            return lambda: kind(make() for make in items)
        return lambda: saved

    def _made_tensor(self, ref: TensorRef, like: Any, path: str, *, in_place: bool) -> Callable[[], Any]:
        tensor = self._find(ref.name, path)
        layout = like if isinstance(like, torch.Tensor) else None
        if in_place and layout is not None and _fits(layout, tensor):
            made = layout.detach()
            self._fill(local_tensor(made, path), ref.name)
        else:
            made = empty_like_saved(tensor.dtype, tensor.shape, layout)
            self._fill(local_tensor(made, path), ref.name, is_new=True)
        return (lambda: made.numpy()) if ref.ndarray else (lambda: made)

    def _fill(self, target: LocalTensor, name: str, *, is_new: bool = False) -> None:
        """Note a tensor to fill from the checkpoint's `name`."""
        saved = self._find(name, target.name)
        if saved.shape != target.shape:
            raise ShapeMismatchError(
                f"state[{target.name!r}] has the shape {list(target.shape)}, but in the checkpoint it is "
                f"{list(saved.shape)}. Build the model as it was, or leave this part out of the state."
            )
        if saved.dtype != target.dtype:
            raise ShapeMismatchError(
                f"state[{target.name!r}] has the type {target.dtype}, but in the checkpoint it is "
                f"{saved.dtype}. Build it with the checkpoint's type, load, and convert afterwards."
            )
        if any(
            n > 1 and stride == 0 for n, stride in zip(target.data.shape, target.data.stride(), strict=True)
        ):
            raise StateError(
                f"state[{target.name!r}] is an expanded tensor, several of whose elements share their memory, so "
                "it cannot be loaded into. Pass a clone() of it."
            )
        self.targets.tensors.append(
            LocalTensor(name, target.dtype, target.shape, target.pieces, target.data, is_new=is_new)
        )

    def _find(self, name: str, path: str) -> Tensor:
        if name not in self._tensors:
            raise StateError(
                f"the checkpoint's values refer to the tensor {name!r} at {path!r}, which it lacks"
            )
        return self._tensors[name]

    def _unexpected(self, saved: Any, path: str) -> None:
        """Note the names below an entry that the state has no place for."""
        if isinstance(saved, dict) and saved:
            for key, value in saved.items():
                self._unexpected(value, join(path, key))
        else:
            self.targets.unexpected.append(path)

    @staticmethod
    def _mismatch(path: str, kind: str, saved: Any) -> StateError:
        found = {TensorRef: "a tensor", PerRankRef: "a per-rank value"}.get(
            type(saved), f"a {type(saved).__qualname__}"
        )
        return StateError(
            f"state[{path!r}] is a {kind} here, but {found} in the checkpoint. Pass what was saved there, "
            "or leave it out of the state."
        )


def _fits(live: torch.Tensor, saved: Tensor) -> bool:
    return tuple(live.shape) == saved.shape and str(live.dtype) == f"torch.{saved.dtype}"


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    """Which memory the tensor lies in, as far as this rank holds it."""
    local = local_part(tensor)
    return local.device, local.untyped_storage().data_ptr()


def _is_optimizer(saved: Any) -> bool:
    """Whether this is what `optimizer_tree` makes."""
    return (
        isinstance(saved, dict)
        and isinstance(saved.get("state"), dict)
        and all(isinstance(entry, dict) for entry in saved["state"].values())
        and isinstance(saved.get("param_groups"), list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved["param_groups"])
    )


def _has_objects(held: Any) -> bool:
    """Whether something in this container is to be loaded into, and not just replaced."""
    if isinstance(held, Mapping):
        return any(_has_objects(value) for value in held.values())
    if isinstance(held, (list, tuple)):
        return any(_has_objects(value) for value in held)
    return isinstance(held, (torch.Tensor, PerRank)) or (
        isinstance(held, Stateful) and not isinstance(held, type)
    )


def _dict_like(like: Any, value: dict[Any, Any]) -> Any:
    """The dict as the kind of dict that `like` is: JSON has one kind, schedulers use several."""
    if isinstance(like, Counter):
        return Counter(value)
    if isinstance(like, OrderedDict):
        return OrderedDict(value)
    if isinstance(like, defaultdict):
        return defaultdict(like.default_factory, value)
    return value


def _keep_precision(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.Tensor],
    filled: Mapping[int, Mapping[str, Any]],
) -> None:
    """Undo load_state_dict's cast of state to the parameter's type: what was saved comes back exactly."""
    for number, parameter in enumerate(parameters):
        for key, value in filled.get(number, {}).items():
            held = optimizer.state[parameter].get(key)
            if (
                isinstance(value, torch.Tensor)
                and isinstance(held, torch.Tensor)
                and held.dtype != value.dtype
            ):
                optimizer.state[parameter][key] = value.to(held.device)


def _difference(targets: Targets) -> str:
    lines = ["the state and the checkpoint do not have the same names."]
    for names, what in (
        (targets.missing, "in the state but not in the checkpoint"),
        (targets.unexpected, "in the checkpoint but not in the state"),
    ):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:_LISTED])}{more}")
    lines.append(
        "Nothing was loaded. With strict=False what both have is loaded, and the rest is reported."
    )
    return "\n".join(lines)
