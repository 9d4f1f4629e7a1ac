"""What the benchmarks compare with, one module a peer. `candidates.py` has them all."""
