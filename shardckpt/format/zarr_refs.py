"""A checkpoint as a Zarr v3 hierarchy: each name is a node, and each chunk a byte range of a pack.

`refs.json` describes it in kerchunk's reference format, which fsspec reads, so that Zarr needs no code of this
project:

    zarr.open("reference::/run/attempt-0001/step-00000100/refs.json", mode="r")
"""

from __future__ import annotations

import itertools
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from shardckpt.format.chunks import chunk_bytes
from shardckpt.format.dtypes import EXTENDED, fill_value, itemsize
from shardckpt.format.manifest import Chunks, Manifest, TensorEntry

__all__ = ["MAX_CHUNKS", "ROOT", "TEMPLATES", "are_written", "encode_refs", "references_of"]

TEMPLATES = ("u", "attempt", "run")
"""Names of the checkpoint's folder and the two above it, by the number of `../` at the start of a pack's path."""

MAX_CHUNKS = 1 << 18
"""Chunks above which a commit leaves refs.json out.

That many take 14 MB, and Zarr 0.9 s and 330 MB of memory to open; a million take 56 MB, 2.6 times the manifest,
and Zarr 3.6 s and 1.1 GB, of tensors with short names (`scripts/bench/commit`). There is no smaller form: fsspec
ignores kerchunk's generated references unless it is told otherwise and has jinja2.
"""

_MAX_CONSOLIDATED = 10_000
"""Nodes above which the root does not list them: Zarr takes 0.1 s for each thousand to open such a root."""

ROOT = "__shardckpt"
"""Where `open_group` puts the root group. Zarr 3.1 lists a store wrongly if its path is empty, or is the
beginning of a name; no name begins like this."""


def are_written(manifest: Manifest) -> bool:
    """True if a commit writes refs.json: if there are not too many chunks for it."""
    return len(manifest.chunks.pack) <= MAX_CHUNKS


def encode_refs(manifest: Manifest, url: str) -> bytes:
    """The content of refs.json for the checkpoint at `url`, which is an absolute path or a URL.

    Packs are named below the template `u` (the checkpoint's folder) and, where packs of older steps are used,
    `attempt` and `run`, so that a reader of a copy can override these. If the URL itself looks like a template,
    packs are named in full.

    The root lists all nodes (Zarr's consolidated metadata), since Zarr 3.1 sees only the top level of a reference
    store without that. It does not if there are very many nodes, or if one has a type that needs an extension of
    Zarr: readers without the extension could not open such a root at all.
    """
    global _last_body
    templates, packs = _pack_urls(manifest, url)
    body = _last_body
    if body is None or not body.belongs_to(manifest, packs):
        body = _last_body = _encode_body(manifest, packs)
    root = json.dumps(_text(_root(manifest)))
    if body.consolidated is not None:
        root = f'{root[:-2]},{body.consolidated}}}"'
    head = f'{{"version":1,"templates":{json.dumps(templates)},"refs":{{\n"zarr.json":{root}'
    return b"".join([head.encode(), body.entries, b"\n}}\n"])


class _Body(NamedTuple):
    """The content of refs.json without its templates and its root: all but a few hundred bytes.

    It depends on the plan of a save only, so that all saves of a training have the same. `consolidated` is the
    root's list of nodes, as it stands in the string of the root; None if the root has none.
    """

    tensors: tuple[TensorEntry, ...]
    packs: list[str]
    chunks: Chunks
    consolidated: str | None
    entries: bytes

    def belongs_to(self, manifest: Manifest, packs: list[str]) -> bool:
        """True if the refs.json of this manifest has this body."""
        chunks = manifest.chunks
        is_same = (manifest.tensors, packs) == (self.tensors, self.packs)
        is_same = is_same and np.array_equal(chunks.pack, self.chunks.pack)
        return is_same and np.array_equal(chunks.offset, self.chunks.offset)


_last_body: _Body | None = None
"""The body of this process's last commit: the next one needs the same, and encoding it takes most of a commit."""


def _encode_body(manifest: Manifest, packs: list[str]) -> _Body:
    nodes = dict(_nodes(manifest.tensors))
    consolidated = None
    if len(nodes) <= _MAX_CONSOLIDATED and not any(t.dtype in EXTENDED for t in manifest.tensors):
        consolidated = json.dumps(f'"consolidated_metadata":{_text(_consolidated(nodes))}')[1:-1]
    entries = [f",\n{json.dumps(_key(path))}:{json.dumps(_text(node))}" for path, node in nodes.items()]
    heads = [f"[{json.dumps(pack)}," for pack in packs]
    table = manifest.chunks
    for array in _arrays(manifest):
        start = f',\n"{json.dumps(array.path)[1:-1]}/c'
        rows = slice(array.first, array.first + array.rows)
        entries += [
            f'{start}{key}":{heads[pack]}{offset},{array.nbytes}]'
            for key, pack, offset in zip(
                _chunk_keys(array.grid), table.pack[rows].tolist(), table.offset[rows].tolist(), strict=True
            )
        ]
    text = "".join(entries).encode()
    return _Body(manifest.tensors, packs, table, consolidated, text)


def references_of(manifest: Manifest, folder: str) -> dict[str, Any]:
    """The content of refs.json as fsspec represents it: key -> text, or [path, offset, length]."""
    packs = [posixpath.normpath(posixpath.join(folder, pack.path)) for pack in manifest.packs]
    table = manifest.chunks
    nodes = itertools.chain([("", _root(manifest))], _nodes(manifest.tensors))
    references: dict[str, Any] = {f"{ROOT}/{_key(path)}": _text(node) for path, node in nodes}
    for array in _arrays(manifest):
        rows = slice(array.first, array.first + array.rows)
        for key, pack, offset in zip(
            _chunk_keys(array.grid), table.pack[rows].tolist(), table.offset[rows].tolist(), strict=True
        ):
            references[f"{ROOT}/{array.path}/c{key}"] = [packs[pack], offset, array.nbytes]
    return references


class _StoredArray(NamedTuple):
    """One Zarr array: path, grid of chunks, first row in the chunk table, rows, bytes of a chunk."""

    path: str
    grid: tuple[int, ...]
    first: int
    rows: int
    nbytes: int


def _arrays(manifest: Manifest) -> Iterator[_StoredArray]:
    first = manifest.first_rows.tolist()
    number = 0
    for tensor in manifest.tensors:
        for path, array in zip(_array_paths(tensor), tensor.arrays, strict=True):
            start, stop = first[number], first[number + 1]
            nbytes = chunk_bytes(tensor.dtype, array.chunk)
            yield _StoredArray(path, array.grid, start, stop - start, nbytes)
            number += 1


def _array_paths(tensor: TensorEntry) -> Sequence[str]:
    if tensor.is_array:
        return [tensor.name]
    return [f"{tensor.name}/box-{i}" for i in range(len(tensor.arrays))]


def _chunk_keys(grid: Sequence[int]) -> Iterable[str]:
    """The end of each chunk's key, in C order: `/0/1`; the empty string for a scalar's only chunk."""
    if 0 in grid:
        return ()  # however many there would be along the other dimensions
    axes = [[f"/{i}" for i in range(n)] for n in grid]
    return axes[0] if len(axes) == 1 else map("".join, itertools.product(*axes))


def _root(manifest: Manifest) -> dict[str, Any]:
    """The metadata of the root group: what the checkpoint is."""
    return _group(manifest.head())


def _nodes(tensors: Iterable[TensorEntry]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, metadata) of every node below the root, a group before its members."""
    groups = {""}
    for tensor in tensors:
        folder = posixpath.dirname(tensor.name)
        missing = []
        while folder not in groups:
            groups.add(folder)
            missing.append(folder)
            folder = posixpath.dirname(folder)
        for folder in reversed(missing):
            yield folder, _group({})
        paths = _array_paths(tensor)
        if not tensor.is_array:
            boxes = {
                posixpath.basename(path): {"offset": array.offset, "shape": array.shape}
                for path, array in zip(paths, tensor.arrays, strict=True)
            }
            yield tensor.name, _group({"shape": tensor.shape, "dtype": tensor.dtype, "boxes": boxes})
        for path, array in zip(paths, tensor.arrays, strict=True):
            # Zarr iterates over the grid even of an array without elements: make it as small as possible.
            chunk = array.chunk if array.box.volume else tuple(max(n, 1) for n in array.shape)
            yield path, _array(posixpath.basename(path), tensor.dtype, array.shape, chunk)


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array(name: str, dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> dict[str, Any]:
    endian = {"configuration": {"endian": "little"}} if itemsize(dtype) > 1 else {}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value(dtype),
        "codecs": [{"name": "bytes", **endian}, {"name": "crc32c"}],
        # Unique in the group: xarray takes two dimensions of one name for the same.
        "dimension_names": [f"{name}:{d}" for d in range(len(shape))],
        "attributes": {},
    }


def _consolidated(nodes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The nodes by depth and then by name: Zarr 3.1 loses siblings that are not adjacent."""
    paths = sorted(nodes, key=lambda path: (path.count("/"), path))
    inner = {path: nodes[path] for path in paths}
    return {"kind": "inline", "must_understand": False, "metadata": inner}


def _key(path: str) -> str:
    return f"{path}/zarr.json" if path else "zarr.json"


def _text(node: dict[str, Any]) -> str:
    return msgspec.json.encode(node).decode()


def _pack_urls(manifest: Manifest, url: str) -> tuple[dict[str, str], list[str]]:
    """The templates, and each pack's URL in terms of them."""
    folders = [url.rstrip("/")]
    for _ in TEMPLATES[1:]:
        folders.append(folders[-1].rpartition("/")[0])
    urls, plain = [], []
    templates = {"u": folders[0]}
    for pack in manifest.packs:
        path, up = pack.path, 0
        while path.startswith("../"):
            path, up = path[3:], up + 1
        templates[TEMPLATES[up]] = folders[up]
        urls.append(f"{{{{{TEMPLATES[up]}}}}}/{path}")
        plain.append(f"{folders[up]}/{path}")
    if any("{{" in folder for folder in folders) or any(
        set("{}") & set(pack.path) for pack in manifest.packs
    ):
        return {}, plain
    return templates, urls
