"""The sizes and pauses of requests to S3."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["S3Settings"]

_MAX_PARTS = 10_000  # of an upload: a limit of S3


@dataclass(frozen=True)
class S3Settings:
    """How large a request is, and how it is repeated. Not an option for users: tests pass smaller ones.

    Attributes:
        part_bytes: bytes of a part of an upload; a smaller object is one request. `part_size` has more for
            objects above 156 GiB, which would have too many parts.
        range_bytes: bytes of one request when a large range is read.
        parallel: requests of one read or upload that are under way at a time; bounds its memory.
        attempts: how often a request is tried, unless the options say otherwise.
        first_pause: seconds before the second attempt, at most; each later pause is twice as long.
        silence: seconds of trouble before a warning is logged.
    """

    part_bytes: int = 16 << 20
    range_bytes: int = 8 << 20
    parallel: int = 8
    attempts: int = 8
    first_pause: float = 0.1
    silence: float = 2.0

    def part_size(self, nbytes: int) -> int:
        """Bytes of each part, but the last, of an object of `nbytes` bytes."""
        return max(self.part_bytes, -(-nbytes // _MAX_PARTS))
