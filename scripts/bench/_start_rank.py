"""A rank of scripts/bench/start: joins, reduces once, notes the time, then waits to be killed.

Appends a line "NODE WORLD PID TIME" to the file named by its argument, where NODE is the BENCH_NODE of its
environment. While there is a file of that name and ".deaf", it ignores SIGTERM.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

log = sys.argv[1]
if os.path.exists(f"{log}.deaf"):  # noqa: PTH110 - pathlib would be imported in the time that is measured
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
now = time.time()
assert total.item() == dist.get_world_size()

line = f"{os.environ['BENCH_NODE']} {dist.get_world_size()} {os.getpid()} {now:.6f}\n"
fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
os.write(fd, line.encode())
while True:
    signal.pause()
