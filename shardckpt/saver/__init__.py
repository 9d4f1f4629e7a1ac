"""The saver: one process per node that holds snapshots in memory and persists them without the trainers.

It never imports torch. Imports `run` and below.

server        the flow: a trainer's message comes in, a staged pack is taken over, persisted, reported
loop          one thread serves; connections has the trainers, lifetime says when to end
snapshots     the rules: which snapshots are held; buffer_pool: which trainer may have which buffer
allocation    requests for buffers are served; buffers is the memory itself
persister     snapshots become durable; tasks has a queue for each tier, outage the retries
attempts      where the saves of an attempt lie; attempt_reports tells trainers
report        outcomes and warnings, for trainers and the launcher
protocol      the messages; channel and outbox carry them, checks refuses nonsense
client        a trainer's end: client_connection, granted_buffers; startup finds or starts the saver
"""

__all__: list[str] = []
