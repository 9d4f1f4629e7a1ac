"""Tensors without memory of their own: what they consist of comes back bit-equal, or they are refused by path."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing

import shardckpt
from shardckpt.errors import StateError, UnsupportedValueError
from shardckpt.ranks.world import Alone
from shardckpt.saving.session import SaveSession
from shardckpt.storage import Storage
from tests.kit.worlds import run_processes, start_save


@dataclass(frozen=True)
class Scheme:
    """What a quantized tensor is to be read with, as libraries of quantization have it."""

    block: int
    dtype: torch.dtype = torch.float32


class Blocks(torch.Tensor):
    """A quantized tensor: a code for each element, a scale for each block of a row, a table; a late maximum."""

    codes: torch.Tensor
    scale: torch.Tensor
    table: torch.Tensor
    maximum: torch.Tensor | None

    @staticmethod
    def __new__(cls, codes: torch.Tensor, *_: Any) -> Blocks:
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=torch.float32, device=codes.device
        )

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, scheme: Scheme
    ) -> None:
        self.codes, self.scale, self.table, self.scheme = codes, scale, table, scheme
        self.maximum = None

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        late = ["maximum"] if self.maximum is not None else []
        return ["codes", "scale", "table", *late], {"scheme": self.scheme, "device": self.device}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], context: Any, *_: Any) -> Blocks:
        return cls(inner["codes"], inner["scale"], inner["table"], context["scheme"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.view_as.default):
            made = cls(args[0].codes, args[0].scale, args[0].table, args[0].scheme)
            return return_and_correct_aliasing(function, args, kwargs or {}, made)
        raise NotImplementedError(function)


def blocks(seed: int, rows: int = 6, scheme: Scheme = Scheme(2)) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, 4), dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows * 4 // scheme.block, generator=generator).to(torch.bfloat16)
    return Blocks(codes, scale, torch.rand(16, generator=torch.Generator().manual_seed(7)), scheme)


def two(value: float, *shape: int) -> TwoTensor:
    return TwoTensor(torch.full(shape, value), torch.full(shape, value + 1))


def content(tensor: Any) -> list[Any]:
    """Every element of what this rank holds, through all wrappers, as nested lists."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if type(local) in (torch.Tensor, nn.Parameter):
        return [local.float().tolist()]
    return [item for name in local.__tensor_flatten__()[0] for item in content(getattr(local, name))]


def model(make: Callable[[], Any]) -> nn.Module:
    """A module with one such parameter, twice under two names, and a plain one."""
    module = nn.Linear(4, 6)
    module.weight = nn.Parameter(make(), requires_grad=False)
    module.register_parameter("tied", module.weight)
    return module


MAKERS: dict[str, Callable[[int], Any]] = {
    "two": lambda seed: two(float(seed), 6, 4),
    "blocks": blocks,
    "two of blocks": lambda seed: TwoTensor(blocks(seed), blocks(seed + 1)),
}


def first_inner(tensor: Any) -> torch.Tensor:
    while type(tensor) is not torch.Tensor:
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    return tensor


@pytest.mark.parametrize("name", MAKERS)
def test_inner_tensors_come_back(name: str, place: Storage) -> None:
    """In dicts, lists and modules: bit-equal, filled in place, tied where they are, and what is there then."""
    make = MAKERS[name]
    state: dict[str, Any] = {"d": {"a": make(1), "b": [make(2)]}, "m": model(lambda: make(3))}
    again: dict[str, Any] = {"d": {"a": make(5), "b": [make(6)]}, "m": model(lambda: make(7))}
    held = (again["d"]["a"], again["d"]["b"][0], again["m"].weight)
    session = SaveSession(Alone(), 60)
    for step in range(3):
        first_inner(state["d"]["a"]).add_(1)
        first_inner(state["m"].weight).add_(1)
        start_save(session, place.at(f"{step}"), state).wait()
        assert not shardckpt.load(place.at(f"{step}"), again).missing
        saved = (state["d"]["a"], state["d"]["b"][0], state["m"].weight)
        assert [*map(content, held)] == [*map(content, saved)]
        assert torch.equal(again["m"].bias, state["m"].bias)
    assert again["d"]["a"] is held[0]
    assert again["m"].tied is again["m"].weight is held[2]


def test_another_inner_tensor_is_noticed(place: Storage) -> None:
    """Between two saves a wrapper gets another inner tensor, or another meaning: the walk is not remembered."""
    session = SaveSession(Alone(), 60)
    module = model(lambda: blocks(1))
    start_save(session, place.at("0"), {"m": module}).wait()
    module.weight.scale = torch.full_like(module.weight.scale, 9)
    start_save(session, place.at("1"), {"m": module}).wait()
    assert set(shardckpt.open(place.at("1")).read("m/weight/scale").tolist()) == {9}
    module.weight.scheme = Scheme(2, torch.float16)
    start_save(session, place.at("2"), {"m": module}).wait()
    with pytest.raises(StateError, match=r"'m/weight'.*Blocks, and its meaning is .*float32.*float16"):
        shardckpt.load(place.at("2"), {"m": model(lambda: blocks(1))})


def test_an_inner_tensor_that_is_made_later(place: Storage) -> None:
    """One that the live wrapper has not made yet is given to it, as torchao's precomputed scales are."""
    saved, fresh = blocks(1), blocks(2)
    saved.maximum = torch.tensor(5.0)
    shardckpt.save(place, {"t": [saved]})
    shardckpt.load(place, {"t": [fresh]})
    assert fresh.maximum == 5
    assert content(fresh) == content(saved)


def test_what_a_wrapper_has_computed_is_forgotten(place: Storage) -> None:
    """An inner tensor that detach() drops is computed from the others: a module's is of no use after a load."""
    module, again = model(lambda: blocks(1)), model(lambda: blocks(2))
    again.weight.maximum = torch.tensor(7.0)
    shardckpt.save(place, {"m": module})
    shardckpt.load(place, {"m": again})
    assert again.weight.maximum is None
    assert content(again.weight) == content(module.weight)


@pytest.mark.parametrize(
    ("saved", "held", "message"),
    [
        (lambda: two(1.0, 6, 4), lambda: torch.ones(6, 4), "plain tensor here, but a .*TwoTensor in"),
        (lambda: torch.ones(6, 4), lambda: two(1.0, 6, 4), "is a tensor subclass .*TwoTensor here, but a plain"),
        (lambda: two(1.0, 6, 4), lambda: blocks(1), "Blocks, and its type is Blocks, but TwoTensor in the"),
        (lambda: two(1.0, 6, 4), lambda: two(1.0, 4, 6), r"shape is \[4, 6\], but \[6, 4\] in the checkpoint"),
        (lambda: blocks(1), lambda: blocks(1, scheme=Scheme(4)), "its meaning is .*4.* but .*2.* in the"),
        (lambda: two(1.0, 2), lambda: 5, "there is none here to load into"),
    ],
)  # fmt: skip
def test_what_differs(saved: Any, held: Any, message: str, place: Storage) -> None:
    """Another class, shape or scheme, and nothing is dequantised: an error, with nothing loaded."""
    shardckpt.save(place, {"a": torch.ones(2), "t": saved()})
    state = {"a": torch.zeros(2), "t": held()}
    with pytest.raises(StateError, match=rf"state\['t'\].*{message}"):
        shardckpt.load(place, state)
    assert not state["a"].any()


class Quantized(torch.optim.Optimizer):
    """An optimizer that keeps a quantized average, as 8-bit optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # noqa: ARG002, torch's
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["average"] = blocks(number, parameter.shape[0])
                state["step"] += 1
                state["average"].codes.add_(1)


def test_an_optimizer_with_quantized_state(place: Storage) -> None:
    """Its state loads bit-equal into an optimizer that has stepped; else an error says what to do."""

    def make() -> tuple[nn.Module, Quantized]:
        module = nn.Linear(4, 6, bias=False)
        return module, Quantized(module.parameters())

    module, optimizer = make()
    optimizer.step()
    optimizer.step()
    shardckpt.save(place, {"m": module, "o": optimizer})
    other, fresh = make()
    with pytest.raises(StateError, match=r"'o/state/weight/average'.* was saved as .*Blocks.*by a step"):
        shardckpt.load(place, {"m": other, "o": fresh})
    assert not fresh.state
    fresh.step()
    shardckpt.load(place, {"m": other, "o": fresh})
    state, wanted = fresh.state[other.weight], optimizer.state[module.weight]
    assert isinstance(state["average"], Blocks)
    assert state["step"] == 2
    assert content(state["average"]) == content(wanted["average"])
    assert torch.equal(other.weight, module.weight)


def test_export_has_the_inner_tensors(place: Storage, tmp_path: Path) -> None:
    """Checkpoints with wrappers are open to everyone: by name, and as a dict in a .pt file."""
    wrapped = blocks(3)
    shardckpt.save(place, {"t": wrapped})
    checkpoint = shardckpt.open(place)
    assert set(checkpoint.tensors) == {"t/codes", "t/scale", "t/table"}
    assert np.array_equal(checkpoint.read("t/codes"), wrapped.codes.numpy())
    shardckpt.merge(place, tmp_path / "t.pt")
    loaded = torch.load(tmp_path / "t.pt", weights_only=True)
    assert torch.equal(loaded["t"]["scale"], wrapped.scale)


# -- what is refused


def _freed() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def _shortened() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(8)
    return tensor


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(4)


class Opaque(torch.Tensor):
    """A wrapper that does not say what it consists of."""

    @staticmethod
    def __new__(cls) -> Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, (4,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(function)


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def _csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(4).to_sparse_csr()


def _masked() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return masked_tensor(torch.ones(4), torch.ones(4, dtype=torch.bool))


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "freed": (_freed, "torch.Tensor without memory of its own"),
    "shortened": (_shortened, "torch.Tensor without memory of its own"),
    "fake": (_fake, "FakeTensor without memory of its own"),
    "opaque": (Opaque, "Opaque without memory of its own"),
    "masked": (_masked, "MaskedTensor without memory of its own"),
    "meta": (lambda: torch.ones(4, device="meta"), "meta tensor.*to_empty"),
    "lazy": (nn.UninitializedParameter, "uninitialized.*Run the model once"),
    "strided nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
    "jagged nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested tensor"
    ),
    "sparse": (lambda: torch.eye(4).to_sparse(), "torch.sparse_coo.*to_dense"),
    "csr": (_csr, "torch.sparse_csr"),
    "quantized": (_quantized, "quantized tensor.*int_repr"),
    "mkldnn": (lambda: torch.ones(4).to_mkldnn(), "torch._mkldnn.*to_dense"),
    "complex32": (lambda: torch.ones(4, dtype=torch.complex32), "complex32, which the format does not have"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_path(name: str, place: Storage) -> None:
    """Alone and in modules and optimizers; at a save, and at a load, which changes nothing."""
    make, message = REFUSED[name]
    buffered = nn.Linear(2, 2)
    buffered.register_buffer("bad", make())
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter]["bad"] = make()
    for state, path in (
        ({"t": {"x": make()}}, "t/x"),
        ({"t": [buffered]}, "t/0/bad"),
        ({"t": optimizer}, "t/state/0/bad"),
        ({"t": shardckpt.PerRank(make())}, "t/rank-00000"),
    ):
        with pytest.raises(UnsupportedValueError, match=rf"state\['{path}'\] is a.*{message}"):
            shardckpt.save(place, state)
    assert place.list() == []
    plain = nn.Linear(2, 2)
    plain.register_buffer("bad", torch.ones(4))
    shardckpt.save(place, {"a": torch.ones(2), "t": {"x": torch.ones(4), "m": plain}})
    with torch.no_grad():
        buffered.weight.zero_()
    for held, path in (
        ({"x": make(), "m": plain}, "t/x"),
        ({"x": torch.ones(4), "m": buffered}, "t/m/bad"),
    ):
        given = {"a": torch.zeros(2), "t": held}
        with pytest.raises(StateError, match=rf"state\['{path}'\] is a.*{message}"):
            shardckpt.load(place, given)
        assert not given["a"].any()
    assert not buffered.weight.any()


ARRAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "big-endian": (lambda: np.arange(3, dtype=">f4"), "foreign byte order.*newbyteorder"),
    "objects": (lambda: np.array([None, 1]), "NumPy array of object"),
    "texts": (lambda: np.array(["a"]), "NumPy array of <U1"),
    "dates": (lambda: np.array(["2020-01-01"], dtype="datetime64[D]"), r"NumPy array of datetime64\[D\]"),
    "records": (lambda: np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]), "NumPy array of "),
    "long double": (lambda: np.zeros(2, dtype=np.longdouble), "NumPy array of float128"),
    "masked": (lambda: np.ma.masked_array([1.0, 2.0], [True, False]), "MaskedArray.*a.mask"),
    "matrix": (lambda: np.eye(2).view(np.matrix), "matrix, of which only"),
    "a date": (lambda: np.datetime64("2020-01-01T00:00:00.123456789"), "numpy.datetime64"),
    "a span": (lambda: np.timedelta64(5, "ns"), "numpy.timedelta64"),
    "a long double": (lambda: np.longdouble(1), "numpy.longdouble"),
    "a record": (lambda: np.zeros(1, dtype=[("a", "i4")])[0], "numpy.void"),
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_refused_by_path(name: str, place: Storage) -> None:
    """NumPy arrays and scalars that torch has no type for, or that are more than their elements."""
    make, message = ARRAYS[name]
    with pytest.raises(UnsupportedValueError, match=rf"state\['t/x'\] is a.*{message}"):
        shardckpt.save(place, {"t": {"x": make()}})


def test_a_wrapper_of_what_is_refused(place: Storage) -> None:
    """The path says which of its inner tensors it is."""
    with pytest.raises(UnsupportedValueError, match=r"state\['t/b'\].*FakeTensor without memory"):
        shardckpt.save(place, {"t": TwoTensor(torch.ones(4), _fake())})


def test_subclasses_with_memory_are_plain(place: Storage) -> None:
    """A subclass that only adds methods has memory, and is stored as any tensor."""

    class Named(torch.Tensor):
        pass

    state = {"t": {"x": torch.arange(4.0).as_subclass(Named)}}
    again = {"t": {"x": torch.zeros(4).as_subclass(Named)}}
    shardckpt.save(place, state)
    shardckpt.load(place, again)
    assert again["t"]["x"].tolist() == [0, 1, 2, 3]


# -- in DTensors, among real ranks


def _sharded(seed: int, mesh: Any, placements: Any) -> DTensor:
    """A DTensor of 8 x 4 codes, each of whose local parts is a wrapper."""
    whole = blocks(seed, 8)
    codes = distribute_tensor(whole.codes, mesh, placements).to_local()
    first = mesh.get_coordinate()[-1] * codes.shape[0] if isinstance(placements[-1], Shard) else 0
    scale = whole.scale.view(8, 2)[first : first + codes.shape[0]].flatten().clone()
    local = Blocks(codes.clone(), scale, whole.table, whole.scheme)
    local.maximum = torch.tensor(float(seed))
    meta = TensorMeta(torch.Size((8, 4)), (4, 1), torch.float32)
    return DTensor(local, DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def _save_and_load(rank: int, folder: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    flat = init_device_mesh("cpu", (4,))
    found: list[Any] = []
    for number, (where, placements) in enumerate(
        [(flat, (Shard(0),)), (mesh, (Replicate(), Shard(0))), (mesh, (Replicate(), Replicate()))]
    ):
        state = {"t": _sharded(3, where, placements), "pair": _pair(where, placements, 1.0)}
        again = {"t": _sharded(5, where, placements), "pair": _pair(where, placements, 9.0)}
        shardckpt.save(f"{folder}/{number}", state)
        shardckpt.load(f"{folder}/{number}", again)
        found.append(all(content(again[n]) == content(state[n]) for n in state))
    other = {"pair": _pair(mesh, (Shard(0), Replicate()), 9.0)}
    shardckpt.load(f"{folder}/0", other)  # elementwise, so that any sharding can have it
    found.append(
        content(other["pair"])[0] == torch.arange(1.0, 33.0).view(8, 4).chunk(2)[rank // 2].tolist()
    )
    try:
        shardckpt.load(f"{folder}/0", {"t": _sharded(5, mesh, (Replicate(), Shard(0)))})
    except StateError as error:
        found.append(str(error))
    return found


def _pair(mesh: Any, placements: Any, start: float) -> DTensor:
    local = distribute_tensor(torch.arange(start, start + 32).view(8, 4), mesh, placements).to_local()
    meta = TensorMeta(torch.Size((8, 4)), (4, 1), torch.float32)
    spec = DTensorSpec(mesh, placements, tensor_meta=meta)
    return DTensor(TwoTensor(local.clone(), local + 100), spec, requires_grad=False)


def test_dtensors_of_wrappers(tmp_path: Path) -> None:
    """Elementwise inner tensors load into any sharding; the others into the one that they were saved in."""
    for found in run_processes(4, _save_and_load, str(tmp_path)):
        assert found[:4] == [True] * 4
        assert "state['t']" in found[4]
        assert "its sharding (dimension, parts, factor) is ((0, 2, 1),), but ((0, 4, 1),)" in found[4]
    assert set(shardckpt.open(tmp_path / "1").tensors) == {
        "pair/a", "pair/b", "t/codes", "t/maximum",
        *(f"t/{name}/{number}" for name in ("scale", "table") for number in range(2)),
    }  # fmt: skip
