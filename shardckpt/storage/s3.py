"""Objects in S3 and in the many stores that speak its protocol, through s3fs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import fsspec

from shardckpt.errors import CorruptError, CredentialsError, InvalidUrlError, OutOfReachError, StorageError
from shardckpt.storage.buffers import as_bytes, blocks, cut
from shardckpt.storage.limits import client_options
from shardckpt.storage.names import is_temporary, join
from shardckpt.storage.probe import ExclusiveProbe
from shardckpt.storage.protocol import Before, check_whole
from shardckpt.storage.s3_client import CONFIG, Reach, S3Client
from shardckpt.storage.s3_errors import BeyondEndError, RefusedError, TransientError, UnreachableError
from shardckpt.storage.work import Work, cleanup, in_loop, stop

__all__ = ["S3Storage", "open_s3"]

T = TypeVar("T")
_Works = list[Work[Any]]

_PART = 16 << 20  # of an upload: at 10,000 parts, larger ones for more than 156 GiB
_MAX_PARTS = 10_000
_RANGE = 8 << 20  # of one request, when a large range is read
_PARALLEL = 8  # requests of one read or upload under way at a time; bounds its memory
_PIECE = 1 << 20  # of an answer of unknown length
_WRITER = "shardckpt-writer"  # metadata of an object: which call wrote it
_ONE_ATTEMPT = {"mode": "standard", "total_max_attempts": 1}


def open_s3(rest: str, options: dict[str, Any], *, own_connections: bool = False) -> S3Storage:
    """The storage at `s3://rest`. Touches nothing but the options.

    Its connections are shared with all storages of the same options, unless they are to be its own.
    """
    bucket, _, folder = rest.partition("/")
    if not bucket:
        raise InvalidUrlError(
            f"s3://{rest}: the bucket is missing: s3://bucket/folder"
            + (f"; did you mean s3://{folder.lstrip('/')}?" if folder.strip("/") else "")
        )
    folder = join("", folder.strip("/"), f"s3://{bucket}")
    # Repetition is in one place, the S3Client: on top of botocore's and s3fs's own, attempts would multiply.
    config = {**CONFIG, **(options.get("config_kwargs") or {}), "retries": _ONE_ATTEMPT}
    arguments = {
        **client_options(options),
        "use_listings_cache": False,
        "config_kwargs": config,
        "skip_instance_cache": own_connections,
    }
    try:
        system = fsspec.filesystem("s3", **arguments)
    except Exception as error:
        raise StorageError(f"s3://{rest}: cannot be opened: {error}") from error
    system.retries = 1
    return S3Storage(bucket, folder, options, S3Client(system, bucket, options))


class S3Storage:
    """The objects below one prefix of a bucket. See `Storage` for what each method guarantees.

    Reads and writes are requests of s3fs, so that credentials and endpoint come from where its
    users expect; what they carry, and what an answer means, is decided here.
    """

    def __init__(self, bucket: str, folder: str, options: dict[str, Any], client: S3Client) -> None:
        self._bucket = bucket
        self._folder = folder
        self._options = options
        self._client = client
        self._probe = ExclusiveProbe()

    @property
    def url(self) -> str:
        return self._client.name(self._folder)

    def __repr__(self) -> str:
        return f"S3Storage({self.url!r})"

    def __reduce__(self) -> tuple[Callable[..., S3Storage], tuple[str, dict[str, Any]]]:
        return open_s3, (f"{self._bucket}/{self._folder}", self._options)

    def at(self, path: str) -> S3Storage:
        folder = join(self._folder, path, self.url)
        below = S3Storage(self._bucket, folder, self._options, self._client)
        below._probe = self._probe
        return below

    def fresh(self) -> S3Storage:
        return open_s3(f"{self._bucket}/{self._folder}", self._options, own_connections=True)

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
                f"{self._client.name(key)} is truncated: wanted {buffer.nbytes} bytes at offset "
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
        self._put(self._key(path), len(view), cut(view, _part_size(len(view)), before))

    def write_pieces(self, path: str, size: int, pieces: Iterable[memoryview]) -> None:
        part = _part_size(size)
        self._put(self._key(path), size, blocks(pieces, lambda: memoryview(bytearray(part))))

    def list(self, path: str = "") -> list[str]:
        prefix = self._prefix(path)
        names: set[str] = set()
        for page in self._wait(self._pages(prefix, Delimiter="/")):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            names.update(key[len(prefix) :].rstrip("/") for key in keys)
        return sorted(name for name in names if name and not is_temporary(name))

    def sizes(self, path: str = "") -> dict[str, int]:
        prefix = self._prefix(path)
        found = {
            entry["Key"][len(prefix) :]: int(entry["Size"])
            for page in self._wait(self._pages(prefix))
            for entry in page.get("Contents", [])
        }
        return {
            name: size for name, size in found.items() if name and not is_temporary(name.rpartition("/")[2])
        }

    def delete(self, path: str) -> None:
        try:
            self._wait(self._client.request("delete_object", self._key(path)))
        except FileNotFoundError:
            pass

    def delete_tree(self, path: str) -> None:
        self._wait(self._delete_all(self._prefix(path)))

    def exclusive(self) -> bool:
        return self._probe.ask(self)

    def _key(self, path: str) -> str:
        return join(self._folder, path, self.url)

    def _prefix(self, path: str) -> str:
        folder = join(self._folder, path, self.url)
        return f"{folder}/" if folder else ""

    def _start(self, work: Coroutine[Any, Any, T]) -> Work[T]:
        """Run `work` on fsspec's I/O thread."""
        return in_loop(work, self._client.system.loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, run on fsspec's I/O thread. If the caller is interrupted, so is the work."""
        return _outcome(self._start(work))

    async def _head(self, key: str) -> Any:
        request = self._client.request
        try:
            return await request("head_object", key)
        except FileNotFoundError:
            # The answer to HEAD does not say what is missing: this one does, if it is the bucket.
            await request("list_objects_v2", Prefix=self._folder, MaxKeys=1)
            raise
        except RefusedError:
            # Nor does it say why it refuses, which may be credentials that have expired.
            await self._get_range(key, 0, memoryview(bytearray(1)))
            return await request("head_object", key)

    async def _get(self, key: str) -> bytes:
        async def get(reach: Reach) -> bytes:
            answer = await self._client.call("get_object", key, reach)
            check_whole(self._client.name(key), int(answer.get("ContentLength", 0)))
            data = bytearray()
            with self._client.explained(key):
                async with answer["Body"] as body:
                    while piece := await body.read(_PIECE):
                        data += piece
                        check_whole(self._client.name(key), len(data))
                        reach(len(data))
            return bytes(data)

        return await self._client.repeat(key, get)

    async def _get_ranges(self, key: str, offset: int, view: memoryview) -> int:
        """Fill `view`, by parallel requests, as far as the object goes; how far that is."""
        starts = range(0, len(view), _RANGE)
        pieces = (partial(self._get_range, key, offset + s, view[s : s + _RANGE]) for s in starts)
        return sum(await _gather(pieces, _PARALLEL))

    async def _get_range(self, key: str, offset: int, view: memoryview) -> int:
        """Fill `view` as far as the object goes; the number of bytes that there were."""
        span = f"bytes={offset}-{offset + len(view) - 1}"

        async def get(reach: Reach) -> int:
            answer = await self._client.call("get_object", key, reach, Range=span)
            with self._client.explained(key):
                return await self._receive(answer, key, view, reach)

        try:
            return await self._client.repeat(key, get)
        except BeyondEndError:
            return 0

    async def _receive(self, answer: Any, key: str, view: memoryview, reach: Reach) -> int:
        """Fill `view` with the body of an answer; the body's length.

        A server need not tell the length before, where it sends the body in chunks.
        """
        done, is_told = 0, "ContentLength" in answer
        length = int(answer["ContentLength"]) if is_told else len(view)
        async with answer["Body"] as body:
            if length > len(view) or not (is_told or "ContentRange" in answer):
                raise StorageError(
                    f"{self._client.name(key)}: the server answered a request for {len(view)} bytes with "
                    f"{length if is_told else 'all'}: it ignores ranges, which reading a checkpoint needs"
                )
            while done < length:
                data = await body.read(length - done)
                if not data and not is_told:
                    break
                if not data:
                    raise ConnectionError(f"the answer broke off after {done} of {length} bytes")
                view[done : done + len(data)] = data
                done += len(data)
                reach(done)
        return done

    async def _create(self, key: str, data: bytes) -> None:
        writer = uuid.uuid4().hex
        body = memoryview(data)
        try:
            await self._client.request(
                "put_object", key, Body=body, IfNoneMatch="*", Metadata={_WRITER: writer}
            )
        except UnreachableError:
            raise
        except (FileExistsError, TransientError):
            # The answer to a put that succeeded may be lost, and its repetition is refused.
            if not await self._wrote(key, writer):
                raise

    async def _wrote(self, key: str, writer: str) -> bool:
        """Whether the object there comes from the call that calls itself `writer`."""
        try:
            found = await self._client.request("head_object", key)
        except FileNotFoundError:
            return False
        return bool(found.get("Metadata", {}).get(_WRITER) == writer)

    def _put(self, key: str, size: int, parts: Iterator[memoryview]) -> None:
        """Put an object that consists of these parts, in a multipart upload if there can be more than one."""
        if size > _PART:
            self._upload(key, parts)
            return
        body = next(parts, memoryview(b""))
        next(parts, None)  # by which whoever makes them sees the end
        self._wait(self._client.request("put_object", key, Body=body))

    def _upload(self, key: str, parts: Iterable[memoryview]) -> None:
        """Upload in parts, each asked for when there is a place for it; without a trace if that fails."""
        writer = uuid.uuid4().hex
        request = self._client.request
        beginning = self._start(request("create_multipart_upload", key, Metadata={_WRITER: writer}))
        sending: _Works = []
        is_ending = is_complete = False
        try:
            upload = _outcome(beginning, stop_it=False)["UploadId"]
            sent = self._send_parts(key, upload, parts, sending)
            is_ending = True
            ended = request(
                "complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": sent}
            )
            self._wait(ended)
        except BaseException as error:
            stop(sending)
            name = self._client.name(key)
            if is_ending and isinstance(error, FileNotFoundError | StorageError):
                with contextlib.suppress(StorageError):  # it may be complete, and only the answer be lost
                    is_complete = self._wait(self._wrote(key, writer))
            if is_complete:
                return
            if not isinstance(error, Exception) or not _has_failed(beginning):
                with cleanup(error, f"parts of an unfinished upload to {name} may be left in the bucket"):
                    upload = _outcome(beginning)["UploadId"]
                    self._wait(request("abort_multipart_upload", key, UploadId=upload))
            if isinstance(error, FileNotFoundError):
                raise StorageError(f"{name}: the upload vanished: {error}") from error
            raise

    def _send_parts(
        self, key: str, upload: str, parts: Iterable[memoryview], sending: _Works
    ) -> Sequence[Mapping[str, Any]]:
        """Send the parts, some at a time; what completes the upload. Adds each request to `sending`."""
        places = threading.Semaphore(_PARALLEL)
        failed: _Works = []

        def send(number: int, piece: memoryview) -> Work[Any]:
            request = self._client.request(
                "upload_part", key, UploadId=upload, PartNumber=number, Body=piece
            )
            work = self._start(request)

            def ended(_: object) -> None:
                if _has_failed(work):
                    failed.append(work)
                places.release()

            work.future.add_done_callback(ended)
            return work

        places.acquire()
        for number, piece in enumerate(parts, 1):
            sending.append(send(number, piece))
            places.acquire()  # before the next part is made
            if failed:
                _outcome(failed[0])
        answers = [_outcome(work) for work in sending]
        return [{"PartNumber": number, "ETag": answer["ETag"]} for number, answer in enumerate(answers, 1)]

    async def _pages(self, prefix: str, **arguments: Any) -> Sequence[Any]:
        pages = []
        token: dict[str, str] = {}
        while True:
            page = await self._client.request("list_objects_v2", Prefix=prefix, **arguments, **token)
            pages.append(page)
            if not page.get("IsTruncated"):
                return pages
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def _delete_all(self, prefix: str) -> None:
        for page in await self._pages(prefix):
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
            if not keys:
                continue
            answer = await self._client.request(
                "delete_objects", about=prefix, Delete={"Objects": keys, "Quiet": True}
            )
            for refused in answer.get("Errors", []):
                raise StorageError(
                    f"cannot delete {self._client.name(refused['Key'])}: {refused.get('Code')} "
                    f"{refused.get('Message')}"
                )


def _outcome(work: Work[T], *, stop_it: bool = True) -> T:
    """The result of a request, with its errors as the contract has them.

    If this thread is interrupted, the request is stopped or goes on.
    """
    try:
        return work.result(stop_it=stop_it)
    except TransientError as error:  # nobody outside knows these
        raise OutOfReachError(str(error)) from error
    except BeyondEndError as error:
        raise StorageError(str(error)) from error
    except RefusedError as error:
        raise CredentialsError(str(error)) from error


def _has_failed(work: Work[Any]) -> bool:
    return work.future.done() and (work.future.cancelled() or work.future.exception() is not None)


def _part_size(nbytes: int) -> int:
    return max(_PART, -(-nbytes // _MAX_PARTS))


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
