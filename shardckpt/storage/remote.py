"""Storage behind fsspec, for any protocol but S3."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import fsspec

from shardckpt.errors import (
    CorruptError,
    CredentialsError,
    OutOfReachError,
    StorageError,
    StorageFullError,
)
from shardckpt.storage.buffers import as_bytes, cut
from shardckpt.storage.limits import Limits, client_options
from shardckpt.storage.names import is_temporary, join, without_temporary
from shardckpt.storage.probe import ExclusiveProbe
from shardckpt.storage.protocol import Before
from shardckpt.storage.work import cleanup, in_thread

__all__ = ["FsspecStorage", "open_fsspec"]

T = TypeVar("T")

_PIECE = 16 << 20  # bytes of a large file that are read or written at a time
_UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror)

# Memory file systems check and write in two steps; all of them in this process share one store.
_CREATING = threading.Lock()


def open_fsspec(
    protocol: str, rest: str, options: dict[str, Any], *, own_connections: bool = False
) -> FsspecStorage:
    """Open `protocol://rest`. Some file systems connect to the host in the URL; nothing else is read.

    Args:
        protocol: one that fsspec knows.
        rest: the URL behind `://`.
        options: arguments of the file system, and `transfer_deadline` and `transfer_least_rate`.
        own_connections: False shares connections with all storages of the same options.

    Raises StorageError, OutOfReachError.
    """
    url = f"{protocol}://{rest}"
    folder = join("", rest.strip("/"), f"{protocol}:/")
    if rest.startswith("/") and protocol != "memory":  # no host, or the one that the options name
        folder = f"/{folder}"
    try:
        kind = fsspec.get_filesystem_class(protocol)
        of_url = kind._get_kwargs_from_urls(url)  # its host, user and port
        arguments = {**of_url, **client_options(options)}
        system = kind(**arguments, skip_instance_cache=own_connections)
    except ImportError as error:
        raise StorageError(f"{url}: a package is missing: {error}") from error
    except _UNREACHABLE as error:
        raise OutOfReachError(f"{url}: cannot be reached: {error or type(error).__name__}") from error
    except Exception as error:
        raise StorageError(f"{url}: cannot be opened: {error or type(error).__name__}") from error
    return FsspecStorage(protocol, folder, options, system)


class FsspecStorage:
    """A folder of an fsspec file system. See `Storage` for what each method guarantees.

    `create` is the file system's own `mode="create"`, and a write is as atomic and durable as the file system
    makes it; in object stores it is both.
    """

    def __init__(self, protocol: str, folder: str, options: dict[str, Any], system: Any) -> None:
        self._protocol = protocol
        self._folder = folder
        self._options = options
        self._system = system
        self._limits = Limits.of(options)
        self._probe = ExclusiveProbe()

    @property
    def url(self) -> str:
        return f"{self._protocol}://{self._folder}"

    def __repr__(self) -> str:
        return f"FsspecStorage({self.url!r})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str, dict[str, Any]]]:
        return open_fsspec, (self._protocol, self._folder, self._options)

    def at(self, path: str) -> FsspecStorage:
        below = FsspecStorage(
            self._protocol, join(self._folder, path, self.url), self._options, self._system
        )
        below._probe = self._probe
        return below

    def fresh(self) -> FsspecStorage:
        return open_fsspec(self._protocol, self._folder, self._options, own_connections=True)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            self.size(path)
            return b""
        nbytes = _PIECE if stop is None else stop - start
        return bytes(self._call("read", path, self._system.cat_file, nbytes=nbytes, start=start, end=stop))

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        view = as_bytes(buffer)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            data = self.read(path, offset + start, offset + start + len(piece))
            if len(data) != len(piece):
                raise CorruptError(
                    f"{self._name(path)} is truncated: wanted {len(view)} bytes at offset "
                    f"{offset}, found {start + len(data)}"
                )
            piece[:] = data
        if not view:
            self.size(path)

    def size(self, path: str) -> int:
        self._system.invalidate_cache()
        info = self._call("read", path, self._system.info)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "No such file (there is a folder)", self._name(path))
        return int(info["size"])

    def write(self, path: str, data: bytes | memoryview) -> None:
        self._put("write", path, bytes(data), "overwrite")

    def create(self, path: str, data: bytes) -> None:
        with _CREATING:
            self._put("create", path, data, "create")

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        view = as_bytes(buffer)
        self.write_pieces(path, len(view), cut(view, _PIECE, before))

    def write_pieces(self, path: str, size: int, pieces: Iterable[memoryview]) -> None:
        if size <= _PIECE:
            self.write(path, b"".join(as_bytes(piece) for piece in pieces))
            return
        file = self._open_new(path)
        try:
            for piece in pieces:
                self._call("write", path, lambda _, piece=piece: file.write(piece), nbytes=len(piece))
            self._call("write", path, lambda _: file.close(), nbytes=_PIECE)
        except BaseException as error:
            with cleanup(error, f"an unfinished {self._name(path)} may be left"):
                self._discard(path, file)
            raise

    def list(self, path: str = "") -> list[str]:
        self._system.invalidate_cache()
        try:
            entries = self._call("read", path, self._system.ls, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}
        if len(entries) == 1 and self._is_file(path):
            return []
        return sorted(name for name in names if not is_temporary(name))

    def sizes(self, path: str = "") -> dict[str, int]:
        self._system.invalidate_cache()
        try:
            found = self._call("read", path, self._system.find, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        start = len(self._system._strip_protocol(self._name(path)).rstrip("/")) + 1
        return {
            name[start:]: int(info["size"])
            for name, info in found.items()
            if info["type"] == "file" and name[start:] and not is_temporary(name.rpartition("/")[2])
        }

    def delete(self, path: str) -> None:
        try:
            self._call("delete", path, self._system.rm_file)
        except FileNotFoundError:
            pass

    def delete_tree(self, path: str) -> None:
        self._system.invalidate_cache()
        try:
            found = self._call("delete", path, self._system.find, withdirs=True, detail=True)
        except FileNotFoundError:
            return
        for name in [name for name, info in found.items() if info["type"] == "file"]:
            try:
                self._call("delete", path, lambda _, name=name: self._system.rm_file(name))
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
        put = partial(self._call, verb, path, self._system.pipe_file, data, nbytes=len(data), mode=mode)
        self._in_folder(path, put)

    def _open_new(self, path: str) -> Any:
        """Open a file for writing. It replaces an earlier one, at the latest when it is closed."""
        put = partial(self._call, "write", path, self._system.open, "wb", block_size=_PIECE)
        return self._in_folder(path, put)

    def _in_folder(self, path: str, put: Callable[[], T]) -> T:
        """The result of `put`, which is called again if the folder of `path` has to be made first."""
        try:
            return put()
        except FileNotFoundError:
            parent = self._name(path).rpartition("/")[0]
            self._call("write", path, lambda _: self._system.makedirs(parent, exist_ok=True))
            return put()

    def _discard(self, path: str, file: Any) -> None:
        """Remove a file that was not written to its end, without completing it."""

        def discard(name: str) -> None:
            if hasattr(file, "discard"):
                file.discard()
            file.closed = True  # a real close would complete the upload
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(name)

        self._call("delete", path, discard)

    def _call(
        self, verb: str, path: str, call: Callable[..., Any], *args: Any, nbytes: int = 0, **kw: Any
    ) -> Any:
        """Call a method of the file system on a path, within the limits, and translate its errors.

        `nbytes` is how much it transfers.
        """
        name = self._name(path)
        seconds = self._limits.seconds(nbytes)
        try:
            return in_thread(partial(call, name, *args, **kw)).result(seconds)
        except StorageError as error:  # given up
            raise type(error)(f"cannot {verb} {without_temporary(name)}: {error}") from error
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
            if isinstance(error, _UNREACHABLE):
                raise OutOfReachError(text) from error
            raise StorageError(text) from error
