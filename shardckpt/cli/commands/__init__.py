"""The commands of `shardckpt`, one module a verb."""
