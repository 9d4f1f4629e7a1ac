"""The parts of scripts/bench/save: the world of ranks, what they measure, tables, plot and profile."""
