"""The saver: one process per node that holds snapshots in memory, and persists them without the trainers.

wire        what trainers and the saver tell each other
memory      the buffers, which both map
shelf       which buffer holds what, and who may have which: the rules
lanes       the background work: one lane for each tier
server      the process: `python -m shardckpt.saver`
client      a trainer's end
"""

from __future__ import annotations

__all__: list[str] = []
