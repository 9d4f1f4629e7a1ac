"""Reading objects from S3: whole, or ranges by parallel requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from shardckpt.errors import StorageError
from shardckpt.storage.protocol import check_whole
from shardckpt.storage.s3_client import Progress, S3Client
from shardckpt.storage.s3_errors import BeyondEndError

__all__ = ["fill", "get"]

T = TypeVar("T")

_PIECE = 1 << 20  # bytes read at a time from an answer of unknown length


async def get(client: S3Client, key: str) -> bytes:
    """A whole object. Raises FileNotFoundError; FormatError for more than `MAX_WHOLE` bytes; StorageError."""

    async def attempt(progress: Progress) -> bytes:
        answer = await client.call("get_object", key, progress)
        data = bytearray()
        with client.explained(key):
            async with answer["Body"] as body:
                check_whole(client.name(key), int(answer.get("ContentLength", 0)))
                while piece := await body.read(_PIECE):
                    data += piece
                    check_whole(client.name(key), len(data))
                    progress(len(data))
        return bytes(data)

    return await client.repeat(key, attempt)


async def fill(client: S3Client, key: str, offset: int, view: memoryview) -> int:
    """Fill `view` with the object's bytes from `offset` on. Returns how many there were, by its end.

    Raises FileNotFoundError, StorageError.
    """
    size = client.settings.range_bytes
    calls = (
        partial(_fill_range, client, key, offset + start, view[start : start + size])
        for start in range(0, len(view), size)
    )
    return sum(await _gather(calls, client.settings.parallel))


async def _fill_range(client: S3Client, key: str, offset: int, view: memoryview) -> int:
    """`fill`, by one request."""
    span = f"bytes={offset}-{offset + len(view) - 1}"

    async def attempt(progress: Progress) -> int:
        answer = await client.call("get_object", key, progress, Range=span)
        with client.explained(key):
            return await _receive(answer, client.name(key), view, progress)

    try:
        return await client.repeat(key, attempt)
    except BeyondEndError:
        return 0


async def _receive(answer: Any, name: str, view: memoryview, progress: Progress) -> int:
    """Fill `view` with the body of an answer. Returns the body's length.

    A server that sends the body in chunks need not give its length in advance.
    """
    is_known = "ContentLength" in answer
    length = int(answer["ContentLength"]) if is_known else len(view)
    async with answer["Body"] as body:
        if length > len(view) or not (is_known or "ContentRange" in answer):
            raise StorageError(
                f"{name}: the server answered a request for {len(view)} bytes with "
                f"{length if is_known else 'all'}: it ignores ranges, which reading a checkpoint needs"
            )
        view, raw = view[:length], getattr(body, "raw_stream", body)
        if hasattr(raw, "read_into"):  # of ThreadSession
            done = int(await raw.read_into(view, progress))
        else:
            done = await _copy_into(view, body, progress)
        if done < length and is_known:
            raise ConnectionError(f"the answer broke off after {done} of {length} bytes")
    return done


async def _copy_into(view: memoryview, body: Any, progress: Progress) -> int:
    """Fill `view` from aiohttp, which has buffers of its own. Returns how many bytes there were."""
    done = 0
    while data := await body.read(len(view) - done):
        view[done : done + len(data)] = data
        done += len(data)
        progress(done)
    return done


async def _gather(work: Iterable[Callable[[], Coroutine[Any, Any, T]]], parallel: int) -> list[T]:
    """The results, in order, with at most `parallel` calls under way. The first failure cancels the rest.

    The iterable is advanced when there is a place for the next call.
    """
    places = asyncio.Semaphore(parallel - 1)
    running: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            for call in work:
                task = tasks.create_task(call())
                task.add_done_callback(lambda _: places.release())
                running.append(task)
                await places.acquire()
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in running]
