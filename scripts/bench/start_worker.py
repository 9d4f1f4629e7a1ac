"""A rank of scripts/bench/start: joins, reduces once, notes the time, then waits to be killed.

Appends a line "ROUND RANK PID TIME" to the file named by its argument. In the last round (the second
argument) it ends instead of waiting.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

log, rounds = sys.argv[1], int(sys.argv[2])
restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
now = time.time()
assert total.item() == dist.get_world_size()

line = f"{restarts} {dist.get_rank()} {os.getpid()} {now:.6f}\n"
fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
os.write(fd, line.encode())
if restarts + 1 < rounds:
    signal.pause()
