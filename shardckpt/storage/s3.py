"""Objects in S3 and in the many stores that speak its protocol, through s3fs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import fsspec

from shardckpt.errors import CorruptError, InvalidUrlError, StorageError
from shardckpt.storage import s3_reads, s3_writes
from shardckpt.storage.buffers import as_bytes, blocks, cut
from shardckpt.storage.limits import client_options
from shardckpt.storage.names import is_temporary, join
from shardckpt.storage.probe import ExclusiveProbe
from shardckpt.storage.protocol import Before
from shardckpt.storage.s3_client import CONFIG, S3Client
from shardckpt.storage.s3_errors import RefusedError
from shardckpt.storage.s3_settings import S3Settings

__all__ = ["S3Storage", "open_s3"]

_ONE_ATTEMPT = {"mode": "standard", "total_max_attempts": 1}


def open_s3(
    rest: str, options: dict[str, Any], *, own_connections: bool = False, settings: S3Settings | None = None
) -> S3Storage:
    """Open `s3://rest`. Checks the URL and the options; sends no request.

    Args:
        rest: the bucket, and the folder in it.
        options: arguments of s3fs, and `transfer_deadline` and `transfer_least_rate`.
        own_connections: False shares connections with all storages of the same options.
        settings: of requests; the defaults are for use.

    Raises InvalidUrlError, StorageError.
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
    client = S3Client(system, bucket, options, settings or S3Settings())
    return S3Storage(bucket, folder, options, client)


class S3Storage:
    """The objects below one prefix of a bucket. See `Storage` for what each method guarantees.

    Requests are sent through s3fs, so that credentials and endpoint come from where its users expect.

    Args:
        bucket: its name.
        folder: the prefix, without slashes at its ends.
        options: as given by the user, for copies of this storage.
        client: sends the requests; shared by all folders of the bucket.
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
        opened = partial(open_s3, settings=self._client.settings)
        return opened, (f"{self._bucket}/{self._folder}", self._options)

    def at(self, path: str) -> S3Storage:
        folder = join(self._folder, path, self.url)
        below = S3Storage(self._bucket, folder, self._options, self._client)
        below._probe = self._probe
        return below

    def fresh(self) -> S3Storage:
        return open_s3(
            f"{self._bucket}/{self._folder}",
            self._options,
            own_connections=True,
            settings=self._client.settings,
        )

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        key = self._key(path)
        if stop is None and start == 0:
            return self._client.wait(s3_reads.get(self._client, key))
        if stop is None or stop <= start:
            end = self.size(path)
            stop = end if stop is None else start
        data = bytearray(max(0, stop - start))
        found = self._client.wait(s3_reads.fill(self._client, key, start, memoryview(data)))
        return bytes(data[:found])

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        if not buffer.nbytes:
            self.size(path)
            return
        key = self._key(path)
        found = self._client.wait(s3_reads.fill(self._client, key, offset, as_bytes(buffer)))
        if found < buffer.nbytes:
            raise CorruptError(
                f"{self._client.name(key)} is truncated: wanted {buffer.nbytes} bytes at offset "
                f"{offset}, found {found}"
            )

    def size(self, path: str) -> int:
        return int(self._client.wait(self._head(self._key(path)))["ContentLength"])

    def write(self, path: str, data: bytes | memoryview) -> None:
        self.write_pack(path, memoryview(data))

    def create(self, path: str, data: bytes) -> None:
        self._client.wait(s3_writes.create(self._client, self._key(path), data))

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        view = as_bytes(buffer)
        parts = cut(view, self._client.settings.part_size(len(view)), before)
        s3_writes.put(self._client, self._key(path), len(view), parts)

    def write_pieces(self, path: str, size: int, pieces: Iterable[memoryview]) -> None:
        part = self._client.settings.part_size(size)
        parts = blocks(pieces, lambda: memoryview(bytearray(part)))
        s3_writes.put(self._client, self._key(path), size, parts)

    def list(self, path: str = "") -> list[str]:
        prefix = self._prefix(path)
        names: set[str] = set()
        for page in self._client.wait(self._pages(prefix, Delimiter="/")):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            names.update(key[len(prefix) :].rstrip("/") for key in keys)
        return sorted(name for name in names if name and not is_temporary(name))

    def sizes(self, path: str = "") -> dict[str, int]:
        prefix = self._prefix(path)
        found = {
            entry["Key"][len(prefix) :]: int(entry["Size"])
            for page in self._client.wait(self._pages(prefix))
            for entry in page.get("Contents", [])
        }
        return {
            name: size for name, size in found.items() if name and not is_temporary(name.rpartition("/")[2])
        }

    def delete(self, path: str) -> None:
        try:
            self._client.wait(self._client.request("delete_object", self._key(path)))
        except FileNotFoundError:
            pass

    def delete_tree(self, path: str) -> None:
        self._client.wait(self._delete_all(self._prefix(path)))

    def exclusive(self) -> bool:
        return self._probe.ask(self)

    def _key(self, path: str) -> str:
        return join(self._folder, path, self.url)

    def _prefix(self, path: str) -> str:
        folder = join(self._folder, path, self.url)
        return f"{folder}/" if folder else ""

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
            await s3_reads.fill(self._client, key, 0, memoryview(bytearray(1)))
            return await request("head_object", key)

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
