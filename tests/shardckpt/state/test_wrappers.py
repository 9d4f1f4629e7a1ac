"""Names do not depend on what wraps a model, nor on the order in which it was wrapped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardckpt
from shardckpt.errors import MissingKeysError, UnsupportedValueError
from shardckpt.state.flatten import flatten
from tests.kit.worlds import run_processes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
"""What torch.compile imports of torch itself warns."""

Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module", autouse=True)
def world_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, which DDP and fully_shard need."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _sharded(module: nn.Module) -> nn.Module:
    fully_shard(module)
    return module


WRAPS: dict[str, Wrap] = {
    "compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "DDP": DistributedDataParallel,
    "shard": _sharded,
}
ORDERS = [
    order
    for count in range(len(WRAPS) + 1)
    for order in itertools.permutations(WRAPS, count)
    if not {"DDP", "shard"} <= set(order)  # DDP refuses DTensors, and sharding what DDP reduces is an error
]


class Net(nn.Module):
    """A buffer, a parameter of its own, and three levels of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * self.scale


def _wrapped(order: tuple[str, ...], module: nn.Module) -> nn.Module:
    for name in order:
        module = WRAPS[name](module)
    return module


def _build(inside: tuple[str, ...], outside: tuple[str, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that has one layer wrapped in one order, and the whole in another; its optimizer has stepped."""
    torch.manual_seed(0)
    net = Net()
    net.block[0] = _wrapped(inside, net.block[0])
    model = _wrapped(outside, net)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def _names(state: dict[str, Any]) -> set[str]:
    return {tensor.name for tensor in flatten(state, 0).tensors}


@pytest.mark.parametrize("outside", ORDERS, ids="-".join)
def test_every_order_gives_the_names_of_dcp(outside: tuple[str, ...]) -> None:
    """Of compile, activation checkpointing, DDP and fully_shard, around the whole model and around a layer."""
    for inside in ORDERS:
        if "DDP" in inside or ("DDP" in outside and "shard" in inside):
            continue
        model, optimizer = _build(inside, outside)
        theirs = {f"model/{name}" for name in get_model_state_dict(model)}
        theirs |= {
            f"optimizer/state/{name}/{key}"
            for name, state in get_optimizer_state_dict(model, optimizer)["state"].items()
            for key in state
        }
        # DCP does not see DDP or a compiled module in a checkpoint wrapper, whose names are then left in
        theirs = {name.replace("_orig_mod.", "").replace("module.", "") for name in theirs}
        assert _names({"model": model, "optimizer": optimizer}) == theirs, (inside, outside)
        assert _names({"optimizer": optimizer, "model": model}) == theirs, (inside, outside)
        plain = Net()
        assert _names({"model": model}) == _names({"model": plain}), (inside, outside)


def test_a_wrapped_layer_inside_ddp_of_a_layer() -> None:
    """DDP around a layer, with wrappers inside and outside of it, as for modules that are trained apart."""
    for before, after in itertools.product(("compile", "checkpoint"), repeat=2):
        model, optimizer = _build((before, "DDP", after), ())
        assert _names({"model": model}) == _names({"model": Net()})
        assert "optimizer/state/block.0.weight/exp_avg" in _names({"model": model, "optimizer": optimizer})


def test_a_checkpoint_of_one_order_loads_into_another(tmp_path: Path) -> None:
    """Saved from a model that was compiled and then sharded, loaded into a plain one, and the reverse."""
    model, optimizer = _build(("compile", "shard"), ("checkpoint", "compile", "shard"))
    shardckpt.save(tmp_path / "a", {"model": model, "optimizer": optimizer})
    plain, other = _build((), ())
    with torch.no_grad():
        plain.scale.zero_()
    shardckpt.load(tmp_path / "a", {"model": plain, "optimizer": other})
    assert torch.equal(plain.scale, get_model_state_dict(model)["scale"].full_tensor())
    shardckpt.save(tmp_path / "b", {"model": plain, "optimizer": other})
    shardckpt.load(tmp_path / "b", {"model": model, "optimizer": optimizer})


def _evaluated(rank: int, folder: str) -> list[set[str]]:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        fully_shard(model[0])
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def evaluate() -> None:
        with torch.no_grad():
            model(torch.ones(2, 6))

    def saved() -> dict[str, Any]:
        return {n: optimizer.state[p]["exp_avg"].full_tensor() for n, p in model.named_parameters()}

    model, optimizer = build()
    names = []
    with shardckpt.Checkpointer(folder) as checkpointer:
        for step in range(1, 4):  # the third is taken from what the second remembers
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            evaluate()
            checkpointer.save(step, {"optimizer": optimizer, "model": model}).wait()
            newest = shardckpt.open(folder).tensors
            names.append({name.split("/")[2] for name in newest if name.startswith("optimizer/state")})
    wanted = saved()
    model, optimizer = build()
    evaluate()
    shardckpt.load(folder, {"optimizer": optimizer, "model": model})
    assert all(torch.equal(value, wanted[name]) for name, value in saved().items())
    return names


def test_after_an_evaluation(tmp_path: Path) -> None:
    """A forward pass alone leaves fully_shard's root unsharded; names and values are those of the shards."""
    for names in run_processes(2, _evaluated, str(tmp_path)):
        assert names == [{"0.weight", "0.bias", "2.weight", "2.bias"}] * 3


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_an_average_loads_into_a_plain_model(average: Any, tmp_path: Path) -> None:
    """AveragedModel's names are its module's, and n_averaged, which a plain model passes over."""
    mean = AveragedModel(Net(), multi_avg_fn=average)
    mean.update_parameters(Net())
    with torch.no_grad():
        mean.module.scale.fill_(5)
    shardckpt.save(tmp_path / "mean", {"model": mean, "both": {"mean": mean}})
    assert _names({"model": mean}) == _names({"model": Net()}) | {"model/n_averaged"}
    plain = nn.ModuleDict({"mean": Net()})["mean"]
    shardckpt.load(tmp_path / "mean", {"model": plain})
    assert plain.scale.tolist() == [5, 5, 5]
    fresh = AveragedModel(Net(), multi_avg_fn=average)
    shardckpt.load(tmp_path / "mean", {"model": fresh})
    assert fresh.n_averaged == 1
    assert fresh.module.scale.tolist() == [5, 5, 5]
    shardckpt.save(tmp_path / "plain", {"model": plain})
    with pytest.raises(MissingKeysError, match="model/n_averaged"):  # 0 would drop what was loaded
        shardckpt.load(tmp_path / "plain", {"model": fresh})


def test_names_that_collide_without_their_wrapper() -> None:
    """A wrapper with a parameter of its own that is called as one of the module in it."""
    mean = AveragedModel(Net())
    mean.module.register_buffer("n_averaged", torch.zeros(()))
    with pytest.raises(UnsupportedValueError, match=r"state\['model'\].*'n_averaged'.*'module.n_averaged'"):
        flatten({"model": mean}, 0)


class Interleaved(Shard):
    """A placement of another library, which may mean another part than its base."""


def _dtensor(placements: Any, local: torch.Tensor, **options: Any) -> DTensor:
    mesh = init_device_mesh("cpu", (1,) * len(placements))
    meta = TensorMeta(torch.Size((4, 2)), (2, 1), torch.float32)
    return DTensor(local, DTensorSpec(mesh, placements, tensor_meta=meta, **options), requires_grad=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _dtensor((Partial(),), torch.ones(4, 2)), r"placement Partial\(sum\).*redistribute"),
        (
            lambda: _dtensor((Interleaved(0),), torch.ones(4, 2)),
            "not a part of the tensor that is known here",
        ),
        (
            lambda: _dtensor((Shard(0),), torch.ones(2, 4)),
            r"part of shape \[4, 2\].*has the shape \[2, 4\]",
        ),
        (
            lambda: _dtensor((Shard(0),), torch.ones(3, 2)),
            r"part of shape \[4, 2\].*has the shape \[3, 2\]",
        ),
        (
            lambda: _dtensor(
                (Shard(0), Shard(0)),
                torch.ones(4, 2),
                shard_order=(ShardOrderEntry(0, (1, 0)),),
                use_strided_shard_as_shard_order=False,
            ),
            r"explicit order .*\(1, 0\).*redistribute",
        ),
    ],
)
def test_placements_that_say_too_little(make: Callable[[], DTensor], message: str) -> None:
    """A DTensor whose part here is not known for sure is refused by path, and never stored in a wrong place."""
    with pytest.raises(UnsupportedValueError, match=rf"state\['t/x'\] is a DTensor.*{message}"):
        flatten({"t": {"x": make()}}, 0)


def test_the_default_order_given_in_full() -> None:
    """The order that placements have anyway is accepted, explicit or not."""
    order = {"shard_order": (ShardOrderEntry(0, (0, 1)),), "use_strided_shard_as_shard_order": False}
    (tensor,) = flatten({"x": _dtensor((Shard(0), Shard(0)), torch.ones(4, 2), **order)}, 0).tensors
    assert tensor.pieces[0].box.shape == (4, 2)
