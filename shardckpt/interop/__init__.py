"""Checkpoints in and out: copy, reshard, export. Imports `checkpointer`, `loading` and below."""
