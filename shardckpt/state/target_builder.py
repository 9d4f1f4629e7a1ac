"""TargetBuilder: collects what a load of one checkpoint fills."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from enum import Enum, auto
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardckpt.errors import FormatError, ShapeMismatchError, StateError
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.holders import looks_whole
from shardckpt.format.manifest import Manifest, TensorEntry
from shardckpt.format.names import join, join_shown
from shardckpt.format.tree import PerRankRef, Record, TensorRef, WrapperRef, rebuilt
from shardckpt.state.conform import conform
from shardckpt.state.load_targets import LoadTargets, Undo
from shardckpt.state.overlaps import find_conflict, find_overlaps, overlaps_itself
from shardckpt.state.subclasses import empty_wrapper, expand, pair
from shardckpt.state.tensors import TensorShard, empty_like_saved, tensor_shard
from shardckpt.state.wrapped import PLAIN_TYPES, inner_names, is_wrapper, memory_parts, own_part

__all__ = ["TargetBuilder", "mismatch"]


class _Use(Enum):
    """What happens to a value that a load makes."""

    GIVEN = auto()
    """An object of the state is given it, and must be able to use it."""
    OFFERED = auto()
    """A module is given it, and may refuse it."""
    REFILLED = auto()
    """It replaces the user's value, which is refilled in place where that is possible."""


class TargetBuilder:
    """Collects what a load of one checkpoint fills. Changes nothing of the state.

    In all methods, `path` is the place of a value in the state, `saved` the decoded value that was saved there,
    and `live` or `like` the value that the state has.
    """

    def __init__(self, manifest: Manifest, is_sharded: Callable[[], bool]) -> None:
        """`is_sharded` returns whether the state's modules are sharded; it is called only where that matters."""
        self.targets = LoadTargets()
        self._manifest = manifest
        self._is_sharded = is_sharded
        self._tensors: dict[str, TensorEntry] = {tensor.name: tensor for tensor in manifest.tensors}
        self._live: list[tuple[str, TensorShard]] = []
        self._claims: dict[int, tuple[object, object]] = {}

    def entry(self, name: str, path: str) -> TensorEntry:
        """The manifest's entry of the tensor `name`. Raises FormatError, which names `path`, if there is none."""
        if name not in self._tensors:
            raise FormatError(
                f"the checkpoint's values refer to the tensor {name!r} at {path!r}, which it lacks"
            )
        return self._tensors[name]

    def fits(self, live: object, saved: Any, path: str) -> bool:
        """True if `live` is a tensor of the saved tensor's type and shape, or if both are wrapper subclasses."""
        if not isinstance(live, torch.Tensor):
            return False
        if isinstance(saved, WrapperRef) or is_wrapper(own_part(live)):
            return isinstance(saved, WrapperRef) and is_wrapper(own_part(live))
        if not isinstance(saved, TensorRef):
            return False
        tensor = self.entry(saved.name, path)
        return tuple(live.shape) == tensor.shape and str(live.dtype) == f"torch.{tensor.dtype}"

    def check_fit(self, live: torch.Tensor, path: str, saved: Any) -> None:
        """Raise ShapeMismatchError or StateError unless `fill` would accept it."""
        for part, name in self._paired(live, saved, path):
            _check_fit(self.entry(name, part.name), part, part.name)

    def fill(self, live: torch.Tensor, path: str, saved: Any) -> None:
        """Fill a tensor of the state in place; of a wrapper subclass, the tensors that it consists of."""
        if type(saved) is TensorRef and type(live) in PLAIN_TYPES:  # as nearly all are
            self._fill_live(tensor_shard(live, path, own=live), path, saved.name)
            self.targets.live.append(live)
            return
        for part, name in self._paired(live, saved, path):
            self._fill_live(part, part.name, name)
        self.targets.live += memory_parts(live) if isinstance(saved, WrapperRef) else [live]

    def new_value(self, saved: Any, like: Any, path: str) -> Callable[[], Any]:
        """A function that returns the saved value; call it when every tensor is filled.

        The value's tensors are new, and laid out like the tensors at the same place in `like`.
        """
        return self._made(saved, like, path, _Use.GIVEN)

    def offered_value(self, saved: Any, like: Any, path: str) -> Callable[[], Any]:
        """As `new_value`, for a module that may refuse it: a tensor may be whole where the module is sharded."""
        return self._made(saved, like, path, _Use.OFFERED)

    def refilled_value(self, saved: Any, live: Any, path: str) -> Callable[[], Any]:
        """A function that puts the saved value into `live`, and returns it; call it when every tensor is filled.

        Dicts, lists, sets, NumPy arrays and the like are refilled in place, so that other references to them see
        what was loaded: they have then what was saved, and nothing else. A value of any other type is new. If two
        values were saved for one object, it gets the first, and the second is new.
        """
        return self._made(saved, live, path, _Use.REFILLED)

    def is_refillable(self, live: Any, saved: Any) -> bool:
        """True if `live` is a container that can be refilled with `saved`, and gets no other value."""
        is_alike = (
            (isinstance(live, MutableMapping) and isinstance(saved, dict))
            or any(isinstance(live, kind) and type(saved) is kind for kind in (list, set, bytearray))
            or (isinstance(live, deque) and isinstance(saved, deque) and live.maxlen == saved.maxlen)
        )
        return is_alike and self._claim(live, saved)

    def on_filled(self, path: str, action: Callable[[], object]) -> None:
        """Have `action` called for the object at `path` when every tensor is filled."""
        self.targets.on_filled.append((path, action))

    def on_verified(self, path: str, action: Callable[[], Undo | None]) -> None:
        """Have `action` called when all new memory is filled. It may raise, and may return what reverts it."""
        self.targets.on_verified.append((path, action))

    def add_missing(self, path: str) -> None:
        """Add a name that the checkpoint lacks."""
        self.targets.missing.append(path)

    def add_unexpected(self, saved: Any, path: str) -> None:
        """Add the names in `saved`, for which the state has no place."""
        if isinstance(saved, dict) and saved:
            for key, value in saved.items():
                self.add_unexpected(value, join_shown(path, key))
        else:
            self.targets.unexpected.append(path)

    def build(self) -> LoadTargets:
        """What was collected, with targets that overlap in memory made safe.

        Targets that are the same memory, and for which the same chunks were saved, are filled in place. Others
        that overlap are filled once it is known that their memory can hold everything that was saved for them.
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
        tensor = self.entry(ref.name, path)
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
        """A function that returns a wrapper like `like`: its class is not in the checkpoint, and must be here."""
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

    def _paired(self, live: torch.Tensor, saved: Any, path: str) -> list[tuple[TensorShard, str]]:
        """The tensors with memory of their own that `live` consists of, each with its name in the checkpoint."""
        if not isinstance(saved, (TensorRef, WrapperRef)):
            raise mismatch(path, "tensor", saved)
        if isinstance(saved, WrapperRef):
            saved = self._without_late_parts(own_part(live), saved, path)
        reference, parts = expand(live, path)
        names = dict(pair(reference, saved, path))
        return [(part, names[part.name]) for part in parts]

    def _without_late_parts(self, wrapper: torch.Tensor, saved: WrapperRef, path: str) -> WrapperRef:
        """What was saved of a wrapper, without inner tensors for which the live one has None: it is given these.

        The precomputed scale of a float8 weight is one: it is None until the first step.
        """
        present = set(inner_names(wrapper)) if is_wrapper(wrapper) else set(saved)
        late = [name for name in saved if name not in present and getattr(wrapper, name, wrapper) is None]
        for name in late:
            make = self.new_value(saved[name], None, join(path, name))
            self.on_filled(path, partial(_set_part, wrapper, name, make))
        return saved.with_tensors({name: part for name, part in saved.items() if name not in late})

    def _is_array_refillable(self, array: npt.NDArray[Any], saved: TensorEntry) -> bool:
        """True if the array can be filled with what was saved, and its memory gets nothing else."""
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return (
            array.shape == saved.shape
            and array.dtype == numpy_dtype(saved.dtype)
            and array.dtype.isnative
            and array.flags.writeable
            and array.flags.c_contiguous
            and self._claim(owner, saved.name)
        )

    def _claim(self, live: object, saved: object) -> bool:
        """Claim an object of the state for `saved`; False if it is claimed for another value."""
        return bool(self._claims.setdefault(id(live), (live, saved))[1] == saved)

    def _fill_live(self, target: TensorShard, path: str, name: str) -> None:
        """Add a tensor of the state, at `path`, to fill from the checkpoint's tensor `name`."""
        data = target.data
        if overlaps_itself(data):
            raise StateError(
                f"state[{path!r}] is a tensor several of whose elements share their memory (expanded, or made "
                "by as_strided or unfold), so it cannot be loaded into. Pass a clone() of it."
            )
        self._live.append((path, self._fill(target, path, name, is_new=False)))
        self.targets.live_entries.add(path.partition("/")[0])

    def _fill(self, target: TensorShard, path: str, name: str, *, is_new: bool = True) -> TensorShard:
        """Add memory to fill from the checkpoint's tensor `name`."""
        _check_fit(self.entry(name, path), target, path)
        added = target
        if is_new or name != target.name:
            added = TensorShard(name, target.dtype, target.shape, target.pieces, target.data, is_new=is_new)
        self.targets.tensors.append(added)
        return added

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """(pack, offset) of each tensor's first chunk: the same for tied tensors."""
        chunks, names, arrays = self._manifest.chunks, [], []
        array = 0
        for tensor in self._manifest.tensors:
            if tensor.nbytes:
                names.append(tensor.name)
                arrays.append(array)
            array += len(tensor.arrays)
        rows = self._manifest.first_rows[np.array(arrays, dtype=np.int64)]
        places = zip(chunks.pack[rows].tolist(), chunks.offset[rows].tolist(), strict=True)
        return dict(zip(names, places, strict=True))

    def _place(self, name: str) -> Any:
        return self._places.get(name, name)

    def _fill_together(self, members: Sequence[tuple[str, TensorShard]]) -> None:
        """Load what was saved for overlapping targets into new memory, and copy it if they can hold all of it."""
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

        self.on_verified(members[0][0], check)
        self.targets.on_filled.insert(0, (members[0][0], copy))


def _check_fit(saved: TensorEntry, target: TensorShard, path: str) -> None:
    """Raise ShapeMismatchError unless shape and type agree."""
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
    """An error: the checkpoint has no `kind` at `path`, as the state has."""
    found = {TensorRef: "tensor", PerRankRef: "PerRank"}.get(type(saved), type(saved).__qualname__)
    return StateError(
        f"state[{path!r}] is {_with_article(kind)} here, but {_with_article(found)} in the checkpoint. Pass "
        "what was saved there, or leave it out of the state."
    )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIO' else 'a'} {noun}"


def _set_part(wrapper: torch.Tensor, name: str, make: Callable[[], torch.Tensor]) -> None:
    setattr(wrapper, name, make().to(wrapper.device))


def _refill(live: Any, value: Any) -> Any:
    """Replace the container's content by that of `value`; return the container."""
    live.clear()
    if isinstance(live, MutableMapping):
        for key, item in value.items():
            live[key] = item
    elif isinstance(live, set):
        live.update(value)
    else:
        live.extend(value)
    return live
