"""The training that scripts/soak disturbs: small, with sharded checkpoints, and the same on any number of ranks.

Not nearly the same: every bit. Each sample's gradient is rounded to a whole number of 2**-32, and whole numbers
sum up alike in any order. So whoever runs this in whatever way must end with the weights of an undisturbed run.
Parameters are kept as in ZeRO: each rank has all of them to compute with, and updates its shard.

    launch --nproc 4 scripts/soak_trainer.py --last-step FILE [--pause SECONDS] [--trace FILE]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardckpt

BATCH = 12
CONTEXT = 16
WIDTH = 64
LEARNING_RATE, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.95, 1e-8
GRAIN = float(1 << 32)
"""Gradients are whole multiples of 1 / GRAIN."""

TEXT = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()


class Model(nn.Module):
    """The next byte, from the bytes before it: (CONTEXT,) to (CONTEXT, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.bytes(tokens)
        past = x.cumsum(0) / torch.arange(1, len(x) + 1).unsqueeze(1)
        return self.out(torch.tanh(self.hidden(x + past)))


class Sharded:
    """Parameters and Adam's two moments of a model, each split over the ranks along its first dimension."""

    def __init__(self, model: Model) -> None:
        self.model = model
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        with torch.no_grad():
            split = {
                name: distribute_tensor(p.detach().clone(), mesh, [Shard(0)])
                for name, p in model.named_parameters()
            }
            self.state: dict[str, dict[str, DTensor]] = {
                "parameters": split,
                "first": {name: torch.zeros_like(of) for name, of in split.items()},
                "second": {name: torch.zeros_like(of) for name, of in split.items()},
            }

    @torch.no_grad()
    def spread(self) -> None:
        """Give the model, on every rank, the parameters that the ranks hold."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.state["parameters"][name].full_tensor())

    @torch.no_grad()
    def update(self, gradients: dict[str, torch.Tensor], step: int) -> None:
        """One step of Adam, the `step`-th, with the gradients of whole parameters."""
        rank, world = dist.get_rank(), dist.get_world_size()
        for name, gradient in gradients.items():
            value, first, second = (self.state[kind][name].to_local() for kind in self.state)
            rows = -(-len(gradient) // world)
            mine = gradient[rank * rows : (rank + 1) * rows]
            first.mul_(BETA1).add_(mine * (1 - BETA1))
            second.mul_(BETA2).add_(mine * mine * (1 - BETA2))
            scale = (second / (1 - BETA2**step)).sqrt_().add_(EPSILON)
            value.sub_(first / (1 - BETA1**step) / scale * LEARNING_RATE)
        self.spread()


def gradients_of(model: Model, step: int) -> tuple[dict[str, torch.Tensor], float]:
    """The mean gradient of a step's samples over all ranks, and the mean loss."""
    rank, world = dist.get_rank(), dist.get_world_size()
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    total = torch.zeros(sum(sizes) + 1, dtype=torch.int64)
    for sample in range(rank, BATCH, world):
        start = (step * 131 + sample * 977) % (len(TEXT) - CONTEXT - 1)
        window = TEXT[start : start + CONTEXT + 1]
        loss = F.cross_entropy(model(window[:-1]), window[1:])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        flat = torch.cat([*(part.flatten() for part in parts), loss.detach().reshape(1)])
        total += (flat.double() * GRAIN).round().long()
    dist.all_reduce(total)
    *mean, loss_mean = (total.double() / GRAIN / BATCH).float().split([*sizes, 1])
    shapes = [p.shape for p in model.parameters()]
    return {
        name: part.reshape(shape) for name, part, shape in zip(names, mean, shapes, strict=True)
    }, loss_mean.item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--last-step",
        type=Path,
        required=True,
        help="file with the number of the last step, once it has one",
    )
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep in every step")
    parser.add_argument(
        "--trace", type=Path, help="file for a line TIME STEP WORLD LOSS from rank 0 after every step"
    )
    parser.add_argument("--every", type=int, default=5, help="steps between snapshots in memory")
    parser.add_argument("--url-every", type=int, default=20, help="steps between durable checkpoints")
    return parser.parse_args()


def is_over(step: int, last_step: Path) -> bool:
    """Whether `step` was the last one. The file gets its number long before that step."""
    try:
        return step >= int(last_step.read_text())
    except (FileNotFoundError, ValueError):
        return False


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = Model()
    sharded = Sharded(model)
    trace = os.open(args.trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666) if args.trace else -1
    with shardckpt.Checkpointer(
        every_steps=args.every, url_every_steps=args.url_every, keep_last=3
    ) as checkpoints:
        at = checkpoints.restore(sharded.state)
        step = at.step if at else 0
        sharded.spread()
        saved = None
        while not is_over(step, args.last_step):
            gradients, loss = gradients_of(model, step)
            step += 1
            sharded.update(gradients, step)
            time.sleep(args.pause)
            saved = checkpoints.step(step, sharded.state, metrics={"loss": loss})
            if trace >= 0 and dist.get_rank() == 0:
                os.write(trace, f"{time.time():.3f} {step} {dist.get_world_size()} {loss:.6f}\n".encode())
        if saved is None:
            checkpoints.save(step, sharded.state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
