"""The state that the benchmarks save: a sharded transformer and its optimizer, with known content."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

__all__ = ["State", "build_objects", "build_state", "fill", "local_tensors", "make_optimizer_state"]

_LAYERS = 24
_VOCABULARY = 16384
_SMALL_VOCABULARY = 64  # where the number of tensors is given
_TENSORS_PER_LAYER = 12 * 4  # parameters, each with its two moments and its count of steps
_BYTES_PER_PARAMETER = 12  # itself and two moments, in float32
_BLOCK = 1 << 18


class Block(nn.Module):
    """The tensors of one transformer block: four matrices, eight vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Transformer(nn.Module):
    """Never run: only its tensors matter here."""

    def __init__(self, width: int, layers: int = _LAYERS, vocabulary: int = _VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)


@dataclass
class State:
    """The live objects, and their tensors as this rank holds them.

    Attributes:
        objects: what is saved: "model" and "optimizer", or "tensors" alone.
        tensors: this rank's memory by name.
        nbytes: bytes that this rank holds.
        stored: bytes of a checkpoint of it: all shards, what is replicated once.
    """

    objects: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    nbytes: int
    stored: int
    _expected: dict[str, int]

    @property
    def model(self) -> Any:
        """The model, where there is one."""
        return self.objects["model"]

    @property
    def optimizer(self) -> Any:
        """Its optimizer."""
        return self.objects["optimizer"]

    def wipe(self) -> None:
        """Destroy the content, so that only a load can bring it back."""
        for tensor in self.tensors.values():
            tensor.fill_(-1)

    def check(self) -> None:
        """Raise AssertionError, with a name, unless every bit is what it was."""
        wrong = [name for name, tensor in self.tensors.items() if _crc(tensor) != self._expected[name]]
        if wrong:
            raise AssertionError(f"{len(wrong)} of {len(self.tensors)} tensors differ, such as {wrong[0]}")


def build_state(gigabytes: float, layout: str, count: int | None = None) -> State:
    """A state of about this size (in units of 1e9 bytes), over all ranks of the default group.

    Args:
        gigabytes: the size.
        layout: "fsdp" or "ddp": a model and its optimizer; "dict": a dict of tensors of one dimension, the same
            on all ranks.
        count: about how many tensors it has; None: 1,168, the largest of which have most of the bytes.
    """
    objects: dict[str, Any]
    if layout == "dict":
        objects = {"tensors": _many_tensors(gigabytes, count or 1000)}
        held = {name: (tensor, 0) for name, tensor in objects["tensors"].items()}
        stored = sum(tensor.nbytes for tensor, _ in held.values())
    else:
        model, optimizer = build_objects(gigabytes, layout, count)
        make_optimizer_state(optimizer)
        objects = {"model": model, "optimizer": optimizer}
        held = local_tensors(model, optimizer)
        whole = _tensors(model, optimizer).values()
        stored = sum(tensor.numel() * tensor.element_size() for tensor in whole)
    for name, (local, start) in held.items():
        fill(local, name, start)
    tensors = {name: local for name, (local, _) in held.items()}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    expected = {name: _crc(tensor) for name, tensor in tensors.items()}
    return State(objects, tensors, nbytes, stored, expected)


def _many_tensors(gigabytes: float, count: int) -> dict[str, torch.Tensor]:
    """Tensors of one dimension, from one element to twice the mean."""
    most = max(1, round(2 * gigabytes * 1e9 / 4 / count) - 1)
    return {f"group-{i // 100}.{i % 100}": torch.empty(1 + i * most // count) for i in range(count)}


def build_objects(
    gigabytes: float, layout: str, count: int | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose parameters hold anything, and its optimizer, which has no state yet."""
    parameters = gigabytes * 1e9 / _BYTES_PER_PARAMETER
    layers = _LAYERS if count is None else max(1, count // _TENSORS_PER_LAYER)
    vocabulary, step = (_VOCABULARY, 64) if count is None else (_SMALL_VOCABULARY, 8)
    model: nn.Module
    with torch.device("meta"):
        model = Transformer(_width(parameters, layers, vocabulary, step), layers, vocabulary)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in [*model.blocks, model] if count is None else [model]:
            fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    if layout == "ddp":
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Have it make its state, as its first step does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def local_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, tuple[torch.Tensor, int]]:
    """By name: this rank's memory of each tensor, and the number of its first element in the whole."""
    return {name: _local(tensor) for name, tensor in _tensors(model, optimizer).items()}


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters, and the optimizer's state of each."""
    tensors = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        held = {"": parameter, **{f".{key}": value for key, value in optimizer.state[parameter].items()}}
        tensors |= {name + suffix: tensor for suffix, tensor in held.items()}
    return tensors


def _width(parameters: float, layers: int, vocabulary: int, step: int) -> int:
    """The width of a transformer of about so many parameters, a multiple of `step`."""
    square, linear = 12.0 * layers, 2.0 * vocabulary
    width = (math.sqrt(linear**2 + 4 * square * parameters) - linear) / (2 * square)
    return max(step, round(width / step) * step)


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's memory of the tensor, and the number of its first element in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), offset[0] * math.prod(tensor.shape[1:])


def fill(tensor: torch.Tensor, name: str, start: int) -> None:
    """Content that depends on the name and the place alone, not on the world size; finite floats."""
    content = tensor.view(-1).view(torch.int32).numpy().view(np.uint32)
    seed = np.uint32(zlib.crc32(name.encode()))
    for begin in range(0, len(content), _BLOCK):
        piece = content[begin : begin + _BLOCK]
        numbers = np.arange(start + begin, start + begin + len(piece), dtype=np.uint32)
        numbers *= np.uint32(2654435761)
        numbers += seed
        numbers ^= numbers >> np.uint32(15)
        piece[:] = numbers & np.uint32(0x3FFFFFFF)


def _crc(tensor: torch.Tensor) -> int:
    return int(crc32c.crc32c(tensor.view(-1).view(torch.uint8).numpy().data)) if tensor.numel() else 0
