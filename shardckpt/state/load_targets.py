"""What a load fills: memory, and what is done with it once all of it is verified."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardckpt.errors import FormatError, ShapeMismatchError, StateError
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.manifest import Manifest, TensorEntry
from shardckpt.format.names import join, join_shown
from shardckpt.format.save_plan import looks_whole
from shardckpt.format.tree import PerRankRef, Record, TensorRef, WrapperRef, rebuilt
from shardckpt.progress import doing
from shardckpt.state.conform import conform
from shardckpt.state.overlaps import find_conflict, find_overlaps, overlaps_itself
from shardckpt.state.subclasses import empty_wrapper, expand, pair
from shardckpt.state.tensors import TensorShard, empty_like_saved, tensor_shard
from shardckpt.state.wrapped import inner_names, is_wrapper, memory_parts, own_part

__all__ = ["LoadTargets", "TargetBuilder", "mismatch"]

Undo = Callable[[], object]


class _Use(Enum):
    """What becomes of a value that a load makes."""

    GIVEN = auto()
    """An object gets it, which has to be able to go on with it."""
    OFFERED = auto()
    """A module gets it, which judges it."""
    REFILLED = auto()
    """It takes the place of the user's own, which is filled if it can be."""


@dataclass
class LoadTargets:
    """What a load fills.

    Once all new memory is filled, and before any of the state's own is, call `prepare`; when every tensor is
    filled, `apply`. Should the load fail in between, on this rank or another, call `undo`.

    Attributes:
        tensors: memory to fill; partly the state's own, partly new and handed over by `apply`.
        missing: names that the state has and the checkpoint has not.
        unexpected: names that the checkpoint has, in an object of the state, and the state has not.
        unused: top-level names of the checkpoint that the state does not ask for.
        kept: PerRank paths of which this rank has no saved value, because the world was smaller.
    """

    tensors: list[TensorShard] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    _live: list[torch.Tensor] = field(default_factory=list)
    _prepare: list[tuple[str, Callable[[], Undo | None]]] = field(default_factory=list)
    _undo: list[Undo] = field(default_factory=list)
    _finish: list[tuple[str, Callable[[], object]]] = field(default_factory=list)

    def prepare(self) -> None:
        """Do what may still refuse the checkpoint. Raises StateError and others; `undo` takes it back."""
        for path, action in self._prepare:
            with doing(f"load_state_dict of {path!r}"):
                undo = action()
            if undo is not None:
                self._undo.append(undo)

    def undo(self) -> None:
        """Take back what `prepare` has changed."""
        while self._undo:
            self._undo.pop()()

    def apply(self) -> None:
        """Hand what was loaded to the state's objects. Call once, when every tensor is filled."""
        torch.autograd.graph.increment_version(self._live)
        for path, finish in self._finish:
            try:
                with doing(f"load_state_dict of {path!r}"):  # of the user's own, which may hang
                    finish()
            except Exception as error:
                raise StateError(
                    f"state[{path!r}] did not accept what was loaded: {type(error).__name__}: {error}. "
                    "The state is partly loaded: do not go on with it."
                ) from error


class TargetBuilder:
    """Collects what a load of one checkpoint fills. Changes nothing of the state.

    `is_sharded` tells whether the state's modules are sharded. It is asked where it matters.
    """

    def __init__(self, manifest: Manifest, is_sharded: Callable[[], bool]) -> None:
        self.targets = LoadTargets()
        self._manifest = manifest
        self._is_sharded = is_sharded
        self._tensors: dict[str, TensorEntry] = {tensor.name: tensor for tensor in manifest.tensors}
        self._live: list[tuple[str, TensorShard]] = []
        self._taken: dict[int, tuple[object, object]] = {}

    def find(self, name: str, path: str) -> TensorEntry:
        """The record of the tensor that the value at `path` refers to."""
        if name not in self._tensors:
            raise FormatError(
                f"the checkpoint's values refer to the tensor {name!r} at {path!r}, which it lacks"
            )
        return self._tensors[name]

    def fits(self, held: object, saved: Any, path: str) -> bool:
        """Whether `held` is a tensor of the saved one's type and shape; of a wrapper, whether both are one."""
        if not isinstance(held, torch.Tensor):
            return False
        if isinstance(saved, WrapperRef) or is_wrapper(own_part(held)):
            return isinstance(saved, WrapperRef) and is_wrapper(own_part(held))
        if not isinstance(saved, TensorRef):
            return False
        tensor = self.find(saved.name, path)
        return tuple(held.shape) == tensor.shape and str(held.dtype) == f"torch.{tensor.dtype}"

    def check_fit(self, held: torch.Tensor, path: str, saved: Any) -> None:
        """Raise ShapeMismatchError or StateError unless `fill` would accept it."""
        for part, name in self._paired(held, saved, path):
            _check_fit(self.find(name, part.name), part, part.name)

    def fill(self, held: torch.Tensor, path: str, saved: Any) -> None:
        """Fill a tensor of the state, which lies at `path`; of a wrapper, what it consists of."""
        for part, name in self._paired(held, saved, path):
            self._fill_live(part, part.name, name)
        self.targets._live += memory_parts(held) if isinstance(saved, WrapperRef) else [held]

    def made(self, saved: Any, like: Any, path: str) -> Callable[[], Any]:
        """What makes the saved value, to be called when tensors are filled.

        Its tensors are new, laid out like those of `like` at the same place.
        """
        return self._made(saved, like, path, _Use.GIVEN)

    def offered(self, saved: Any, like: Any, path: str) -> Callable[[], Any]:
        """The same for a module that judges what it gets: it may be whole where the module is sharded."""
        return self._made(saved, like, path, _Use.OFFERED)

    def refilled(self, saved: Any, held: Any, path: str) -> Callable[[], Any]:
        """What makes the saved value out of `held`, so that whoever refers to that sees what was loaded.

        Dicts, lists, sets, NumPy arrays and their like are filled: they have then what was saved, and nothing
        else. Where two values were saved for one object, it gets the first, and the other is new, as is what
        cannot be filled.
        """
        return self._made(saved, held, path, _Use.REFILLED)

    def is_refillable(self, held: Any, saved: Any) -> bool:
        """Whether `held` is a container that can have what was saved, and nothing else was saved for it."""
        is_alike = (
            (isinstance(held, MutableMapping) and isinstance(saved, dict))
            or any(isinstance(held, kind) and type(saved) is kind for kind in (list, set, bytearray))
            or (isinstance(held, deque) and isinstance(saved, deque) and held.maxlen == saved.maxlen)
        )
        return is_alike and self._is_taken(held, saved)

    def finish(self, path: str, action: Callable[[], object]) -> None:
        """Do something for the object at `path` when every tensor is filled."""
        self.targets._finish.append((path, action))

    def prepare(self, path: str, action: Callable[[], Undo | None]) -> None:
        """Do something when new memory is filled. It may raise, and returns what takes it back."""
        self.targets._prepare.append((path, action))

    def missing(self, path: str) -> None:
        """Note a name that the checkpoint lacks."""
        self.targets.missing.append(path)

    def unexpected(self, saved: Any, path: str) -> None:
        """Note the names below an entry that the state has no place for."""
        if isinstance(saved, dict) and saved:
            for key, value in saved.items():
                self.unexpected(value, join_shown(path, key))
        else:
            self.targets.unexpected.append(path)

    def done(self) -> LoadTargets:
        """What was collected. LoadTargets that overlap are checked: one must not undo what another one gets.

        Those that are the same memory are filled once, if one content was saved for them. Others are filled when
        it is known that their memory can hold all that was saved for them.
        """
        for group in find_overlaps([target.data for _, target in self._live]):
            members = [self._live[number] for number in group]
            if len({(target.memory(), self._place(target.name)) for _, target in members}) > 1:
                self._fill_together(members)
        return self.targets

    def _made(self, saved: Any, like: Any, path: str, use: _Use) -> Callable[[], Any]:
        if isinstance(saved, TensorRef):
            return self._made_tensor(saved, like, path, use)
        if isinstance(saved, PerRankRef):
            raise mismatch(path, type(like).__qualname__, saved)
        if isinstance(saved, WrapperRef):
            return self._made_wrapper(saved, like, path)
        if isinstance(saved, dict):
            of = like if isinstance(like, Mapping) else {}
            parts = {
                key: self._made(value, of.get(key), join_shown(path, key), use)
                for key, value in saved.items()
            }
            if use is _Use.REFILLED and self.is_refillable(like, saved):
                return lambda: _refill(like, {key: make() for key, make in parts.items()})
            return lambda: conform(rebuilt(saved, [make() for make in parts.values()]), like, path)
        if isinstance(saved, (list, tuple, deque)):
            given = list(like) if isinstance(like, (list, tuple, deque)) else []
            items = [
                self._made(value, given[i] if i < len(given) else None, join_shown(path, i), use)
                for i, value in enumerate(saved)
            ]
            if isinstance(saved, Record):
                conform(saved, like, path)  # raises now, with nothing changed
            if use is _Use.REFILLED and self.is_refillable(like, saved):
                return lambda: _refill(like, [make() for make in items])
            return lambda: conform(rebuilt(saved, [make() for make in items]), like, path)
        value = conform(saved, like, path)
        if use is _Use.REFILLED and self.is_refillable(like, value):
            return lambda: _refill(like, value)
        return lambda: value

    def _made_tensor(self, ref: TensorRef, like: Any, path: str, use: _Use) -> Callable[[], Any]:
        tensor = self.find(ref.name, path)
        is_refilled = use is _Use.REFILLED and ref.ndarray and isinstance(like, np.ndarray)
        if is_refilled and self._is_array_refillable(like, tensor):
            self._fill_live(tensor_shard(torch.from_numpy(like), path), path, ref.name)
            return lambda: like
        layout = like if isinstance(like, torch.Tensor) and tuple(like.shape) == tensor.shape else None
        if layout is None and use is _Use.GIVEN and self._is_sharded() and not looks_whole(tensor):
            raise StateError(
                f"state[{path!r}] was saved in shards, and nothing here shows how it is laid out on these ranks: "
                "all of them would get all of it, which does not go with a sharded model. Pass the optimizer "
                "itself in place of an object around it, or let that make its state, by a step, before the load."
            )
        made = empty_like_saved(tensor.dtype, tensor.shape, layout)
        self._fill(tensor_shard(made, path), path, ref.name)
        return (lambda: made.numpy()) if ref.ndarray else (lambda: made)

    def _made_wrapper(self, saved: WrapperRef, like: Any, path: str) -> Callable[[], Any]:
        """What makes a wrapper as `like` is: only its class, which is not in the checkpoint, can do it."""
        if not isinstance(like, torch.Tensor) or not is_wrapper(own_part(like)):
            raise StateError(
                f"state[{path!r}] was saved as a tensor subclass {saved.type}, and there is none here to "
                "load into. A checkpoint has no classes: make it first, for an optimizer's state by a step, "
                "which the load undoes."
            )
        made = empty_wrapper(like)
        for part, name in self._paired(made, saved, path):
            self._fill(part, part.name, name)
        return lambda: made

    def _paired(self, held: torch.Tensor, saved: Any, path: str) -> list[tuple[TensorShard, str]]:
        """The tensors with memory that `held` consists of, each with its name in the checkpoint."""
        if not isinstance(saved, (TensorRef, WrapperRef)):
            raise mismatch(path, "tensor", saved)
        if isinstance(saved, WrapperRef):
            saved = self._without_late_parts(own_part(held), saved, path)
        reference, parts = expand(held, path)
        names = dict(pair(reference, saved, path))
        return [(part, names[part.name]) for part in parts]

    def _without_late_parts(self, wrapper: torch.Tensor, saved: WrapperRef, path: str) -> WrapperRef:
        """What was saved of a wrapper, without the inner tensors that the live one lacks so far: it gets them.

        Such a one is an attribute that is None so far, as the precomputed scale of a float8 weight is.
        """
        present = set(inner_names(wrapper)) if is_wrapper(wrapper) else set(saved)
        late = [name for name in saved if name not in present and getattr(wrapper, name, wrapper) is None]
        for name in late:
            make = self.made(saved[name], None, join(path, name))
            self.finish(path, partial(_set_part, wrapper, name, make))
        return saved.with_tensors({name: part for name, part in saved.items() if name not in late})

    def _is_array_refillable(self, array: npt.NDArray[Any], saved: TensorEntry) -> bool:
        """Whether the array can hold what was saved, and nothing else was saved for its memory."""
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return (
            array.shape == saved.shape
            and array.dtype == numpy_dtype(saved.dtype)
            and array.dtype.isnative
            and array.flags.writeable
            and array.flags.c_contiguous
            and self._is_taken(owner, saved.name)
        )

    def _is_taken(self, held: object, saved: object) -> bool:
        """Take an object of the user's to hold what was saved; False if it has to hold something else."""
        return bool(self._taken.setdefault(id(held), (held, saved))[1] == saved)

    def _fill_live(self, target: TensorShard, path: str, name: str) -> None:
        """Note a tensor of the state to fill from the checkpoint's `name`."""
        data = target.data
        if overlaps_itself(data):
            raise StateError(
                f"state[{path!r}] is a tensor several of whose elements share their memory (expanded, or made "
                "by as_strided or unfold), so it cannot be loaded into. Pass a clone() of it."
            )
        self._live.append((path, self._fill(target, path, name, is_new=False)))

    def _fill(self, target: TensorShard, path: str, name: str, *, is_new: bool = True) -> TensorShard:
        """Note memory to fill from the checkpoint's `name`."""
        _check_fit(self.find(name, path), target, path)
        noted = TensorShard(name, target.dtype, target.shape, target.pieces, target.data, is_new=is_new)
        self.targets.tensors.append(noted)
        return noted

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Where each tensor of the checkpoint has its first chunk; tied ones have it in the same place."""
        firsts = self._manifest.first_rows.tolist()
        chunks = self._manifest.chunks
        places = {}
        row = 0
        for tensor in self._manifest.tensors:
            if tensor.nbytes:
                places[tensor.name] = (chunks.pack[firsts[row]], chunks.offset[firsts[row]])
            row += len(tensor.arrays)
        return places

    def _place(self, name: str) -> Any:
        return self._places.get(name, name)

    def _fill_together(self, members: Sequence[tuple[str, TensorShard]]) -> None:
        """Read what was saved for targets that overlap into new memory, and copy it if all of it has room."""
        targets = [target for _, target in members]
        owned = {id(target) for target in targets}
        self.targets.tensors = [target for target in self.targets.tensors if id(target) not in owned]
        contents = [torch.empty_like(target.data) for target in targets]
        for target, content in zip(targets, contents, strict=True):
            self.targets.tensors.append(
                TensorShard(target.name, target.dtype, target.shape, target.pieces, content, is_new=True)
            )

        def check() -> None:
            if (pair := find_conflict([target.data for target in targets], contents)) is not None:
                one, other = (members[number][0] for number in pair)
                raise StateError(
                    f"state[{one!r}] and state[{other!r}] share their memory (they are tied), but in the "
                    "checkpoint they differ, so that one of them would be lost. Untie them before the load, or "
                    "load one of them."
                )

        def copy() -> None:
            with torch.no_grad():
                for target, content in zip(targets, contents, strict=True):
                    target.data.copy_(content)

        self.prepare(members[0][0], check)
        self.targets._finish.insert(0, (members[0][0], copy))


def _check_fit(saved: TensorEntry, target: TensorShard, path: str) -> None:
    if saved.shape != target.shape:
        raise ShapeMismatchError(
            f"state[{path!r}] has the shape {list(target.shape)}, but in the checkpoint it is "
            f"{list(saved.shape)}. Build the model as it was, or leave this part out of the state."
        )
    if saved.dtype != target.dtype:
        raise ShapeMismatchError(
            f"state[{path!r}] has the type {target.dtype}, but in the checkpoint it is "
            f"{saved.dtype}. Build it with the checkpoint's type, load, and convert afterwards."
        )


def mismatch(path: str, kind: str, saved: Any) -> StateError:
    """The error that the checkpoint has something else than a `kind` at `path`."""
    found = {TensorRef: "tensor", PerRankRef: "PerRank"}.get(type(saved), type(saved).__qualname__)
    return StateError(
        f"state[{path!r}] is {_with_article(kind)} here, but {_with_article(found)} in the checkpoint. Pass "
        "what was saved there, or leave it out of the state."
    )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIO' else 'a'} {noun}"


def _set_part(wrapper: torch.Tensor, name: str, make: Callable[[], torch.Tensor]) -> None:
    setattr(wrapper, name, make().to(wrapper.device))


def _refill(held: Any, value: Any) -> Any:
    """The container with what the value has, and nothing else."""
    held.clear()
    if isinstance(held, MutableMapping):
        for key, item in value.items():
            held[key] = item
    elif isinstance(held, set):
        held.update(value)
    else:
        held.extend(value)
    return held
