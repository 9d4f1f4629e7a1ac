"""The saver: one process per node that holds snapshots in memory and persists them without the trainers.

It never imports torch. Imports `run` and below.

server      the process: `python -m shardckpt.saver`
protocol    the messages between trainers and the saver; channel carries them
snapshots   which buffer holds what, and who may have which: the rules
buffers     the memory, which trainers and the saver map
tasks       the background work: one queue for each tier
client      a trainer's end
"""

__all__: list[str] = []
