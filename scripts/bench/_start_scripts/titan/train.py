"""FSDP over all ranks, one step."""

import os
import time


def main() -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 32)).sum().backward()
    optimizer.step()
    with open(os.environ["BENCH_STEPS"], "a") as log:
        log.write(f"{time.time()}\n")
    dist.destroy_process_group()
