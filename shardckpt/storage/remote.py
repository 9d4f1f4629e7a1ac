"""Storage behind fsspec: which class a URL gets, and the one for any protocol but S3."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import fsspec

from shardckpt.errors import (
    CorruptError,
    CredentialsError,
    OutOfReachError,
    StorageError,
    StorageFullError,
)
from shardckpt.storage.buffers import as_bytes
from shardckpt.storage.names import is_temporary, join, without_temporary
from shardckpt.storage.probe import ExclusiveProbe
from shardckpt.storage.protocol import Before
from shardckpt.storage.s3 import S3Storage, open_s3

__all__ = ["FsspecStorage", "open_remote"]

# Memory file systems check and write in two steps; all of them in this process share one store.
_CREATING = threading.Lock()


def open_remote(protocol: str, rest: str, options: dict[str, Any]) -> FsspecStorage | S3Storage:
    """The storage at `protocol://rest`. Touches nothing but the options."""
    if protocol in ("s3", "s3a"):
        return open_s3(rest, options)
    if "::" in protocol:
        raise StorageError(
            f"{protocol}://{rest}: chained URLs are refused, since a cache between the library and "
            "the storage breaks its guarantees. Give the last URL of the chain"
        )
    try:
        system = fsspec.filesystem(protocol, **options)
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise StorageError(
            f"{protocol}://{rest}: unknown protocol {protocol!r}. A path on this machine needs "
            f"none; known are {known}"
        ) from error
    except ImportError as error:
        raise StorageError(f"{protocol}://{rest}: a package is missing: {error}") from error
    except Exception as error:
        raise StorageError(f"{protocol}://{rest}: cannot be opened: {error}") from error
    return FsspecStorage(protocol, join("", rest.strip("/"), f"{protocol}:/"), options, system)


class FsspecStorage:
    """A folder of any fsspec file system. See `Storage` for what each method guarantees.

    `create` is the file system's own `mode="create"`, and a single write is as atomic and durable
    as it makes it: object stores are both.
    """

    def __init__(self, protocol: str, folder: str, options: dict[str, Any], system: Any) -> None:
        self._protocol = protocol
        self._folder = folder
        self._options = options
        self._system = system
        self._probe = ExclusiveProbe()

    @property
    def url(self) -> str:
        return f"{self._protocol}://{self._folder}"

    def __repr__(self) -> str:
        return f"FsspecStorage({self.url!r})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str, dict[str, Any]]]:
        return open_remote, (self._protocol, self._folder, self._options)

    def at(self, path: str) -> FsspecStorage:
        below = FsspecStorage(
            self._protocol, join(self._folder, path, self.url), self._options, self._system
        )
        below._probe = self._probe
        return below

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            self.size(path)
            return b""
        return bytes(self._do("read", path, self._system.cat_file, start=start, end=stop))

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        data = self.read(path, offset, offset + buffer.nbytes)
        if len(data) != buffer.nbytes:
            raise CorruptError(
                f"{self._name(path)} is truncated: wanted {buffer.nbytes} bytes at offset "
                f"{offset}, found {len(data)}"
            )
        as_bytes(buffer)[:] = data

    def size(self, path: str) -> int:
        self._system.invalidate_cache()
        info = self._do("read", path, self._system.info)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "No such file (there is a folder)", self._name(path))
        return int(info["size"])

    def write(self, path: str, data: bytes | memoryview) -> None:
        self._put("write", path, bytes(data), "overwrite")

    def create(self, path: str, data: bytes) -> None:
        with _CREATING:
            self._put("create", path, data, "create")

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        if before is not None and buffer.nbytes:
            before(0, buffer.nbytes)
        self.write(path, buffer)

    def list(self, path: str = "") -> list[str]:
        self._system.invalidate_cache()
        try:
            entries = self._do("read", path, self._system.ls, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}
        if len(entries) == 1 and self._is_file(path):
            return []
        return sorted(name for name in names if not is_temporary(name))

    def delete(self, path: str) -> None:
        try:
            self._do("delete", path, self._system.rm_file)
        except FileNotFoundError:
            pass

    def delete_tree(self, path: str) -> None:
        self._system.invalidate_cache()
        try:
            found = self._do("delete", path, self._system.find, withdirs=True, detail=True)
        except FileNotFoundError:
            return
        for name in [name for name, info in found.items() if info["type"] == "file"]:
            try:
                self._do("delete", path, lambda _, name=name: self._system.rm_file(name))
            except FileNotFoundError:
                pass
        folders = [name for name, info in found.items() if info["type"] != "file"]
        for folder in [*sorted(folders, reverse=True), self._name(path)]:
            try:
                self._system.rmdir(folder)
            except Exception:
                continue  # in object stores a folder is gone with its last file

    def exclusive(self) -> bool:
        return self._probe.ask(self)

    def _name(self, path: str) -> str:
        return f"{self._protocol}://{join(self._folder, path, self.url)}"

    def _is_file(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def _put(self, verb: str, path: str, data: bytes, mode: str) -> None:
        try:
            self._do(verb, path, self._system.pipe_file, data, mode=mode)
        except FileNotFoundError:
            parent = self._name(path).rpartition("/")[0]
            self._do(verb, path, lambda _: self._system.makedirs(parent, exist_ok=True))
            self._do(verb, path, self._system.pipe_file, data, mode=mode)

    def _do(self, verb: str, path: str, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Call a method of the file system on a path, and explain what it raises."""
        name = self._name(path)
        try:
            return call(name, *args, **kw)
        except Exception as error:
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
            if isinstance(error, FileExistsError) and verb == "create":
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from error
            text = f"cannot {verb} {without_temporary(name)}: {error or type(error).__name__}"
            if isinstance(error, PermissionError):
                raise CredentialsError(text) from error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(text) from error
            if isinstance(error, ConnectionError | TimeoutError):
                raise OutOfReachError(text) from error
            raise StorageError(text) from error
