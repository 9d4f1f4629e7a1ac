"""Open the storage that a URL names."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardckpt.errors import InvalidUrlError, StorageError
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.protocol import Storage

__all__ = ["open_storage", "protocol_of"]

_LOCAL = ("file", "local")
_S3 = ("s3", "s3a")
_REMOTE = (
    *(*_S3, "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "http", "https", "hdfs", "webhdfs"),
    *("ftp", "sftp", "ssh", "smb", "oci", "oss", "memory"),
)
_USUAL = ("s3", "gs", "az", "abfs", "file", "sftp", "hdfs", "memory", "https")
"""Protocols that are suggested for a misspelt one."""
_OBJECTS = ("gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss")
"""Object stores: their URLs begin with a bucket."""
_URL = re.compile(r"\s*(?P<protocol>[A-Za-z][A-Za-z0-9+._\-]*(?:::.*)?)://(?P<rest>.*)", re.DOTALL)
_SLIP = re.compile(
    rf"\s*(?:(?P<remote>{'|'.join(_REMOTE)}):/?|(?P<local>{'|'.join(_LOCAL)}):)(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
"""A URL that lacks slashes. As a path it would be a folder called "s3:"."""


def open_storage(
    url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None
) -> Storage:
    """Open a storage. Nothing is read or written: missing buckets and credentials are errors of the first call.

    Args:
        url: a local path, in which `~` stands for the home directory; a URL (`file://`, `s3://` or another
            protocol of fsspec), in which nothing is decoded: `%20` and `?` stand for themselves; or a Storage,
            which is returned as it is.
        storage_options: for a URL, the arguments of the fsspec file system (for S3: `key`, `secret`, `token`,
            `profile`, `endpoint_url`, `anon`, `client_kwargs`, `config_kwargs`), `transfer_deadline` in seconds
            and `transfer_least_rate` in bytes per second (docs/storage.md). Other settings come from where the
            protocol's own tools take them. For a local path, `follow_links`: whether files are also read where
            a symbolic link leads out of the run.

    Raises InvalidUrlError for a URL that names no storage, also for one that lacks a slash, as in `s3:/bucket`;
    StorageError for wrong options or a missing package; TypeError for what is neither a path nor a Storage.
    """
    if not isinstance(url, str | os.PathLike):
        _check_is_storage(url)
        if storage_options:
            raise StorageError(f"{url.url} is open already: storage_options come too late")
        return url
    text = os.fspath(url)
    if not text.strip():
        raise InvalidUrlError("the URL of the storage is empty")
    if "\0" in text:
        raise InvalidUrlError(f"{text!r}: a URL or path has no null character")
    protocol = protocol_of(text)
    if protocol and text != text.strip():
        raise InvalidUrlError(f"{text!r} begins or ends with white space: did you mean {text.strip()}?")
    if protocol and protocol not in _LOCAL:
        return _open_remote(text, protocol, dict(storage_options or {}))
    if not protocol and (slip := _SLIP.fullmatch(text)):
        rest = slip["rest"].strip()
        is_relative = slip["local"] and not rest.startswith("/")
        meant = rest if is_relative else f"{(slip['remote'] or slip['local']).lower()}://{rest}"
        raise InvalidUrlError(f"{text}: did you mean {meant}? (A folder of this name would be ./{text})")
    options = dict(storage_options or {})
    follow_links = options.pop("follow_links", False)
    if options:
        raise InvalidUrlError(
            f"{text} is a local path, which takes no storage_options but follow_links: is 's3://' missing "
            "before it?"
        )
    return LocalStorage(_local_path(text, protocol), follow_links=bool(follow_links))


def protocol_of(url: str) -> str:
    """The protocol of a URL, in lower case; empty for a path."""
    match = _URL.fullmatch(url)
    return match["protocol"].lower() if match else ""


def _check_is_storage(thing: object) -> None:
    """Raise TypeError, which names the methods that a user's own Storage lacks."""
    if isinstance(thing, Storage):
        return
    wanted = [name for name in vars(Storage) if not name.startswith("_")]
    lacking = [name for name in wanted if not hasattr(thing, name)]
    kind = type(thing).__name__
    if len(lacking) == len(wanted):
        raise TypeError(f"{thing!r} is neither a URL nor a path: it is a {kind}")
    raise TypeError(
        f"the {kind} is no Storage: it lacks {', '.join(lacking)} (see shardckpt/storage/protocol.py)"
    )


def _local_path(text: str, protocol: str) -> str:
    path = text.partition("://")[2] if protocol else text
    if protocol and not path:
        raise InvalidUrlError(f"{text} names no folder: file:///folder")
    if protocol and not path.startswith(("/", ".", "~")):
        host, _, rest = path.partition("/")
        if host.lower() != "localhost":
            raise InvalidUrlError(
                f"{text} names a file of the machine {host!r}: did you mean file:///{path}? (A path relative to "
                f"the working folder is just {path}; what another machine has must be mounted here)"
            )
        path = f"/{rest}"
    try:
        full = os.path.abspath(Path(path).expanduser())  # noqa: PTH100, keeps symlinks
    except RuntimeError as error:
        raise InvalidUrlError(f"{text}: {error}") from error
    return f"/{full.lstrip('/')}"  # which POSIX lets begin with two slashes


def _open_remote(text: str, protocol: str, options: dict[str, Any]) -> Storage:
    # The one place where imports wait: fsspec and s3fs take 0.4 s, and a local run needs neither.
    rest = text.partition("://")[2]
    if "::" in protocol:
        raise InvalidUrlError(
            f"{text}: chained URLs are refused, since a cache between the library and "
            "the storage breaks its guarantees. Give the last URL of the chain"
        )
    authority = rest.partition("/")[0]
    if re.search(r"[\s\x00-\x1f]", authority):
        raise InvalidUrlError(
            f"{text!r}: there is white space in {authority!r}, which no host or bucket has"
        )
    user, has_user, _ = authority.rpartition("@")
    if has_user and ":" in user:
        shown = f"{protocol}://{user.partition(':')[0]}:...@{authority.rpartition('@')[2]}/..."
        raise InvalidUrlError(
            f"{shown}: a URL must not have a password in it, since it is written to logs and checkpoints. Give "
            "it in storage_options"
        )
    if protocol in _S3:
        from shardckpt.storage.s3 import open_s3

        return open_s3(rest, options)
    if query := re.search(r"[?#].*", rest):
        raise InvalidUrlError(
            f"{text}: {query[0]!r} has no meaning in the URL of a folder. Give the URL without it"
        )
    if protocol in _OBJECTS and not authority:
        raise InvalidUrlError(
            f"{text}: the bucket is missing: did you mean {protocol}://{rest.lstrip('/') or 'bucket/folder'}?"
        )
    import fsspec

    if protocol not in (*fsspec.available_protocols(), *fsspec.registry):
        alike = difflib.get_close_matches(protocol, _USUAL, n=1, cutoff=0.5)
        hint = f"did you mean {alike[0]}://?" if alike else "object stores are s3://, gs:// and az://"
        raise InvalidUrlError(f"{text}: unknown protocol {protocol!r}; {hint}")
    from shardckpt.storage.remote import open_fsspec

    return open_fsspec(protocol, rest, options)
