"""Writing objects to S3: whole, in parts, or only if there is none."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from shardckpt.errors import StorageError
from shardckpt.storage.s3_checksums import CHECKSUM
from shardckpt.storage.s3_client import S3Client, outcome
from shardckpt.storage.s3_errors import TransientError, UnreachableError
from shardckpt.storage.work import Work, cleanup, stop

__all__ = ["create", "put"]

_WRITER = "shardckpt-writer"  # metadata of an object: the id of the call that wrote it
_OF_PART = ("ETag", CHECKSUM)  # what completes an upload, of the answer to each part
_Works = list[Work[Any]]


async def create(client: S3Client, key: str, data: bytes) -> None:
    """Put an object only if there is none. Raises FileExistsError if there is one; StorageError."""
    writer = uuid.uuid4().hex
    body, metadata = memoryview(data), {_WRITER: writer}
    try:
        await client.request("put_object", key, Body=body, IfNoneMatch="*", Metadata=metadata)
    except UnreachableError:
        raise
    except (FileExistsError, TransientError):
        # The answer to a put that succeeded may have been lost, and its repetition is refused.
        if not await _wrote(client, key, writer):
            raise


def put(client: S3Client, key: str, size: int, parts: Iterator[memoryview]) -> None:
    """Put an object that consists of `parts`, in a multipart upload if there can be more than one.

    Args:
        client: of the bucket.
        key: the object's.
        size: its bytes in all.
        parts: each of `S3Settings.part_size(size)` bytes, the last one shorter. Asked for in this thread, each
            when there is a place for it among the requests under way.

    Raises StorageError, and what `parts` raises; an upload that has begun is aborted then.
    """
    if size > client.settings.part_bytes:
        _upload(client, key, parts)
        return
    body = next(parts, memoryview(b""))
    next(parts, None)  # runs the generator to its end
    client.wait(client.request("put_object", key, Body=body))


async def _wrote(client: S3Client, key: str, writer: str) -> bool:
    """True if the object there was written by the call with the id `writer`."""
    try:
        found = await client.request("head_object", key)
    except FileNotFoundError:
        return False
    return bool(found.get("Metadata", {}).get(_WRITER) == writer)


def _upload(client: S3Client, key: str, parts: Iterable[memoryview]) -> None:
    """Upload in parts. After a failure the upload is aborted, so that no part of it stays in the bucket."""
    writer = uuid.uuid4().hex
    beginning = client.start(client.request("create_multipart_upload", key, Metadata={_WRITER: writer}))
    sending: _Works = []
    is_ending = is_complete = False
    try:
        upload = outcome(beginning, stop_it=False)["UploadId"]
        sent = _send_parts(client, key, upload, parts, sending)
        is_ending = True
        client.wait(
            client.request(
                "complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": sent}
            )
        )
    except BaseException as error:
        stop(sending)
        name = client.name(key)
        if is_ending and isinstance(error, FileNotFoundError | StorageError):
            with contextlib.suppress(StorageError):  # it may be complete, and only the answer lost
                is_complete = client.wait(_wrote(client, key, writer))
        if is_complete:
            return
        if not isinstance(error, Exception) or not _has_failed(beginning):
            with cleanup(error, f"parts of an unfinished upload to {name} may be left in the bucket"):
                upload = outcome(beginning)["UploadId"]
                client.wait(client.request("abort_multipart_upload", key, UploadId=upload))
        if isinstance(error, FileNotFoundError):
            raise StorageError(f"{name}: the upload vanished: {error}") from error
        raise


def _send_parts(
    client: S3Client, key: str, upload: str, parts: Iterable[memoryview], sending: _Works
) -> Sequence[Mapping[str, Any]]:
    """Send the parts, some at a time. Returns the list that completes the upload; adds requests to `sending`."""
    places = threading.Semaphore(client.settings.parallel)
    failed: _Works = []

    def send(number: int, piece: memoryview) -> Work[Any]:
        work = client.start(
            client.request("upload_part", key, UploadId=upload, PartNumber=number, Body=piece)
        )

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
            outcome(failed[0])
    answers = [outcome(work) for work in sending]
    return [
        {"PartNumber": number, **{name: answer[name] for name in _OF_PART if name in answer}}
        for number, answer in enumerate(answers, 1)
    ]


def _has_failed(work: Work[Any]) -> bool:
    return work.future.done() and (work.future.cancelled() or work.future.exception() is not None)
