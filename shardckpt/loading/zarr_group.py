"""A checkpoint as a read-only Zarr group."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardckpt.errors import NotACheckpointError
from shardckpt.format.manifest import MANIFEST, Manifest
from shardckpt.format.manifest_codec import decode_manifest
from shardckpt.format.zarr_refs import ROOT, references_of
from shardckpt.storage.limits import client_options

if TYPE_CHECKING:
    import zarr

__all__ = ["open_group"]


def open_group(
    url: str, storage_options: Mapping[str, Any] | None = None, *, manifest: Manifest | None = None
) -> zarr.Group:
    """Open the checkpoint at `url` as a read-only Zarr group, wherever it was moved or copied to.

    Args:
        url: of the checkpoint.
        storage_options: arguments of the fsspec file system.
        manifest: the checkpoint's manifest; None: it is read.

    The group is made from the manifest, not from refs.json, so that everything that is read lies inside the run,
    as `decode_manifest` checks. Chunks are read and verified when the group is indexed. Raises
    NotACheckpointError if there is no manifest, FormatError if it is invalid.
    """
    # Imported here: Zarr and fsspec take 0.3 s, and a run that only saves and loads does not need them.
    import fsspec
    from fsspec.implementations.reference import ReferenceFileSystem
    from zarr import open_group as open_store
    from zarr.storage import FsspecStore

    import shardckpt.format.zarr_dtypes  # noqa: F401, registers bfloat16 and float8

    options = client_options(storage_options)
    if manifest is None:
        files, folder = fsspec.url_to_fs(url, **options)
        try:
            data = files.cat_file(posixpath.join(folder, MANIFEST))
        except FileNotFoundError as error:
            raise NotACheckpointError(
                f"{url} has no {MANIFEST}: it is not a complete checkpoint"
            ) from error
        manifest = decode_manifest(data, url)
    files, folder = fsspec.url_to_fs(url, **options, asynchronous=True)
    references = ReferenceFileSystem(references_of(manifest, folder), fs=files, asynchronous=True)
    return open_store(FsspecStore(references, read_only=True, path=ROOT), mode="r")
