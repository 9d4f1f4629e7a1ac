"""A model under every kind of parallelism, its optimizer, and the tensors that both must have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardckpt

__all__ = ["Net", "Training"]


class Net(nn.Module):
    """Small, with dimensions that no world divides, and some that are smaller than the world."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(5, hidden)
        self.norm = nn.LayerNorm(3)
        self.down = nn.Linear(hidden, 3)
        self.gate = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x)))) * self.gate


def _fill(model: nn.Module, factor: float) -> None:
    """Values that depend on nothing but the model's structure and `factor`."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * factor)


@dataclass
class Training:
    """What a training script has: a model in some layout, an optimizer and a scheduler."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    note: dict[str, Any]
    first: dict[str, torch.Tensor]

    @classmethod
    def make(cls, layout: str, *, factor: float = 0.0, hidden: int = 13) -> Training:
        """The model laid out as `layout` says; its parameters are `factor` times fixed random numbers.

        Layouts: plain, ddp, fsdp, tp, hsdp (2 replicas), fsdp_tp (tensor parallelism over 2 ranks).
        """
        model: nn.Module = Net(hidden)
        _fill(model, factor)
        size = dist.get_world_size() if dist.is_initialized() else 1
        if layout == "ddp":
            model = DistributedDataParallel(model)
        elif layout == "fsdp":
            fully_shard(model, mesh=_mesh(size))
        elif layout == "hsdp":
            fully_shard(model, mesh=_mesh(2, size // 2))
        elif layout == "tp":
            _split_linears(model, _mesh(size))
        elif layout == "fsdp_tp":
            mesh = _mesh(size // 2, 2)
            _split_linears(model, mesh["inner"])
            fully_shard(model, mesh=mesh["outer"])
        else:
            assert layout == "plain"
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        training = cls(model, optimizer, scheduler, {"name": "", "rates": [0.5, float("inf")]}, {})
        training.first = {name: p.detach().clone() for name, p in training.parameters.items()}
        return training

    def train(self, steps: int) -> None:
        """Real steps, the same on all ranks."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 5, generator=generator)).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()

    def reset(self) -> None:
        """The first parameters again, and optimizer state that is known from them for every layout."""
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            with torch.no_grad():
                parameter.copy_(self.first[name])
                state["exp_avg"].copy_(parameter * 3)
                state["exp_avg_sq"].copy_(parameter * parameter)

    def mismatches(self, factor: float) -> list[str]:
        """The names of what differs, in any bit, from what `reset` gives."""
        known = Training.make("plain", factor=factor).parameters
        wrong = []
        for name, held in self.parameters.items():
            value, state = known[name], self.optimizer.state[held]
            pairs = ((held, value), (state["exp_avg"], value * 3), (state["exp_avg_sq"], value * value))
            for kind, (found, wanted) in zip(("", " exp_avg", " exp_avg_sq"), pairs, strict=True):
                if not torch.equal(_whole(found.detach()), wanted.detach()):
                    wrong.append(name + kind)
        return wrong

    def state(self, own: Any = None) -> dict[str, Any]:
        """What is saved and loaded; `own` is this rank's own."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "note": self.note,
            "own": shardckpt.PerRank(own),
        }

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters under the plain model's names."""
        return {name.removeprefix("module."): p for name, p in self.model.named_parameters()}


@cache
def _mesh(*sizes: int) -> DeviceMesh:
    """Made once, since every process group takes time to connect."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def _split_linears(model: nn.Module, mesh: DeviceMesh) -> None:
    # DTensors between the two, since plain tensors could not tell how 13 is divided by 2
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor, by the ranks' own positions: torch gathers uneven strided shards wrongly."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not any(hasattr(placement, "split_factor") for placement in tensor.placements):
        return tensor.full_tensor()
    # FSDP over tensor parallelism: all of a tensor-parallel part first, then all parts.
    fsdp, tp = (tensor.device_mesh[name] for name in tensor.device_mesh.mesh_dim_names or ())
    part = torch.cat(_gathered(tensor.to_local(), fsdp.get_group()))
    return torch.cat(_gathered(part, tp.get_group()))


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor.contiguous(), group=group)
    return parts
