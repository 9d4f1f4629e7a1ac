"""Fetch and verify chunks. Free of torch.

A chunk is read in pieces that stay in a core's cache while they are checksummed and copied to where they are
wanted: one pass over memory. So memory is written to before the chunk is known to be right. Where it must not
be, chunks are verified first: near ones (local files, memory) are then read a second time, far ones are held.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import crc32c
import numpy as np
import numpy.typing as npt

from shardckpt.errors import LOAD_ANOTHER, CorruptError
from shardckpt.format.box import Box
from shardckpt.format.chunks import CRC_BYTES, StoredChunk
from shardckpt.format.manifest import Manifest
from shardckpt.loading.limits import DEFAULT_LIMITS, LoadLimits
from shardckpt.loading.pack_reader import PackStream, Source, open_packs
from shardckpt.loading.plan import ChunkRead, coalesced, describe, plan_reads
from shardckpt.loading.scatter import DISCARD, PIECE, Scatter, Scratch
from shardckpt.progress import alive
from shardckpt.storage.parallel import in_parallel
from shardckpt.storage.rereading import warn_misread
from shardckpt.storage.work import Interruption

__all__ = ["Fetcher"]

_THREADS_AHEAD = 6

Progress = Callable[[int], object]
"""Called with the bytes of each finished request; from several threads."""


class Fetcher:
    """Reads and verifies the chunks of one checkpoint. Safe to use from several threads.

    Attributes:
        url: the checkpoint's name in messages.
        is_near: True if verified chunks are read again instead of held.
    """

    def __init__(self, source: Source, manifest: Manifest, limits: LoadLimits = DEFAULT_LIMITS) -> None:
        self._packs = open_packs(source, manifest, limits)
        self._manifest = manifest
        self._ahead = limits.ahead
        self._held: dict[int, memoryview] = {}
        self._sized: set[int] = set()
        self._shared: Collection[int] = ()
        self._thread = _ThreadMemory()
        self.url = self._packs.url
        self.is_near = self._packs.is_near

    def __contains__(self, pack: int) -> bool:
        """True if this process can read the pack of this number."""
        return pack in self._packs

    def load(self, reads: Iterable[ChunkRead], scatter: Scatter, progress: Progress | None = None) -> None:
        """Fill `scatter` from these chunks, and verify them, in one pass.

        Args:
            reads: in the order of packs and offsets.
            scatter: what it has of a chunk is undefined after an error.
            progress: see `Progress`.

        Chunks that are held are taken from there, and released. Raises CorruptError, which names the first bad
        chunk and its pack, or a pack that is missing or has another size; StorageError.
        """
        self._pass(reads, scatter, progress, keep=False)

    def verify(self, reads: Iterable[ChunkRead], progress: Progress | None = None) -> None:
        """Compare these chunks with their checksums. Arguments and errors are those of `load`."""
        self._pass(reads, DISCARD, progress, keep=False)

    def share(self, rows: Collection[int]) -> None:
        """Say that other processes of this machine read the chunks of these rows, too.

        From local files they are then read through the page cache: by the first process from the disk.
        """
        self._shared = rows

    def verify_first(self, reads: Iterable[ChunkRead]) -> None:
        """Verify chunks for which `load` is called later: far ones are held. Raises as `load`."""
        self._pass(reads, DISCARD if self.is_near else _Holder(self._held), None, keep=True)

    def _pass(
        self, reads: Iterable[ChunkRead], scatter: Scatter, progress: Progress | None, *, keep: bool
    ) -> None:
        def handle(group: list[ChunkRead]) -> None:
            alive()
            self._pass_group(group, scatter, keep=keep)
            if progress is not None:
                progress(sum(read.stored.nbytes for read in group))

        waiting: list[ChunkRead] = []
        held: list[ChunkRead] = []
        for read in reads:
            (held if read.stored.row in self._held else waiting).append(read)
        groups = list(self._requests(waiting))
        self.check_sizes(read.stored for read in waiting)
        in_parallel(handle, groups, self._packs.threads([group[0].stored for group in groups]))
        in_parallel(lambda read: self._release(read, scatter), held)

    def check_all_sizes(self) -> None:
        """Compare the size of every pack with the manifest's. Raises CorruptError, StorageError."""
        reads = plan_reads(self._manifest, [(t.name, Box.whole(t.shape)) for t in self._manifest.tensors])
        self.check_sizes(read.stored for read in reads)

    def check_sizes(self, chunks: Iterable[StoredChunk]) -> None:
        """Compare the sizes of the packs that have these chunks with the manifest's, each pack once.

        A pack that is cut short is so found before anything is read from it. Raises CorruptError, StorageError.
        """
        of_packs: dict[int, list[StoredChunk]] = {}
        for chunk in chunks:
            if chunk.pack not in self._sized:
                of_packs.setdefault(chunk.pack, []).append(chunk)
        in_parallel(self._check_size, list(of_packs.values()))

    def fetch(self, chunks: Sequence[StoredChunk]) -> memoryview:
        """The bytes from the first to the last of these neighbours in one pack, verified. Raises as `verify`."""
        self.check_sizes(chunks)
        return self._read_right(chunks)

    def fetch_ahead(self, groups: Iterable[Sequence[StoredChunk]]) -> Generator[memoryview]:
        """What `fetch` returns for each group of neighbours, in order, while the next ones are being fetched.

        Up to `LoadLimits.ahead` bytes, or one group, are fetched ahead. Close the generator if you leave it
        early.
        """
        waiting = deque((group, group[-1].offset + group[-1].nbytes - group[0].offset) for group in groups)
        running: deque[tuple[int, Future[memoryview]]] = deque()
        interruption = Interruption()

        def fetch(group: Sequence[StoredChunk]) -> memoryview:
            with interruption.joined():
                return self.fetch(group)

        with ThreadPoolExecutor(_THREADS_AHEAD, thread_name_prefix="shardckpt") as pool:
            try:
                while waiting or running:
                    ahead = sum(nbytes for nbytes, _ in running)
                    while waiting and (not running or ahead + waiting[0][1] <= self._ahead):
                        group, nbytes = waiting.popleft()
                        running.append((nbytes, pool.submit(fetch, group)))
                        ahead += nbytes
                    yield running.popleft()[1].result()
            finally:
                interruption.set()
                pool.shutdown(cancel_futures=True)

    def hold(self, row: int, content: memoryview) -> None:
        """Take the bytes of the chunk of this row, verified by another rank, without a check."""
        self._held[row] = content

    def _requests(self, reads: Sequence[ChunkRead]) -> Iterator[list[ChunkRead]]:
        ordered = iter(reads)
        for group in coalesced((read.stored for read in reads), self._packs.request):
            yield list(islice(ordered, len(group)))

    def _release(self, read: ChunkRead, scatter: Scatter) -> None:
        """Hand over a chunk that is held."""
        alive()
        scatter.write(read, np.frombuffer(self._held.pop(read.stored.row), dtype=np.uint8))

    def _pass_group(self, group: Sequence[ChunkRead], scatter: Scatter, *, keep: bool) -> None:
        """Read neighbouring chunks: small ones together, others in pieces."""
        first = group[0].stored
        if self._shared and not keep:
            shared = sum(read.stored.nbytes for read in group if read.stored.row in self._shared)
            keep = 2 * shared > sum(read.stored.nbytes for read in group)
        try:
            with self._packs.stream(first.pack, first.offset, group[-1].stored.stop, keep=keep) as stream:
                for run in _runs(group):
                    if len(run) > 1 or run[0].stored.nbytes <= PIECE:
                        self._pass_small(stream, run, scatter)
                    else:
                        self._pass_large(stream, run[0], scatter)
        except FileNotFoundError:  # the pack is gone, or seems to be
            for read in group:
                self._repair(read, None, scatter)

    def _pass_small(self, stream: PackStream, reads: Sequence[ChunkRead], scatter: Scatter) -> None:
        start = reads[0].stored.offset
        content = self._thread.scratch.bytes(reads[-1].stored.stop - start)
        is_read = _fill(stream, start, content.data)
        for read in reads:
            chunk = read.stored
            part = content[chunk.offset - start : chunk.stop - start]
            problem = self._difference(chunk, part.data) if is_read else None
            if problem == "":
                scatter.write(read, part[: chunk.nbytes])
            else:
                self._repair(read, problem, scatter)

    def _pass_large(self, stream: PackStream, read: ChunkRead, scatter: Scatter) -> None:
        chunk = read.stored
        stored = memoryview(bytearray(CRC_BYTES))
        offset, last, found, is_read = chunk.offset, chunk.offset + chunk.nbytes, 0, True
        for buffer in scatter.buffers(read, self._thread.scratch):
            end = offset + len(buffer)
            is_read = _fill(stream, offset, buffer, *([stored] if end == last else []))
            if not is_read:
                break
            if self._packs.has_checksums:
                found = crc32c.crc32c(buffer, found)
            offset = end
        problem = self._mismatch(chunk, found, stored) if is_read else None
        if problem != "":
            self._repair(read, problem, scatter)

    def _repair(self, read: ChunkRead, problem: str | None, scatter: Scatter) -> None:
        """Hand over a chunk that was wrong at first. Arguments and errors are those of `_read_again`."""
        content = np.frombuffer(self._read_again(read.stored, problem), dtype=np.uint8)
        scatter.write(read, content[: read.stored.nbytes])

    def _read_right(self, chunks: Sequence[StoredChunk]) -> memoryview:
        """The bytes of neighbouring chunks, verified."""
        alive()
        start, stop = chunks[0].offset, chunks[-1].stop
        content = np.empty(stop - start, dtype=np.uint8).data
        try:
            with self._packs.stream(chunks[0].pack, start, stop) as stream:
                is_read = _fill(stream, start, content)
        except FileNotFoundError:
            is_read = False
        for chunk in chunks:
            part = content[chunk.offset - start : chunk.stop - start]
            if (problem := self._difference(chunk, part) if is_read else None) != "":
                part[:] = self._read_again(chunk, problem)
        return content

    def _read_again(self, chunk: StoredChunk, problem: str | None) -> memoryview:
        """A chunk and its checksum, read again, past caches, and verified.

        Args:
            chunk: what was wrong.
            problem: how it was wrong at first; None if the pack seemed to end too early.

        One that is wrong twice is corrupt: raises CorruptError, StorageError.
        """
        try:
            content = self._packs.read_again(chunk.pack, chunk.offset, chunk.stop)
        except FileNotFoundError as error:
            raise self._missing(chunk.pack) from error
        if difference := self._difference(chunk, content):
            raise CorruptError(
                f"{self._packs.url}: {describe(self._manifest, chunk.row)} is corrupt, also when it is read "
                f"again: {difference}. {LOAD_ANOTHER}"
            )
        if problem is not None:
            warn_misread(
                f"{self._packs.url}: {describe(self._manifest, chunk.row)} was read wrongly: {problem}."
            )
        return content

    def _difference(self, chunk: StoredChunk, content: memoryview) -> str:
        """How a chunk and its checksum differ from what was written; an empty string if they do not."""
        if not self._packs.has_checksums:
            return ""
        return self._mismatch(chunk, crc32c.crc32c(content[: chunk.nbytes]), content[chunk.nbytes :])

    def _mismatch(self, chunk: StoredChunk, found: int, stored: memoryview) -> str:
        """As `_difference`, of a chunk with the checksum `found`, and the bytes `stored` behind it."""
        written = int.from_bytes(stored, "little")
        if not self._packs.has_checksums or found == written == chunk.crc32c:
            return ""
        return (
            f"its checksum is {found:08x}, the one stored with it {written:08x}, the manifest's "
            f"{chunk.crc32c:08x}"
        )

    def _check_size(self, chunks: Sequence[StoredChunk]) -> None:
        """Compare the size of the pack that has these chunks."""
        number = chunks[0].pack
        pack = self._manifest.packs[number]
        found = _size(number, self._packs.size)
        if found != pack.size:
            found = _size(number, self._packs.size_again)
        if found is None:
            raise self._missing(number)
        if found != pack.size:
            lost = next((chunk for chunk in chunks if chunk.stop > found), None)
            names = describe(self._manifest, lost.row) if lost else ""
            raise CorruptError(
                f"{self._packs.url}: the pack {pack.path} has {found} bytes and should have "
                f"{pack.size}: it was changed after it was written"
                + (f"; the first chunk that is lost is {names}" if lost else "")
            )
        self._sized.add(number)

    def _missing(self, number: int) -> CorruptError:
        pack = self._manifest.packs[number]
        return CorruptError(
            f"{self._packs.url}: the pack {pack.path} is missing; it should have {pack.size} bytes"
        )


def _size(number: int, ask: Callable[[int], int]) -> int | None:
    """The size that `ask` finds; None if the pack is missing."""
    try:
        return ask(number)
    except FileNotFoundError:
        return None


def _fill(stream: PackStream, offset: int, *buffers: memoryview) -> bool:
    """Read into the buffers. Returns False if the pack ends too early, or seems to."""
    try:
        stream.read(offset, *buffers)
    except (FileNotFoundError, CorruptError):
        return False
    return True


def _runs(group: Sequence[ChunkRead]) -> Iterator[list[ChunkRead]]:
    """Cut neighbouring chunks into runs: small ones that are read at once, or one that is larger."""
    run: list[ChunkRead] = []
    for read in group:
        if run and read.stored.stop - run[0].stored.offset > PIECE:
            yield run
            run = []
        run.append(read)
    if run:
        yield run


class _ThreadMemory(threading.local):
    """Each thread's scratch memory."""

    def __init__(self) -> None:
        self.scratch = Scratch()


class _Holder:
    """Holds chunks in memory, by row."""

    def __init__(self, held: dict[int, memoryview]) -> None:
        self._held = held

    def buffers(self, read: ChunkRead, scratch: Scratch) -> Iterator[memoryview]:  # noqa: ARG002
        content = np.empty(read.stored.nbytes, dtype=np.uint8).data
        for start in range(0, len(content), PIECE):
            yield content[start : start + PIECE]
        self._held[read.stored.row] = content

    def write(self, read: ChunkRead, content: npt.NDArray[np.uint8]) -> None:
        self._held[read.stored.row] = content.copy().data
