"""Objects in S3 and in the many stores that speak its protocol, through s3fs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import fsspec

from shardckpt.errors import CorruptError, StorageError
from shardckpt.storage.buffers import as_bytes
from shardckpt.storage.names import is_temporary, join
from shardckpt.storage.probe import ExclusiveProbe
from shardckpt.storage.s3_errors import BeyondEndError, ConflictError, OutOfReachError, explain

__all__ = ["S3Storage", "open_s3"]

T = TypeVar("T")

_PART = 16 << 20  # of an upload: at 10,000 parts, larger ones for more than 156 GiB
_MAX_PARTS = 10_000
_RANGE = 8 << 20  # of one request, when a large range is read
_PARALLEL = 8  # requests of one read or upload under way at a time; bounds its memory
_ATTEMPTS = 4
_WRITER = "shardckpt-writer"  # metadata of an object: which call wrote it
_CONFIG = {
    "retries": {"mode": "standard"},
    "max_pool_connections": 32,
    "connect_timeout": 5,
    "read_timeout": 30,
}


def open_s3(rest: str, options: dict[str, Any]) -> S3Storage:
    """The storage at `s3://rest`. Touches nothing but the options."""
    bucket, _, folder = rest.partition("/")
    if not bucket:
        raise StorageError(f"s3://{rest}: the bucket is missing: s3://bucket/folder")
    folder = join("", folder.strip("/"), f"s3://{bucket}")
    ours = {**options, "use_listings_cache": False}
    ours["config_kwargs"] = {**_CONFIG, **options.get("config_kwargs", {})}
    try:
        system = fsspec.filesystem("s3", **ours)
    except Exception as error:
        raise StorageError(f"s3://{rest}: cannot be opened: {error}") from error
    system.retries = 2  # botocore retries each of these: together they stay below a minute or two
    return S3Storage(bucket, folder, options, system)


class S3Storage:
    """The objects below one prefix of a bucket. See `Storage` for what each method guarantees.

    Reads and writes are requests of s3fs, so that credentials and endpoint come from where its
    users expect; what they carry, and what an answer means, is decided here.
    """

    def __init__(self, bucket: str, folder: str, options: dict[str, Any], system: Any) -> None:
        self._bucket = bucket
        self._folder = folder
        self._options = options
        self._system = system
        self._probe = ExclusiveProbe()

    @property
    def url(self) -> str:
        return self._name(self._folder)

    def __repr__(self) -> str:
        return f"S3Storage({self.url!r})"

    def __reduce__(self) -> tuple[Callable[..., S3Storage], tuple[str, dict[str, Any]]]:
        return open_s3, (f"{self._bucket}/{self._folder}", self._options)

    def at(self, path: str) -> S3Storage:
        folder = join(self._folder, path, self.url)
        below = S3Storage(self._bucket, folder, self._options, self._system)
        below._probe = self._probe
        return below

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        key = self._key(path)
        if stop is None and start == 0:
            return self._wait(self._get(key))
        if stop is None or stop <= start:
            end = self.size(path)
            stop = end if stop is None else start
        data = bytearray(max(0, stop - start))
        found = self._wait(self._get_ranges(key, start, memoryview(data)))
        return bytes(data[:found])

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        if not buffer.nbytes:
            self.size(path)
            return
        key = self._key(path)
        found = self._wait(self._get_ranges(key, offset, as_bytes(buffer)))
        if found < buffer.nbytes:
            raise CorruptError(
                f"{self._name(key)} is truncated: wanted {buffer.nbytes} bytes at offset "
                f"{offset}, found {found}"
            )

    def size(self, path: str) -> int:
        return int(self._wait(self._head(self._key(path)))["ContentLength"])

    def write(self, path: str, data: bytes | memoryview) -> None:
        self.write_pack(path, memoryview(data))

    def create(self, path: str, data: bytes) -> None:
        self._wait(self._create(self._key(path), data))

    def write_pack(self, path: str, buffer: memoryview) -> None:
        view = as_bytes(buffer)
        key = self._key(path)
        if len(view) <= _PART:
            self._wait(self._call("put_object", key, Body=bytes(view)))
        else:
            self._wait(self._upload(key, view))

    def list(self, path: str = "") -> list[str]:
        prefix = self._prefix(path)
        names: set[str] = set()
        for page in self._wait(self._pages(prefix, Delimiter="/")):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            names.update(key[len(prefix) :].rstrip("/") for key in keys)
        return sorted(name for name in names if name and not is_temporary(name))

    def delete(self, path: str) -> None:
        try:
            self._wait(self._call("delete_object", self._key(path)))
        except FileNotFoundError:
            pass

    def delete_tree(self, path: str) -> None:
        self._wait(self._delete_all(self._prefix(path)))

    def exclusive(self) -> bool:
        return self._probe.ask(self)

    def _name(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}".rstrip("/")

    def _key(self, path: str) -> str:
        return join(self._folder, path, self.url)

    def _prefix(self, path: str) -> str:
        folder = join(self._folder, path, self.url)
        return f"{folder}/" if folder else ""

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on fsspec's I/O thread. If the caller is interrupted, so is the work."""
        future = asyncio.run_coroutine_threadsafe(work, self._system.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _call(self, method: str, key: str = "", **arguments: Any) -> Any:
        if key:
            arguments["Key"] = key
        try:
            # What s3fs's own `call_s3` waits for; its other methods remember listings, or lack options.
            return await self._system._call_s3(method, Bucket=self._bucket, **arguments)
        except Exception as error:
            about = key or arguments.get("Prefix", self._folder)
            raise explain(error, self._name(about)) from error

    async def _head(self, key: str) -> Any:
        try:
            return await self._call("head_object", key)
        except FileNotFoundError:
            # The answer to HEAD does not say what is missing: this one does, if it is the bucket.
            await self._call("list_objects_v2", Prefix=self._folder, MaxKeys=1)
            raise

    async def _get(self, key: str) -> bytes:
        for attempt in range(_ATTEMPTS):
            answer = await self._call("get_object", key)
            try:
                async with answer["Body"] as body:
                    return bytes(await body.read())
            except Exception as error:
                await self._pause(attempt, error, key)
        raise AssertionError

    async def _get_ranges(self, key: str, offset: int, view: memoryview) -> int:
        """Fill `view`, by parallel requests, as far as the object goes; how far that is."""
        starts = range(0, len(view), _RANGE)
        return sum(
            await _gather(
                partial(self._get_range, key, offset + start, view[start : start + _RANGE])
                for start in starts
            )
        )

    async def _get_range(self, key: str, offset: int, view: memoryview) -> int:
        """Fill `view` as far as the object goes; the number of bytes that there were."""
        span = f"bytes={offset}-{offset + len(view) - 1}"
        for attempt in range(_ATTEMPTS):
            try:
                answer = await self._call("get_object", key, Range=span)
            except BeyondEndError:
                return 0
            try:
                return await self._receive(answer, key, view)
            except StorageError:
                raise
            except Exception as error:
                await self._pause(attempt, error, key)
        raise AssertionError

    async def _receive(self, answer: Any, key: str, view: memoryview) -> int:
        """Fill `view` with the body of an answer; the body's length."""
        length, done = int(answer["ContentLength"]), 0
        async with answer["Body"] as body:
            if length > len(view):
                raise StorageError(
                    f"{self._name(key)}: the server answered a request for {len(view)} bytes with "
                    f"{length}: it ignores ranges, which reading a checkpoint needs"
                )
            while done < length:
                data = await body.read(length - done)
                if not data:
                    raise ConnectionError(f"the answer broke off after {done} of {length} bytes")
                view[done : done + len(data)] = data
                done += len(data)
        return done

    async def _pause(self, attempt: int, error: Exception, key: str) -> None:
        """Wait a little longer each time, before the next attempt; raise if that was the last."""
        if attempt == _ATTEMPTS - 1:
            if isinstance(error, StorageError):
                raise error
            raise explain(error, self._name(key)) from error
        await asyncio.sleep(random.uniform(0.5, 1) * 0.1 * 2**attempt)

    async def _create(self, key: str, data: bytes) -> None:
        writer = uuid.uuid4().hex
        for attempt in range(_ATTEMPTS):
            try:
                await self._call("put_object", key, Body=data, IfNoneMatch="*", Metadata={_WRITER: writer})
            except ConflictError as error:
                await self._pause(attempt, error, key)
            except (FileExistsError, OutOfReachError):
                # The answer to a put that succeeded may be lost, and its repetition is refused.
                if await self._wrote(key, writer):
                    return
                raise
            else:
                return

    async def _wrote(self, key: str, writer: str) -> bool:
        """Whether the object there comes from the call that calls itself `writer`."""
        try:
            found = await self._call("head_object", key)
        except FileNotFoundError:
            return False
        return bool(found.get("Metadata", {}).get(_WRITER) == writer)

    async def _upload(self, key: str, view: memoryview) -> None:
        """Upload in parts; without a trace if it fails."""
        size = max(_PART, -(-len(view) // _MAX_PARTS))
        writer = uuid.uuid4().hex
        begun = await self._call("create_multipart_upload", key, Metadata={_WRITER: writer})
        upload = begun["UploadId"]

        async def send(number: int, start: int) -> dict[str, Any]:
            body = bytes(view[start : start + size])
            sent = await self._call("upload_part", key, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            starts = range(0, len(view), size)
            parts = await _gather(partial(send, i, start) for i, start in enumerate(starts, 1))
            await self._call(
                "complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except BaseException as error:
            lost = isinstance(error, FileNotFoundError | OutOfReachError)
            with contextlib.suppress(StorageError):
                if lost and await self._wrote(key, writer):
                    return  # it is complete, but the answer that said so was lost
            with contextlib.suppress(StorageError, FileNotFoundError):
                await self._call("abort_multipart_upload", key, UploadId=upload)
            if isinstance(error, FileNotFoundError):
                raise StorageError(f"{self._name(key)}: the upload vanished: {error}") from error
            raise

    async def _pages(self, prefix: str, **arguments: Any) -> Sequence[Any]:
        pages = []
        token: dict[str, str] = {}
        while True:
            page = await self._call("list_objects_v2", Prefix=prefix, **arguments, **token)
            pages.append(page)
            if not page.get("IsTruncated"):
                return pages
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def _delete_all(self, prefix: str) -> None:
        for page in await self._pages(prefix):
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
            if not keys:
                continue
            answer = await self._call("delete_objects", Delete={"Objects": keys, "Quiet": True})
            for refused in answer.get("Errors", []):
                raise StorageError(
                    f"cannot delete {self._name(refused['Key'])}: {refused.get('Code')} "
                    f"{refused.get('Message')}"
                )


async def _gather(work: Iterable[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """The results, in order, with a bounded number under way; the first failure stops the rest."""
    places = asyncio.Semaphore(_PARALLEL)

    async def take_turn(one: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with places:
            return await one()

    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(take_turn(one)) for one in work]
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in running]
