"""From a URL to the storage that it names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardckpt.errors import StorageError
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.protocol import Storage

__all__ = ["open_storage"]

_REMOTE = "s3|s3a|gs|gcs|az|abfs|abfss|adl|hf|http|https|hdfs|webhdfs|ftp|sftp|ssh|smb|oci|oss|memory"
_SLIP = re.compile(rf"(?:(?P<remote>{_REMOTE}):/?|(?P<local>file|local):)")
"""A URL of fsspec's that lacks slashes. As a path it would be a folder called "s3:"."""


def open_storage(
    url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None
) -> Storage:
    """The storage at a local path, a `file://` URL, an `s3://` URL or any other of fsspec's.

    Nothing is read or written yet, so that a missing bucket or missing credentials are reported by
    the first operation. `~` stands for the home directory in local paths. `storage_options` are
    the arguments of the fsspec file system (for S3: `key`, `secret`, `token`, `profile`,
    `endpoint_url`, `anon`, `client_kwargs`, `config_kwargs`). What they do not say comes from where
    the protocol's own tools take it. A Storage is returned as it is. Raises StorageError for what names
    none, also where slashes are missing, as in `s3:/bucket`.
    """
    if not isinstance(url, str | os.PathLike):
        if storage_options:
            raise StorageError(f"{url.url} is open already: storage_options come too late")
        return url
    text = os.fspath(url)
    protocol, separator, rest = text.partition("://")
    if not text:
        raise StorageError("the URL of the storage is empty")
    if separator and protocol not in ("file", "local"):
        # The one place where imports wait: fsspec and s3fs take 0.4 s, and a local run needs neither.
        from shardckpt.storage.remote import open_remote

        return open_remote(protocol, rest, dict(storage_options or {}))
    if not separator and (slip := _SLIP.match(text)):
        meant = f"{slip['remote'] or slip['local']}://{text[slip.end() :]}"
        raise StorageError(f"{text}: did you mean {meant}? (A folder of this name would be ./{text})")
    if storage_options:
        raise StorageError(
            f"{text} is a local path, which takes no storage_options: is 's3://' missing before it?"
        )
    path = rest if separator else text
    return LocalStorage(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100, keeps symlinks
