"""Scripts that need the real torch: under `launch` they do what they do without it, or under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.job import Job
from tests.kit.scripts import PATIENCE, Outcome, outcome, run_launched, run_plain, script, write

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))

TORCH_STYLES = {
    "what is left at the end": """
        import atexit, ctypes, os, sys
        import torch

        class Sampler:
            def __init__(self, path):
                self.path, self.state = path, torch.ones(2)

            def __del__(self):
                print("del", os.path.basename(self.path), self.state.sum().item())
                try:
                    import torch.nn
                except ImportError:
                    print("no more imports")

        class Loop:
            def __del__(self): print("del loop")

        sampler = Sampler("/data/train")
        loop = Loop(); loop.itself = loop
        file = open("left-open.txt", "w"); file.write("all of it")
        atexit.register(lambda: print("atexit", torch.ones(2).sum().item()))
        ctypes.CDLL(None).printf(b"of C\\n")
        sys.exit(3)
        """,
    "DataLoader": """
        import multiprocessing, os, random
        import numpy as np
        import torch
        from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

        class Squares(Dataset):
            def __init__(self, n): self.n = n
            def __len__(self): return self.n
            def __getitem__(self, i): return {"x": torch.tensor(i * i), "worker": get_worker_info().id}

        class Stream(IterableDataset):
            def __iter__(self): return iter(range(get_worker_info().id, 6, get_worker_info().num_workers))

        class Failing(Squares):
            def __getitem__(self, i): raise KeyError("no such sample")

        def seed_worker(worker):
            np.random.seed(torch.initial_seed() % 2**32); random.seed(0)

        if __name__ == "__main__":
            generator = torch.Generator().manual_seed(7)
            for method in ("fork", "spawn"):
                loader = DataLoader(Squares(8), 2, shuffle=True, num_workers=1, generator=generator,
                                    worker_init_fn=seed_worker, persistent_workers=True, prefetch_factor=2,
                                    multiprocessing_context=method)
                for epoch in range(2):
                    print(method, epoch, [batch["x"].tolist() for batch in loader])
                del loader
            print([batch.tolist() for batch in DataLoader(Stream(), 2, num_workers=2)])
            print(len(multiprocessing.active_children()))
            try:
                next(iter(DataLoader(Failing(1), num_workers=1)))
            except KeyError as error:
                print(str(error).splitlines()[0], str(error).splitlines()[-1])
        """,
    "torch.compile off": """
        import os
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        import torch
        import torch.nn.functional as F
        torch.manual_seed(1337)
        torch.set_float32_matmul_precision("high")
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        model = torch.compile(model)
        step = torch.compile(lambda x: F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)))
        optimizer = torch.optim.AdamW(model.parameters(), fused=False)
        for _ in range(3):
            loss = step(torch.randn(5, 4))
            loss.backward(); optimizer.step(); optimizer.zero_grad(set_to_none=True)
            print(loss.item())
        print(type(model), sorted(model.state_dict()), torch.is_grad_enabled(), torch.get_default_dtype())
        """,
    "mp.spawn": """
        import os, sys, tempfile
        import torch
        import torch.distributed as dist
        import torch.multiprocessing as mp
        from torch.nn.parallel import DistributedDataParallel as DDP

        def setup(rank, world_size, store):
            dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=f"file://{store}")

        def demo_basic(rank, world_size, store):
            setup(rank, world_size, store)
            torch.manual_seed(rank)
            model = DDP(torch.nn.Linear(2, 1, bias=False))
            model(torch.ones(1, 2)).sum().backward()
            total = model.module.weight.grad.clone(); dist.all_reduce(total)
            print(f"rank {rank} of {world_size}: {total.tolist()}\\n", end="", flush=True) if rank == 0 else None
            dist.destroy_process_group()

        def fail(rank): raise RuntimeError("has had enough")

        if __name__ == "__main__":
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(demo_basic, args=(2, os.path.join(folder, "store")), nprocs=2, join=True)
            try:
                mp.start_processes(fail, nprocs=1, start_method="fork")
            except mp.ProcessRaisedException as error:
                print(error.error_index, str(error).strip().splitlines()[-1])
                sys.exit(11)
        """,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        "what is left at the end",
        "DataLoader",
        "torch.compile off",
        pytest.param("mp.spawn", marks=pytest.mark.slow),
    ],
)
def test_a_style_with_torch(job: Job, name: str) -> None:
    job.use_torch()
    style = script(TORCH_STYLES[name])
    write(job, style)
    assert run_launched(job, style) == run_plain(job, style)


def test_what_a_script_leaves_open_is_written(job: Job) -> None:
    """Also what it has opened in C, though nothing of C's libraries is torn down."""
    job.use_torch()
    path = job.script(
        """
        import ctypes, torch
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        libc.fputs(b"of C", ctypes.c_void_p(libc.fopen(b"c.txt", b"w")))
        file = open("python.txt", "w"); file.write("of Python")
        """
    )
    assert job.run(path).code == 0
    written = [(job.path / name).read_text() for name in ("c.txt", "python.txt")]
    assert written == ["of C", "of Python"]


@pytest.mark.parametrize(
    ("variable", "source"),
    [
        ("OMP_NUM_THREADS", "import torch; print(torch.get_num_threads())"),
        ("TORCH_LOGS", "import torch, logging; print(logging.getLogger('torch.distributed').level)"),
    ],
)
def test_a_variable_that_a_script_sets_before_it_imports_torch(
    job: Job, variable: str, source: str
) -> None:
    job.use_torch()
    job.environment["OMP_NUM_THREADS"] = "1"
    value = {"OMP_NUM_THREADS": "2", "TORCH_LOGS": "+distributed"}[variable]
    style = script(f"import os; os.environ[{variable!r}] = {value!r}\n{source}")
    write(job, style)
    assert run_launched(job, style) == run_plain(job, style)


def run_torchrun(job: Job, words: list[str], ranks: int) -> tuple[int, list[Outcome]]:
    """The exit code, and what each rank did to its streams."""
    logs = job.path / "torchrun"
    command = [TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", "--redirects=3", f"--log-dir={logs}"]
    done = subprocess.run(
        [*command, *words],
        cwd=job.path,
        env=job.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    (attempt,) = logs.glob("*/attempt_0")
    read = [
        [(attempt / str(rank) / f"{stream}.log").read_text() for stream in ("stdout", "stderr")]
        for rank in range(ranks)
    ]
    return done.returncode, [outcome(0, out, err) for out, err in read]


TOGETHER = {
    "a ring of ranks": """
        import argparse, os, sys
        import torch
        import torch.distributed as dist
        def main(argv=None):
            parser = argparse.ArgumentParser()
            parser.add_argument("--local-rank", "--local_rank", type=int, default=-1)
            parser.add_argument("--epochs", type=int, required=True)
            args = parser.parse_args(argv)
            local = int(os.environ.get("LOCAL_RANK", args.local_rank))
            dist.init_process_group(backend="gloo", init_method="env://")
            rank, world = dist.get_rank(), dist.get_world_size()
            gathered = [None] * world
            dist.all_gather_object(gathered, {"rank": rank, "local": local, "argv": sys.argv})
            sampler = torch.utils.data.DistributedSampler(range(7), shuffle=True, seed=3)
            sampler.set_epoch(args.epochs)
            print(gathered, list(sampler), dist.is_torchelastic_launched(), torch.get_num_threads())
            dist.barrier()
            dist.destroy_process_group()
        if __name__ == "__main__":
            main()
        """,
    "an exception of all ranks": """
        import os, sys
        print(__file__, sys.argv, sys.path[0], sys.flags, os.environ["WORLD_SIZE"], sys.stdin.read())
        import signal; print(signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
        def train():
            raise RuntimeError("loss is nan")
        train()
        """,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TOGETHER)
def test_the_same_as_under_torchrun(job: Job, name: str) -> None:
    """Two ranks, both launchers, the same options and the same words."""
    job.use_torch()
    words = [job.script(TOGETHER[name]), "--epochs", "2"]
    code, expected = run_torchrun(job, words, ranks=2)
    process = job.start("--standalone", "--nproc-per-node=2", "--max-restarts=0", *words)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    found = [outcome(0, job.log(rank, "out"), job.log(rank, "err")) for rank in (0, 1)]
    if code:  # a rank may be stopped before it gets as far as the first
        first = next(rank for rank in (0, 1) if "loss is nan" in found[rank].err)
        assert found[first] in expected
    else:
        assert found == expected
