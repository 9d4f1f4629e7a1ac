"""The body of an upload."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

__all__ = ["Body"]

_PIECE = 128 << 10


class Body:
    """Bytes of a buffer as the body of a request, without a copy.

    To botocore, which signs it, it is a file; to aiohttp an asynchronous iterable, which it sends piece by piece.
    Bytes it would copy as a whole into the connection's own buffer.

    Attributes:
        view: the bytes.
        progress: called with the number of bytes that the connection has taken, from any thread.
    """

    def __init__(self, view: memoryview, progress: Callable[[int], object]) -> None:
        self.view = view
        self.progress = progress
        self._position = 0

    def __len__(self) -> int:
        return len(self.view)

    def __bool__(self) -> bool:
        return True  # empty, it still is a body

    def read(self, size: int = -1) -> memoryview:
        start = self._position
        stop = len(self.view) if size is None or size < 0 else min(start + size, len(self.view))
        self._position = max(start, stop)
        return self.view[start:stop]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, len(self.view))[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for start in range(0, len(self.view), _PIECE):
            yield self.view[start : start + _PIECE]
            self.progress(start + _PIECE)
