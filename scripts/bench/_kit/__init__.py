"""What the benchmarks share: environments of peers, processes, a state to save, limits of the machine."""
