"""Train a byte-level GPT on real text, and survive anything: the resume recipe to copy.

    launch --nproc 8 scripts/train.py --steps 200 --every 50
    launch --nproc 6 scripts/train.py --steps 400 --every 50      # goes on where the 8 ranks stopped

The global batch and the order of samples do not depend on the number of ranks, so the loss curve
goes on as if nothing had happened. Works under torchrun and plain python too (give --ckpt then).
"""

import argparse
import json
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardckpt


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and around a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Next-byte prediction: 256 tokens, learned positions, one output layer tied to the input's."""

    def __init__(self, dim: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        for parameter in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.bytes.weight)


class Samples:
    """Windows of a text in an order that depends on the seed alone. Its whole state is one number."""

    def __init__(self, text: torch.Tensor, context: int, seed: int) -> None:
        self.text, self.context, self.seed = text, context, seed
        self.count = (len(text) - 1) // context
        self.position = 0  # samples taken so far, by all ranks together
        self._epoch, self._order = -1, torch.empty(0)

    def take(self, batch: int, rank: int, world: int) -> tuple[list[int], torch.Tensor]:
        """This rank's part of the next global batch: sample numbers, and (n, context + 1) bytes."""
        first, last = batch * rank // world, batch * (rank + 1) // world
        numbers = [self._sample(self.position + i) for i in range(first, last)]
        self.position += batch
        rows = [self.text[n * self.context : (n + 1) * self.context + 1] for n in numbers]
        return numbers, torch.stack(rows).long()

    def _sample(self, position: int) -> int:
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return int(self._order[index])

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def read_text(folder: Path, limit: int) -> torch.Tensor:
    """The text and Python files right in the folder, in a fixed order, up to `limit` bytes."""
    data = bytearray()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".py", ".txt", ".md")):
        data += path.read_bytes()
        if len(data) >= limit:
            break
    if len(data) < 10_000:
        raise SystemExit(
            f"--data {folder}: found {len(data)} bytes of .py, .txt and .md, need 10,000 or more"
        )
    return torch.frombuffer(data[:limit], dtype=torch.uint8)


def parallelize(model: GPT, kind: str, device: str) -> nn.Module:
    """The model over all ranks: replicated, sharded, or split within layers."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "tp":
        split = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
        split |= {name: RowwiseParallel() for name in ("out", "down")}
        for block in model.blocks:
            parallelize_module(block, mesh, split)
        return model
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT that resumes on any number of ranks."
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--keep", type=int, default=3, help="checkpoints to keep")
    parser.add_argument("--ckpt", help="URL of the run's checkpoints [that of `launch`]")
    parser.add_argument("--parallel", choices=("fsdp", "ddp", "tp"), default="fsdp")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder with .py, .txt or .md files [Python's own library]",
    )
    parser.add_argument("--batch", type=int, default=48, help="samples in a step, over all ranks")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="folder for one JSON line per step and rank")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:  # plain python
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data_rank, data_world = (0, 1) if args.parallel == "tp" else (rank, world)

    torch.manual_seed(args.seed)
    model = parallelize(
        GPT(args.dim, args.layers, args.heads, args.context).to(device), args.parallel, device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    samples = Samples(read_text(args.data, limit=1 << 20), args.context, args.seed)
    trace = None
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
        trace = open(args.trace / f"rank-{rank:05d}.jsonl", "a", buffering=1)  # noqa: SIM115

    # The resume recipe: name what must survive, restore it, and report every step that is done.
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "samples": samples}
    with shardckpt.Checkpointer(args.ckpt, every_steps=args.every, keep_last=args.keep) as checkpoints:
        at = checkpoints.restore(state)
        step = at.step if at else 0
        if at and rank == 0:
            print(
                f"resumed at step {step} from {at.tier}: {at.url}, saved by {at.world_size} ranks, "
                f"{at.seconds:.2f} s"
            )
        while step < args.steps:
            started = time.perf_counter()
            numbers, window = samples.take(args.batch, data_rank, data_world)
            window = window.to(device)
            logits = model(window[:, :-1])
            total = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
            # Gradients are averaged over the ranks, which may have unequal parts of the batch.
            (total * data_world / (args.batch * args.context)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            loss = total.detach() / (args.batch * args.context)
            if args.parallel != "tp":
                dist.all_reduce(loss)
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss.item()} at step {step}")
            saved = checkpoints.step(step, state, metrics={"loss": loss.item()})
            if trace:
                line = {"step": step, "loss": loss.item(), "world": world, "samples": numbers}
                trace.write(json.dumps(line) + "\n")
            if rank == 0 and (step % 10 == 0 or step == args.steps):
                ms = 1000 * (time.perf_counter() - started)
                print(
                    f"step {step:5d}  loss {loss.item():.4f}  {ms:4.0f} ms{'  saved' if saved else ''}",
                    flush=True,
                )
    # The end of `with` has saved the last step, if it was not saved yet.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
