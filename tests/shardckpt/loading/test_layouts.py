"""What is saved in one layout reads bit-equal in every other: in this process, and among real ones.

The first half shards tensors itself, as each layout does, and needs no processes. The second half trains
real models in worlds of gloo processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt.format.box import Runs, pieces_of_runs, split_evenly
from shardckpt.format.dtypes import DTYPES, numpy_dtype
from shardckpt.saving.session import SaveSession
from shardckpt.state.tensors import TensorShard, torch_dtype
from shardckpt.storage import open_storage
from tests.kit.parallel import Training
from tests.kit.worlds import ThreadRanks, load_local, run_processes, run_threads, save_local, start_save
from tests.shardckpt.format.test_zarr_refs import plain, random_content, read

Content = np.ndarray[Any, Any]
World = list[list[Runs]]
"""For each rank, for each dimension, the ranges that it holds."""


# -- layouts, each a function from a shape to what every rank holds


def whole(shape: Sequence[int]) -> list[Runs]:
    return [((0, n),) if n else () for n in shape]


def split(shape: Sequence[int], *steps: tuple[int, int, int]) -> list[Runs]:
    """A shape after splits (dimension, parts, index), one after another; scalars are not split."""
    runs = whole(shape)
    for dim, parts, index in steps:
        if shape:
            runs[dim] = split_evenly(runs[dim], parts, index)
    return runs


def fsdp(shape: Sequence[int], parts: int, dim: int = 0) -> World:
    return [split(shape, (dim, parts, i)) for i in range(parts)]


def ddp(shape: Sequence[int], ranks: int) -> World:
    return [whole(shape)] * ranks


def hsdp(shape: Sequence[int], replicas: int, parts: int) -> World:
    return fsdp(shape, parts) * replicas


def fsdp_tp(shape: Sequence[int], parts: int, tp: int, dim: int = -1) -> World:
    """Split along `dim` for tensor parallelism, and what comes of it along the first for FSDP."""
    return [split(shape, (dim, tp, j), (0, parts, i)) for i in range(parts) for j in range(tp)]


def mixed(shape: Sequence[int]) -> World:
    """Three ranks of which the last has nothing, and the first two a part each that fits no grid."""
    if not shape or shape[0] < 2:
        return [whole(shape), split(shape, (0, 1, 1)), split(shape, (0, 1, 1))] if shape else ddp(shape, 3)
    runs = whole(shape)[1:]
    n = shape[0]
    return [
        [((0, 1), (n - 1, n)) if n > 2 else ((0, n),), *runs],
        [((1, n - 1),) if n > 2 else (), *runs],
        [(), *runs],
    ]


LAYOUTS: dict[str, Callable[[Sequence[int]], World]] = {
    "fsdp 1": lambda shape: fsdp(shape, 1),
    "fsdp 2": lambda shape: fsdp(shape, 2),
    "fsdp 3": lambda shape: fsdp(shape, 3),
    "fsdp 8": lambda shape: fsdp(shape, 8),
    "fsdp 3 of the last dimension": lambda shape: fsdp(shape, 3, -1),
    "ddp 3": lambda shape: ddp(shape, 3),
    "hsdp 2x2": lambda shape: hsdp(shape, 2, 2),
    "fsdp x tp 2x2, row-wise": lambda shape: fsdp_tp(shape, 2, 2),
    "fsdp x tp 2x2, strided": lambda shape: fsdp_tp(shape, 2, 2, 0),
    "fsdp x tp 3x2, strided": lambda shape: fsdp_tp(shape, 3, 2, 0),
    "mixed": mixed,
}


# -- tensors as a rank holds them


def as_torch(content: Content, dtype: str) -> torch.Tensor:
    """A tensor with these bytes, whatever NumPy or torch can do with the type."""
    data = torch.from_numpy(np.frombuffer(bytearray(content.tobytes() or b"\0" * 16), np.uint8))
    return data[: content.nbytes].view(torch_dtype(dtype)).view(content.shape)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def shard(
    name: str, content: Content, dtype: str, runs: Sequence[Runs], *, turned: bool = False
) -> TensorShard:
    """What a rank holds of `content`; `turned` has its memory in another order than the elements'."""
    held = content.view(f"V{content.itemsize}")
    for dim, ranges in enumerate(runs):
        if ranges == ((0, content.shape[dim]),):
            continue
        index = [i for start, stop in ranges for i in range(start, stop)]
        held = held.take(np.array(index, dtype=np.intp), axis=dim)
    data = as_torch(held, dtype)
    if turned and data.dim() > 1:
        data = as_torch(held.swapaxes(0, -1), dtype).transpose(0, -1)
    return TensorShard(name, dtype, content.shape, pieces_of_runs(runs), data)


def empty(tensor: TensorShard, *, is_new: bool) -> TensorShard:
    """The same place, with other content in it; `is_new` memory may be read into before all is verified."""
    data = tensor.data.clone(memory_format=torch.preserve_format)
    if data.numel():
        data.untyped_storage().fill_(1)
    return replace(tensor, data=data, is_new=is_new)


State = dict[str, tuple[Content, str]]


def world_of(layout: str, state: State, *, turned: bool = False) -> list[list[TensorShard]]:
    """The state as each rank of a layout holds it."""
    names = {name: LAYOUTS[layout](content.shape) for name, (content, _) in state.items()}
    ranks = max((len(world) for world in names.values()), default=1)
    return [
        [shard(name, *state[name], names[name][rank], turned=turned) for name in state]
        for rank in range(ranks)
    ]


def assert_loads(
    root: shardckpt.storage.Storage, layout: str, state: State, *, turned: bool = False
) -> None:
    wanted = world_of(layout, state, turned=turned)
    world = [
        [empty(tensor, is_new=(rank + number) % 2 == 0) for number, tensor in enumerate(tensors)]
        for rank, tensors in enumerate(wanted)
    ]
    load_local(root, world)
    for rank, tensors in enumerate(world):
        for tensor, expected in zip(tensors, wanted[rank], strict=True):
            assert as_bytes(tensor.data) == as_bytes(expected.data), (layout, rank, tensor.name)


SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (5,), (7, 3), (8, 4), (2, 3, 5), (13, 2), (0,), (3, 0, 2))


def every_type() -> State:
    """Every type, every shape: with every kind of bits, NaNs with payloads, -0.0 and subnormals."""
    some = [(dtype, SHAPES[(i + j) % len(SHAPES)]) for i, dtype in enumerate(DTYPES) for j in (0, 4)]
    state = {}
    for number, (dtype, shape) in enumerate([*some, *itertools.product(["bfloat16"], SHAPES)]):
        name = f"{dtype}/{'x'.join(map(str, shape)) or 'scalar'}"
        state[name] = random_content(dtype, shape, number), dtype
    return state


@pytest.mark.parametrize("saved", LAYOUTS)
def test_any_layout_loads_under_any_other(saved: str, tmp_path: Path) -> None:
    """Every type and shape, saved in one layout: bit-equal in every layout, by read, and by plain Zarr."""
    state = every_type()
    root = open_storage(tmp_path)
    save_local(root, world_of(saved, state))
    for layout in LAYOUTS:
        assert_loads(root, layout, state)
    checkpoint, group = shardckpt.open(tmp_path), plain(tmp_path)
    assert list(checkpoint.tensors) == list(state)
    checkpoint.verify()
    for name, (content, dtype) in state.items():
        for found in (checkpoint.read(name), read(group, name)):
            assert found.dtype == numpy_dtype(dtype)
            assert found.shape == content.shape
            assert found.tobytes() == content.tobytes(), name


@st.composite
def _states(draw: st.DrawFn) -> State:
    state = {}
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 20), max_size=3)))
        state[f"t{number}"] = random_content(dtype, shape, draw(st.integers(0, 99))), dtype
    return state


_memory = (f"memory://layouts-{number}" for number in itertools.count())


@settings(deadline=None, max_examples=80)
@given(
    state=_states(),
    saved=st.sampled_from(sorted(LAYOUTS)),
    loaded=st.sampled_from(sorted(LAYOUTS)),
    turned=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_any_state_in_any_layout(
    state: State, saved: str, loaded: str, turned: tuple[bool, bool], data: st.DataObject
) -> None:
    """Random shapes, memory in any order: bit-equal under another layout, and for any slices of it."""
    root = open_storage(next(_memory))
    try:
        save_local(root, world_of(saved, state, turned=turned[0]))
        assert_loads(root, loaded, state, turned=turned[1])
        checkpoint = shardckpt.open(root)
        for name, (content, _) in state.items():
            index = data.draw(_indices(content.shape))
            assert checkpoint.read(name, index).tobytes() == np.asarray(content[index]).tobytes()
    finally:
        root.delete_tree("")


@st.composite
def _indices(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Integers, slices with any steps, and an ellipsis, for as many dimensions as it likes."""
    index: list[Any] = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        end = st.none() | st.integers(-n - 2, n + 2)
        step = st.none() | st.integers(-3, 3).filter(bool)
        ranges = st.builds(slice, end, end, step)
        index.append(draw(ranges | st.integers(-n, n - 1) if n else ranges))
    if draw(st.booleans()):
        index.append(...)
    return tuple(index)


def test_chunks_larger_than_a_piece(tmp_path: Path) -> None:
    """Tensors of many chunks of several megabytes: bit-equal between layouts that cut them elsewhere."""
    shape = (33, 1 << 18)
    state: State = {"t": (random_content("float32", shape), "float32")}
    root = open_storage(tmp_path)
    plan, manifest = save_local(root, world_of("fsdp 1", state))
    assert len(plan.writer) > 1
    assert any(offset % 4096 == 0 for offset in manifest.chunks.offset)
    for layout in ("fsdp 2", "fsdp 3 of the last dimension"):
        assert_loads(root, layout, state)


def test_replicas_write_together(tmp_path: Path) -> None:
    """A large tensor that three ranks hold: each writes chunks of it, and together they are the tensor."""
    state: State = {"t": (random_content("uint8", (40, 1 << 20)), "uint8")}
    plan, _ = save_local(open_storage(tmp_path), world_of("ddp 3", state))
    assert set(plan.writer) == {0, 1, 2}
    assert shardckpt.open(tmp_path).read("t").tobytes() == state["t"][0].tobytes()


def test_strides_that_mean_nothing(tmp_path: Path) -> None:
    """A single element may have any stride, also as a replica: it is stored and loaded like any other."""

    def make(value: float) -> torch.Tensor:
        return torch.full((2, 3), value, dtype=torch.bfloat16).t()[:1, :1]

    def run(ranks: ThreadRanks) -> None:
        start_save(SaveSession(ranks, 60), root, {"t": make(2)}).wait()

    assert make(1).is_contiguous()
    assert make(1).stride() == (1, 3)
    root = open_storage(tmp_path)
    run_threads(2, run)
    held = {"t": make(0)}
    shardckpt.load(tmp_path, held)
    assert held["t"].item() == 2


def test_conjugate_and_negative_views(tmp_path: Path) -> None:
    """A tensor that torch only marks as conjugated or negated is stored, and loaded into, as what it shows."""
    values = torch.randn(5, 3, dtype=torch.complex64)
    state = {"conj": values.conj(), "neg": values.conj().imag}
    shardckpt.save(tmp_path, state)
    base = torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(5, 3, dtype=torch.complex64)
    other = {"conj": base[0].conj(), "neg": base[1].conj().imag}
    shardckpt.load(tmp_path, other)
    assert torch.equal(other["conj"], values.conj())
    assert torch.equal(other["neg"], values.conj().imag)
    assert torch.equal(base[0], values)


def test_nan_payloads_and_signed_zeros(tmp_path: Path) -> None:
    """Bits that compare as equal or as nothing come back as they were, through save and load."""
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 0x00000001], dtype=torch.int64).to(
        torch.int32
    )
    state = {"t": bits.view(torch.float32), "v": -0.0, "n": math.nan}
    shardckpt.save(tmp_path, state)
    loaded: dict[str, Any] = {"t": torch.ones(4), "v": 1.0, "n": 1.0}
    shardckpt.load(tmp_path, loaded)
    assert torch.equal(loaded["t"].view(torch.int32), bits)
    assert math.copysign(1.0, loaded["v"]) == -1.0
    assert math.isnan(loaded["n"])


# -- real models in worlds of processes

FACTOR = 1.5


def _save_all(layouts: Sequence[str], folder: Path) -> None:
    for layout in layouts:
        training = Training.make(layout, factor=FACTOR)
        training.train(3)
        # Back to what is known without a world, in the layout that training has left
        training.reset()
        training.note["name"] = layout
        own = torch.full((2,), dist.get_rank() if dist.is_initialized() else 0)
        shardckpt.save(folder / f"{layout} {_world()}", training.state(own), step=3)


def _load_all(layouts: Sequence[str], folder: Path) -> list[str]:
    """Load every second pair of a checkpoint in the folder and a layout; what is wrong."""
    wrong = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    pairs = itertools.product(enumerate(layouts), enumerate(sorted(folder.iterdir())))
    cases = ((layout, path) for (i, layout), (j, path) in pairs if (i + j) % 2 == 0)
    for (layout, path), stepped in zip(cases, itertools.cycle([False, True, True])):
        training = Training.make(layout)
        if stepped:
            training.train(1)
        state = training.state(torch.full((2,), -1))
        done = shardckpt.load(path, state)
        case = f"{path.name} -> {layout} {_world()}{' after a step' if stepped else ''}"
        wrong += [f"{case}: {name}" for name in training.mismatches(FACTOR)]
        if done.step != 3 or state["note"] != {"name": path.name.split()[0], "rates": [0.5, math.inf]}:
            wrong.append(f"{case}: values {done} {state['note']}")
        if training.scheduler.last_epoch != 3 or training.optimizer.param_groups[0]["lr"] != 0.05:
            wrong.append(f"{case}: scheduler {training.scheduler.state_dict()}")
        kept = rank >= int(path.name.split()[1])
        own = state["own"].value.tolist()
        if own != [-1 if kept else rank] * 2 or done.kept != (("own",) if kept else ()):
            wrong.append(f"{case}: PerRank {own} {done.kept}")
    return wrong


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _save_then_load(_rank: int, saved: Sequence[str], loaded: Sequence[str], folder: Path) -> list[str]:
    _save_all(saved, folder)
    return _load_all(loaded, folder)


@pytest.mark.timeout(300)
def test_real_models_in_real_worlds(tmp_path: Path) -> None:
    """FSDP2, TP, both, HSDP, DDP and none, on 1, 2, 3, 4 and 6 ranks: model, optimizer, scheduler and
    values are the same after every change between them, also where the optimizer has already stepped."""
    wrong = []
    _save_all(["plain"], tmp_path)
    for size, saved, loaded in (
        (6, ["fsdp_tp"], []),
        (3, ["fsdp", "ddp"], ["fsdp"]),
        (4, ["fsdp", "ddp", "hsdp", "tp", "fsdp_tp"], ["fsdp", "ddp", "hsdp", "tp", "fsdp_tp"]),
        (2, [], ["fsdp", "tp"]),
        (6, [], ["fsdp_tp"]),
    ):
        for report in run_processes(size, _save_then_load, saved, loaded, tmp_path):
            wrong += report
    wrong += _load_all(["plain"], tmp_path)
    assert not wrong
    assert len(list(tmp_path.iterdir())) == 9
    known = Training.make("plain", factor=FACTOR)
    for path in tmp_path.iterdir():
        checkpoint, group = shardckpt.open(path), plain(path)
        for name, parameter in known.parameters.items():
            values = {f"model/{name}": parameter, f"optimizer/state/{name}/exp_avg": parameter * 3}
            for full, value in values.items():
                expected = value.detach().numpy()
                assert np.array_equal(checkpoint.read(full), expected), (path, full)
                assert np.array_equal(read(group, full), expected), (path, full)
