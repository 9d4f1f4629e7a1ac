"""Objects in S3 and in the many stores that speak its protocol, through s3fs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import fsspec

from shardckpt.errors import CorruptError, OutOfReachError, StorageError
from shardckpt.storage.buffers import as_bytes
from shardckpt.storage.names import is_temporary, join, without_temporary
from shardckpt.storage.probe import ExclusiveProbe
from shardckpt.storage.protocol import Before
from shardckpt.storage.s3_body import Body
from shardckpt.storage.s3_errors import BeyondEndError, TransientError, UnreachableError, explain

__all__ = ["S3Storage", "open_s3"]

_log = logging.getLogger("shardckpt")

T = TypeVar("T")

_PART = 16 << 20  # of an upload: at 10,000 parts, larger ones for more than 156 GiB
_MAX_PARTS = 10_000
_RANGE = 8 << 20  # of one request, when a large range is read
_PARALLEL = 8  # requests of one read or upload under way at a time; bounds its memory
_ATTEMPTS = 8  # of a request, unless the options say otherwise
_SILENCE = 2.0  # seconds of trouble that nothing is said about
_FIRST_PAUSE = 0.1  # seconds, at most; each later one is twice as long
_WRITER = "shardckpt-writer"  # metadata of an object: which call wrote it
_CONFIG = {"max_pool_connections": 32, "connect_timeout": 5, "read_timeout": 30}
_ONE_ATTEMPT = {"mode": "standard", "total_max_attempts": 1}


def open_s3(rest: str, options: dict[str, Any]) -> S3Storage:
    """The storage at `s3://rest`. Touches nothing but the options."""
    bucket, _, folder = rest.partition("/")
    if not bucket:
        raise StorageError(f"s3://{rest}: the bucket is missing: s3://bucket/folder")
    folder = join("", folder.strip("/"), f"s3://{bucket}")
    # Repetition is in one place, here: on top of botocore's and s3fs's own, attempts would multiply.
    config = {**_CONFIG, **(options.get("config_kwargs") or {}), "retries": _ONE_ATTEMPT}
    try:
        system = fsspec.filesystem(
            "s3", **{**options, "use_listings_cache": False, "config_kwargs": config}
        )
    except Exception as error:
        raise StorageError(f"s3://{rest}: cannot be opened: {error}") from error
    system.retries = 1
    return S3Storage(bucket, folder, options, system)


class _Outage:
    """Says once that a server does not answer; again only after it has. Shared by all folders of a storage."""

    is_told = False

    def tell(self, error: TransientError, seconds: float) -> None:
        """Say what is being waited out, and for how long at most."""
        if not self.is_told:
            self.is_told = True
            what = error.summary if isinstance(error, UnreachableError) else str(error)
            _log.warning("%s, trying again for up to %.0f s", what, max(1.0, seconds))


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
        self._attempts = _attempts(options)
        self._probe = ExclusiveProbe()
        self._outage = _Outage()

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
        below._probe, below._outage = self._probe, self._outage
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

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        view = as_bytes(buffer)
        key = self._key(path)
        if len(view) > _PART:
            self._wait(self._upload(key, view, before))
            return
        if before is not None and view:
            before(0, len(view))
        self._wait(self._request("put_object", key, Body=view))

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
            self._wait(self._request("delete_object", self._key(path)))
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
        except TransientError as error:  # nobody outside knows these two
            raise OutOfReachError(str(error)) from error
        except BeyondEndError as error:
            raise StorageError(str(error)) from error
        except BaseException:
            future.cancel()
            raise

    async def _request(self, method: str, key: str = "", **arguments: Any) -> Any:
        """The answer to one of the client's methods, tried until the server gives one."""
        return await self._repeat(partial(self._call, method, key, **arguments))

    async def _repeat(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `work`, repeated after ever longer pauses while its failure may pass."""
        started = time.monotonic()
        was_sent = False
        for attempt in itertools.count(1):
            try:
                result = await work()
            except TransientError as error:
                was_sent = was_sent or not isinstance(error, UnreachableError)
                if attempt >= self._attempts:
                    raise _last(error, attempt, was_sent=was_sent) from error
                if time.monotonic() > started + _SILENCE:
                    self._outage.tell(
                        error, _FIRST_PAUSE * (2 ** (self._attempts - 1) - 2 ** (attempt - 1))
                    )
            else:
                self._outage.is_told = False
                return result
            await asyncio.sleep(random.uniform(0.5, 1) * _FIRST_PAUSE * 2 ** (attempt - 1))
        raise AssertionError

    async def _call(self, method: str, key: str = "", **arguments: Any) -> Any:
        """One request."""
        if key:
            arguments["Key"] = key
        if "Body" in arguments:  # its position moves: every attempt needs one of its own
            arguments["Body"] = Body(arguments["Body"])
        with self._explained(key or arguments.get("Prefix", self._folder)):
            # As s3fs's own `call_s3` does; its other methods remember listings, or lack options.
            await self._system.set_session()
            client = await self._system.get_s3(self._bucket)
            client.meta.events.register("before-sign.s3", _expect_nothing, unique_id="shardckpt")
            return await self._system._call_s3(method, Bucket=self._bucket, **arguments)

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Errors about `key`, as this library's or the storage's contract's."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise explain(error, self._name(without_temporary(key))) from error

    async def _head(self, key: str) -> Any:
        try:
            return await self._request("head_object", key)
        except FileNotFoundError:
            # The answer to HEAD does not say what is missing: this one does, if it is the bucket.
            await self._request("list_objects_v2", Prefix=self._folder, MaxKeys=1)
            raise

    async def _get(self, key: str) -> bytes:
        async def get() -> bytes:
            answer = await self._call("get_object", key)
            with self._explained(key):
                async with answer["Body"] as body:
                    return bytes(await body.read())

        return await self._repeat(get)

    async def _get_ranges(self, key: str, offset: int, view: memoryview) -> int:
        """Fill `view`, by parallel requests, as far as the object goes; how far that is."""
        starts = range(0, len(view), _RANGE)
        pieces = (partial(self._get_range, key, offset + s, view[s : s + _RANGE]) for s in starts)
        return sum(await _gather(pieces, _PARALLEL))

    async def _get_range(self, key: str, offset: int, view: memoryview) -> int:
        """Fill `view` as far as the object goes; the number of bytes that there were."""
        span = f"bytes={offset}-{offset + len(view) - 1}"

        async def get() -> int:
            answer = await self._call("get_object", key, Range=span)
            with self._explained(key):
                return await self._receive(answer, key, view)

        try:
            return await self._repeat(get)
        except BeyondEndError:
            return 0

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

    async def _create(self, key: str, data: bytes) -> None:
        writer = uuid.uuid4().hex
        body = memoryview(data)
        try:
            await self._request("put_object", key, Body=body, IfNoneMatch="*", Metadata={_WRITER: writer})
        except UnreachableError:
            raise
        except (FileExistsError, TransientError):
            # The answer to a put that succeeded may be lost, and its repetition is refused.
            if not await self._wrote(key, writer):
                raise

    async def _wrote(self, key: str, writer: str) -> bool:
        """Whether the object there comes from the call that calls itself `writer`."""
        try:
            found = await self._request("head_object", key)
        except FileNotFoundError:
            return False
        return bool(found.get("Metadata", {}).get(_WRITER) == writer)

    async def _upload(self, key: str, view: memoryview, before: Before | None) -> None:
        """Upload in parts; without a trace if it fails."""
        writer = uuid.uuid4().hex
        begun = await self._request("create_multipart_upload", key, Metadata={_WRITER: writer})
        upload = begun["UploadId"]
        try:
            parts = await _gather(self._parts(key, upload, view, before), _PARALLEL)
            await self._request(
                "complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except BaseException as error:
            lost = isinstance(error, FileNotFoundError | TransientError)
            with contextlib.suppress(StorageError):
                if lost and await self._wrote(key, writer):
                    return  # it is complete, but the answer that said so was lost
            with contextlib.suppress(StorageError, FileNotFoundError):
                await self._request("abort_multipart_upload", key, UploadId=upload)
            if isinstance(error, FileNotFoundError):
                raise StorageError(f"{self._name(key)}: the upload vanished: {error}") from error
            raise

    def _parts(
        self, key: str, upload: str, view: memoryview, before: Before | None
    ) -> Iterator[Callable[[], Coroutine[Any, Any, dict[str, Any]]]]:
        """The requests that send the parts of `view`; the next one is due once it can be sent."""
        size = max(_PART, -(-len(view) // _MAX_PARTS))

        async def send(number: int, piece: memoryview) -> dict[str, Any]:
            sent = await self._request("upload_part", key, UploadId=upload, PartNumber=number, Body=piece)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        for number, start in enumerate(range(0, len(view), size), 1):
            piece = view[start : start + size]
            if before is not None:
                before(start, start + len(piece))
            yield partial(send, number, piece)

    async def _pages(self, prefix: str, **arguments: Any) -> Sequence[Any]:
        pages = []
        token: dict[str, str] = {}
        while True:
            page = await self._request("list_objects_v2", Prefix=prefix, **arguments, **token)
            pages.append(page)
            if not page.get("IsTruncated"):
                return pages
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def _delete_all(self, prefix: str) -> None:
        for page in await self._pages(prefix):
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
            if not keys:
                continue
            answer = await self._request("delete_objects", Delete={"Objects": keys, "Quiet": True})
            for refused in answer.get("Errors", []):
                raise StorageError(
                    f"cannot delete {self._name(refused['Key'])}: {refused.get('Code')} "
                    f"{refused.get('Message')}"
                )


def _last(error: TransientError, attempts: int, *, was_sent: bool) -> TransientError:
    """The last error of a request that is given up."""
    text = f"{error}. Gave up after {attempts} attempts"
    if isinstance(error, UnreachableError) and not was_sent:
        return UnreachableError(text, error.summary)
    return TransientError(text)


async def _gather(work: Iterable[Callable[[], Coroutine[Any, Any, T]]], parallel: int) -> list[T]:
    """The results, in order, with at most `parallel` under way; the first failure stops the rest.

    The next piece of work is asked for when there is a place for it.
    """
    places = asyncio.Semaphore(parallel - 1)
    running: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            for one in work:
                task = tasks.create_task(one())
                task.add_done_callback(lambda _: places.release())
                running.append(task)
                await places.acquire()
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in running]


def _attempts(options: Mapping[str, Any]) -> int:
    """How often a request is tried: as botocore's `retries` has it, which may be in the options."""
    retries = (options.get("config_kwargs") or {}).get("retries") or {}
    if "max_attempts" in retries:  # does not count the first
        return int(retries["max_attempts"]) + 1
    return int(retries.get("total_max_attempts", _ATTEMPTS))


def _expect_nothing(request: Any, **_: Any) -> None:
    """Send bodies at once: not every server tells that it is ready for one, and aiohttp waits for that."""
    del request.headers["Expect"]  # no error if there is none
