"""Checkpoints read through Zarr: by itself, without this project, and by open_group."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import fsspec
import ml_dtypes
import msgspec
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt.format.zarr_dtypes  # noqa: F401
from shardckpt.errors import FormatError, NotACheckpointError
from shardckpt.format import records
from shardckpt.format.box import Box
from shardckpt.format.dtypes import DTYPES, EXTENDED, fill_value, numpy_dtype
from shardckpt.format.manifest import (
    MANIFEST,
    REFS,
    ArrayEntry,
    Chunks,
    Manifest,
    Pack,
    TensorEntry,
    pack_path,
)
from shardckpt.format.manifest_codec import decode_manifest, encode_record
from shardckpt.format.names import join
from shardckpt.format.value_decoding import decode_value
from shardckpt.format.zarr_refs import encode_refs
from shardckpt.loading.zarr_group import open_group
from tests.kit.servers import S3Server

Boxes = Sequence[tuple[Box, tuple[int, ...]]]


@dataclass(frozen=True)
class Stored:
    """One tensor to write: its content, its type's name, its boxes and their chunk shapes."""

    content: np.ndarray[Any, Any]
    dtype: str
    boxes: Boxes


def whole(content: np.ndarray[Any, Any], dtype: str, chunk: tuple[int, ...]) -> Stored:
    return Stored(content, dtype, [(Box.whole(content.shape), chunk)])


def random_content(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Any bits that the type can have, NaNs with payloads among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    kind = numpy_dtype(dtype)
    return np.frombuffer(rng.bytes(math.prod(shape) * kind.itemsize), kind).reshape(shape)


def write_pack(tensors: Mapping[str, Stored], writers: int = 1) -> tuple[Manifest, dict[str, bytes]]:
    """A checkpoint by hand: its manifest, and its packs, over which the chunks are dealt out."""
    packs = [bytearray() for _ in range(writers)]
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    records = []
    for name, stored in tensors.items():
        arrays = tuple(ArrayEntry(box.offsets, box.shape, chunk) for box, chunk in stored.boxes)
        records.append(TensorEntry(name, stored.dtype, stored.content.shape, arrays))
        for array in arrays:
            for cell in array.cells():
                padded = np.zeros(array.chunk, numpy_dtype(stored.dtype))
                padded[tuple(slice(n) for n in cell.shape)] = stored.content[cell.slices]
                writer = len(columns[0]) % writers
                pack = packs[writer]
                pack.extend(bytes(-len(pack) % 64))
                crc = crc32c.crc32c(padded.tobytes())
                for column, value in zip(columns, (writer, len(pack), crc), strict=True):
                    column.append(value)
                pack += padded.tobytes() + crc.to_bytes(4, "little")
    manifest = Manifest(
        id="0" * 32,
        step=7,
        attempt=1,
        world_size=writers,
        created=1.5,
        writer="by hand",
        metrics={"loss": 1.25, "grad": "nan"},
        values={f"v{number}": {"$tensor": name} for number, name in enumerate(tensors)},
        per_rank=[{}] * writers,
        packs=tuple(Pack(pack_path(rank), len(pack)) for rank, pack in enumerate(packs)),
        tensors=tuple(records),
        chunks=Chunks(*columns),
    )
    return manifest, {pack_path(rank): bytes(pack) for rank, pack in enumerate(packs)}


def write(folder: Path, tensors: Mapping[str, Stored], writers: int = 1) -> Manifest:
    """A checkpoint in `folder`, as the writer leaves it."""
    manifest, packs = write_pack(tensors, writers)
    for path, content in packs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / REFS).write_bytes(encode_refs(manifest, str(folder)))
    (folder / MANIFEST).write_bytes(encode_record(manifest))
    return decode_manifest(encode_record(manifest), str(folder))


def plain(folder: Path) -> zarr.Group:
    group = zarr.open(f"reference::{folder / REFS}", mode="r")
    assert isinstance(group, zarr.Group)
    return group


def read(group: zarr.Group, name: str) -> np.ndarray[Any, Any]:
    """The tensor, put together from its boxes if it is a group of them."""
    node = group[name]
    if isinstance(node, zarr.Array):
        return np.asarray(node[...])
    about = node.attrs.asdict()
    content = np.empty(about["shape"], numpy_dtype(about["dtype"]))
    for key, box in about["boxes"].items():
        content[Box(tuple(box["offset"]), tuple(box["shape"])).slices] = node[key][...]
    return content


def assert_holds(group: zarr.Group, tensors: Mapping[str, Stored]) -> None:
    for name, stored in tensors.items():
        found = read(group, name)
        assert found.shape == stored.content.shape, name
        assert found.dtype == numpy_dtype(stored.dtype), name
        assert found.tobytes() == stored.content.tobytes(), name


def of_every_kind(dtypes: Sequence[str]) -> dict[str, Stored]:
    """Scalars, tensors without elements, padded last chunks, one chunk, groups of boxes; of each type."""
    tensors = {}
    for seed, dtype in enumerate(dtypes):

        def content(*shape: int, dtype: str = dtype, seed: int = seed) -> np.ndarray[Any, Any]:
            return random_content(dtype, shape, seed)

        tensors[f"scalar/{dtype}"] = whole(content(), dtype, ())
        tensors[f"empty/{dtype}"] = whole(content(0, 3), dtype, (1, 3))
        tensors[f"model/deep.er/{dtype}"] = whole(content(5, 3, 2), dtype, (2, 2, 2))
        tensors[f"one/{dtype}"] = whole(content(11), dtype, (11,))
        boxes = [
            (Box((0, 0), (1, 5)), (1, 2)),
            (Box((1, 0), (3, 2)), (2, 2)),
            (Box((1, 2), (3, 3)), (3, 3)),
        ]
        tensors[f"boxes/{dtype}"] = Stored(content(4, 5), dtype, boxes)
    return tensors


def test_reads_bit_equal(tmp_path: Path) -> None:
    """Every type and kind of tensor, by plain zarr.open and by open_group with a path or a file URL."""
    tensors = of_every_kind(list(DTYPES))
    write(tmp_path, tensors, writers=3)
    assert_holds(plain(tmp_path), tensors)
    assert_holds(open_group(str(tmp_path)), tensors)
    assert_holds(open_group(tmp_path.as_uri() + "/"), tensors)


_READER = """
import hashlib, importlib.metadata, json, sys
if {hide}:  # as if shardckpt were not installed
    found = importlib.metadata.distributions
    importlib.metadata.distributions = lambda **query: (
        package for package in found(**query) if package.metadata["Name"] != "shardckpt")
import zarr
group = zarr.open("reference::" + sys.argv[1], mode="r")
names = json.loads(sys.argv[2])
print(json.dumps([hashlib.md5(group[name][...].tobytes()).hexdigest() for name in names]))
assert "torch" not in sys.modules, "torch was imported"
assert not ({hide} and "shardckpt" in sys.modules), "shardckpt was imported"
"""


@pytest.mark.parametrize("hide", [False, True], ids=["installed", "absent"])
def test_needs_no_import(tmp_path: Path, hide: bool) -> None:
    """A process that imports Zarr alone reads it: all types where shardckpt is installed, its own elsewhere."""
    tensors = of_every_kind(list(DTYPES))
    write(tmp_path, tensors)
    names = [
        name for name, t in tensors.items() if len(t.boxes) == 1 and not (hide and t.dtype in EXTENDED)
    ]
    command = [sys.executable, "-c", _READER.format(hide=hide), str(tmp_path / REFS), json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = [hashlib.md5(tensors[name].content.tobytes()).hexdigest() for name in names]
    assert json.loads(result.stdout) == expected


def test_lists_its_nodes(tmp_path: Path) -> None:
    """Plain Zarr lists everything if it knows all types; open_group lists everything always."""
    known = of_every_kind(["float32", "bool"])
    paths = {
        "boxes",
        "boxes/bool",
        "boxes/bool/box-0",
        "boxes/bool/box-1",
        "boxes/bool/box-2",
        "boxes/float32",
        "boxes/float32/box-0",
        "boxes/float32/box-1",
        "boxes/float32/box-2",
        "empty",
        "empty/bool",
        "empty/float32",
        "model",
        "model/deep.er",
        "model/deep.er/bool",
        "model/deep.er/float32",
        "one",
        "one/bool",
        "one/float32",
        "scalar",
        "scalar/bool",
        "scalar/float32",
    }
    write(tmp_path / "known", known)
    for group in (plain(tmp_path / "known"), open_group(str(tmp_path / "known"))):
        assert {path for path, _ in group.members(max_depth=None)} == paths
        assert {path for path, _ in group["model"].members(max_depth=None)} == {  # type: ignore[union-attr]
            "deep.er",
            "deep.er/bool",
            "deep.er/float32",
        }
        assert "deep.er" in str(group.tree())
        assert sorted(group["boxes/float32"].keys()) == ["box-0", "box-1", "box-2"]  # type: ignore[union-attr]
    write(tmp_path / "all", of_every_kind(list(DTYPES)))
    members = {path for path, _ in open_group(str(tmp_path / "all")).members(max_depth=None)}
    assert members == {path.replace("float32", name) for path in paths for name in DTYPES}
    below = zarr.open(f"reference://model::{tmp_path / 'all' / REFS}", mode="r")
    assert {path for path, _ in below.members(max_depth=None)} == {  # type: ignore[union-attr]
        "deep.er",
        *(f"deep.er/{name}" for name in DTYPES),
    }


def test_root_tells_what_it_is(tmp_path: Path) -> None:
    """The root's attributes are the manifest's head; a group of boxes tells where they lie."""
    write(tmp_path, of_every_kind(["int32"]))
    for group in (plain(tmp_path), open_group(str(tmp_path))):
        assert group.attrs.asdict() == {
            "format": "shardckpt/1",
            "id": "0" * 32,
            "step": 7,
            "attempt": 1,
            "world_size": 1,
            "created": 1.5,
            "writer": "by hand",
            "metrics": {"loss": 1.25, "grad": "nan"},
        }
        assert group["boxes/int32"].attrs.asdict() == {
            "shape": [4, 5],
            "dtype": "int32",
            "boxes": {
                "box-0": {"offset": [0, 0], "shape": [1, 5]},
                "box-1": {"offset": [1, 0], "shape": [3, 2]},
                "box-2": {"offset": [1, 2], "shape": [3, 3]},
            },
        }


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    """Whichever byte of a chunk or its checksum changes, Zarr raises and never returns wrong data."""
    tensors = {"w": whole(random_content("float32", (3,)), "float32", (3,))}
    write(tmp_path, tensors)
    pack = tmp_path / pack_path(0)
    good = pack.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        pack.write_bytes(bad)
        for group in (plain(tmp_path), open_group(str(tmp_path))):
            with pytest.raises(ValueError, match="checksum"):
                group["w"][...]  # type: ignore[index]


def test_is_read_only(tmp_path: Path) -> None:
    """Neither way of opening it lets anybody write."""
    write(tmp_path, {"w": whole(random_content("float32", (3,)), "float32", (3,))})
    for group in (plain(tmp_path), open_group(str(tmp_path))):
        with pytest.raises(ValueError, match="read-only"):
            group["w"][...] = 0  # type: ignore[index]


def test_opens_where_it_was_moved(tmp_path: Path) -> None:
    """open_group goes by where the checkpoint is; plain Zarr is told by template_overrides."""
    tensors = of_every_kind(["float32", "bfloat16"])
    write(tmp_path / "here", tensors)
    (tmp_path / "here").rename(tmp_path / "there")
    assert_holds(open_group(str(tmp_path / "there")), tensors)
    group = zarr.open_group(
        "reference://",
        mode="r",
        storage_options={
            "fo": str(tmp_path / "there" / REFS),
            "template_overrides": {"u": str(tmp_path / "there")},
        },
    )
    assert_holds(group, tensors)


@pytest.mark.parametrize("up", ["..", "../../attempt-0001"])
def test_packs_of_older_steps(tmp_path: Path, up: str) -> None:
    """Packs of older steps and attempts of the run are found, also after the run was moved."""
    run = tmp_path / "run"
    tensors = of_every_kind(["float32"])
    manifest, packs = write_pack(tensors, writers=2)
    older = f"{up}/step-00000001/{pack_path(1)}"
    packs[older] = packs.pop(pack_path(1))
    here = run / "attempt-0002" / "step-00000002"
    for path, content in packs.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).resolve().parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(content)
    sizes = manifest.packs
    record = json.loads(records.open_sealed(encode_record(manifest), MANIFEST))
    record["packs"][1]["path"] = older
    record.update(attempt=2, step=2)
    manifest = decode_manifest(records.encode(record), str(here))
    assert [pack.size for pack in manifest.packs] == [pack.size for pack in sizes]
    (here / MANIFEST).write_bytes(encode_record(manifest))
    refs = encode_refs(manifest, str(here))
    assert ".." not in json.dumps([ref[0] for ref in json.loads(refs)["refs"].values() if len(ref) == 3])
    (here / REFS).write_bytes(refs)
    assert_holds(plain(here), tensors)
    run.rename(tmp_path / "moved")
    assert_holds(open_group(str(tmp_path / "moved/attempt-0002/step-00000002")), tensors)


@pytest.mark.parametrize("change", ["nothing", "offset", "pack", "packs", "tensors", "url"])
def test_each_save_has_references_of_its_own(change: str) -> None:
    """What an earlier call left to be used again does not show in a later one."""
    tensors = of_every_kind(["float32"])
    first, _ = write_pack(tensors, writers=2)
    record = json.loads(records.open_sealed(encode_record(first), MANIFEST)) | {"step": 8, "id": "1" * 32}
    url = "/other" if change == "url" else "/run"
    if change == "offset":
        record["chunks"]["offset"][0] += 64
    elif change == "pack":
        record["chunks"]["pack"][0] = 1
    elif change == "packs":
        record["packs"][1]["path"] = f"../step-00000007/{pack_path(1)}"
    elif change == "tensors":
        record["tensors"][0]["name"] = "renamed"
    second = msgspec.convert(record, type=Manifest, dec_hook=lambda _, columns: Chunks(**columns))
    alone = encode_refs(second, url)
    before = encode_refs(first, "/run")
    after = encode_refs(second, url)
    assert after == alone
    assert encode_refs(first, "/run") == before
    ours, theirs = (json.loads(refs)["refs"] for refs in (before, after))
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert json.loads(theirs["zarr.json"])["attributes"]["step"] == 8
    assert (len(changed) > 1) is (change not in ("nothing", "url"))
    assert (json.loads(before)["templates"] == json.loads(after)["templates"]) is (
        change not in ("packs", "url")
    )


def test_odd_folders(tmp_path: Path) -> None:
    """Folders whose names mean something to templates, to URLs or to globs."""
    tensors = of_every_kind(["float32"])
    for name in ("a{b}", "{{u}}", "%7Bu%7D %", "[0-9]*?", "#x", "ü"):
        write(tmp_path / name, tensors)
        assert_holds(plain(tmp_path / name), tensors)
        assert_holds(open_group(str(tmp_path / name)), tensors)


_KEYS = st.text(min_size=0, max_size=8) | st.sampled_from(
    [
        *"$&'()*+,;=:@[]{}<>|^`\"#?~%\\/. ",
        "",
        "..",
        "zarr.json",
        "__x",
        "c",
        "c/0",
        "box-0",
        "{{u}}",
        "a::b",
    ]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(_KEYS, min_size=1, max_size=3), min_size=1, max_size=4))
def test_odd_names(paths: list[list[str]]) -> None:
    """Whatever keys a state has, its tensors are found and listed under their names."""
    names: dict[str, Stored] = {}
    for number, keys in enumerate(paths):
        name = "state"
        for key in keys:
            name = join(name, key)
        if not any(f"{a}/".startswith(f"{b}/") for b in names for a in [name]) and not any(
            b.startswith(f"{name}/") for b in names
        ):
            names[name] = whole(np.array([number, 5], np.int16), "int16", (2,))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), names)
        for group in (plain(Path(folder)), open_group(folder)):
            assert_holds(group, names)
            listed = {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
            assert listed == set(names)


def test_memory_and_missing(tmp_path: Path) -> None:
    """Any fsspec file system will do; where no manifest is, that is said."""
    tensors = of_every_kind(["float32", "float8_e5m2"])
    write(tmp_path, tensors)
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path), "/zarr-view-test", recursive=True)
    assert_holds(open_group("memory://zarr-view-test"), tensors)
    with pytest.raises(NotACheckpointError, match="no manifest"):
        open_group("memory://zarr-view-test-nothing")
    with pytest.raises(NotACheckpointError, match="no manifest"):
        open_group(str(tmp_path / "nothing"))


def test_goes_by_the_manifest_alone(tmp_path: Path) -> None:
    """A refs.json that points elsewhere is not believed, and a manifest that does is refused."""
    tensors = {"w": whole(random_content("float32", (3,)), "float32", (3,))}
    write(tmp_path, tensors)
    (tmp_path / REFS).write_bytes(b"{")
    assert_holds(open_group(str(tmp_path)), tensors)
    record = json.loads(records.open_sealed((tmp_path / MANIFEST).read_bytes(), MANIFEST))
    record["packs"][0]["path"] = "../../etc/passwd"
    (tmp_path / MANIFEST).write_bytes(records.encode(record))
    with pytest.raises(FormatError, match="inside this run"):
        open_group(str(tmp_path))


def test_s3(tmp_path: Path, moto_s3: S3Server) -> None:
    """open_group, and the documented recipe for plain Zarr, read a checkpoint in object storage."""
    tensors = of_every_kind(["float32", "bfloat16"])
    manifest = write(tmp_path, tensors)
    options = dict(moto_s3.options)
    url = f"{moto_s3.url('zarr')}/attempt-0001/step-00000007"
    (tmp_path / REFS).write_bytes(encode_refs(manifest, url))
    files = fsspec.filesystem("s3", **options)
    files.put(str(tmp_path) + "/", url, recursive=True)
    assert_holds(open_group(url, options), tensors)
    group = zarr.open_group(
        "reference://",
        mode="r",
        storage_options={
            "fo": f"{url}/refs.json",
            "target_options": options,
            "remote_protocol": "s3",
            "remote_options": {**options, "asynchronous": True},
        },
    )
    assert_holds(group, tensors)


def test_many_nodes_are_not_consolidated(tmp_path: Path) -> None:
    """A root that lists very many nodes would be slow to open, so it does not; arrays are found by name."""
    tensors = {f"p/{i}": whole(np.array(i, np.int32), "int32", ()) for i in range(10_000)}
    write(tmp_path, tensors)
    group = plain(tmp_path)
    assert group.metadata.consolidated_metadata is None
    assert read(group, "p/4711") == 4711


@pytest.mark.parametrize("name", EXTENDED)
def test_types_are_zarr_types(name: str, tmp_path: Path) -> None:
    """Zarr makes, describes, fills, writes and reads arrays of each type that it lacks by itself."""
    dtype = EXTENDED[name]
    content = random_content(name, (5, 2))
    array = zarr.create_array(
        tmp_path, shape=(7, 2), chunks=(2, 2), dtype=dtype, fill_value=1, compressors=None
    )
    array[:5] = content
    metadata = json.loads((tmp_path / "zarr.json").read_text())
    assert metadata["data_type"] == name
    assert metadata["fill_value"] == 1.0
    endian = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
    assert metadata["codecs"] == [{"name": "bytes", **endian}]
    again = zarr.open_array(tmp_path, mode="r")
    assert again.dtype == dtype
    assert np.asarray(again[:5]).tobytes() == content.tobytes()
    assert (np.asarray(again[5:]).astype(np.float32) == 1).all()


def test_fill_values_of_the_types() -> None:
    """Fill values come as numbers, NaN, infinities or bits; whatever else is refused."""
    from shardckpt.format.zarr_dtypes import BFloat16, Float8E4M3FN

    bf16 = BFloat16()
    for given_, bits in {
        "NaN": 0x7FC0,
        "0x7fc1": 0x7FC1,
        "Infinity": 0x7F80,
        "-Infinity": 0xFF80,
        1: 0x3F80,
        -0.5: 0xBF00,
    }.items():
        value = bf16.from_json_scalar(given_, zarr_format=3)
        assert int(np.asarray(value).view(np.uint16)) == bits
    assert bf16.to_json_scalar(ml_dtypes.bfloat16("nan"), zarr_format=3) == "NaN"
    assert bf16.to_json_scalar(ml_dtypes.bfloat16("-inf"), zarr_format=3) == "-Infinity"
    assert bf16.to_json_scalar(0.5, zarr_format=3) == 0.5
    with pytest.raises(TypeError, match="fill value"):
        bf16.from_json_scalar("nonsense", zarr_format=3)
    with pytest.raises(TypeError, match="scalar"):
        Float8E4M3FN().cast_scalar("1")
    with pytest.raises(ValueError, match="little-endian"):
        BFloat16(endianness="big").to_native_dtype()


def test_every_fill_value_is_legal(tmp_path: Path) -> None:
    """Zarr takes the fill value of each type for one of that type: NaN for all floats."""
    write(tmp_path, {name: whole(random_content(name, ()), name, ()) for name in DTYPES})
    group = plain(tmp_path)
    for name in DTYPES:
        found = np.asarray(group[name].fill_value)  # type: ignore[union-attr]
        assert found.dtype == numpy_dtype(name)
        assert bool(np.isnan(found.astype(np.complex128))) == ("NaN" in str(fill_value(name)))


_DOCUMENT = (Path(__file__).parents[3] / "docs" / "format.md").read_text()


def documented_reader() -> Any:
    """`read_checkpoint` of the document, which knows NumPy and the standard library only."""
    code = re.findall(r"```python\n(.*?)```", _DOCUMENT, re.DOTALL)[-1]
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported <= {"itertools", "json", "os", "numpy"}
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["read_checkpoint"]


def test_the_documented_reader(tmp_path: Path) -> None:
    """The reader in docs/format.md reads every type and kind of tensor, and notices a flipped bit."""
    tensors = of_every_kind(list(DTYPES))
    write(tmp_path, tensors, writers=3)
    found = documented_reader()(str(tmp_path))
    assert list(found) == list(tensors)
    for name, stored in tensors.items():
        assert found[name].shape == stored.content.shape
        assert found[name].tobytes() == stored.content.tobytes()
    pack = tmp_path / pack_path(1)
    content = bytearray(pack.read_bytes())
    content[3] ^= 1
    pack.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt"):
        documented_reader()(str(tmp_path))


def test_the_documented_reader_reads_what_save_writes(tmp_path: Path) -> None:
    """It reads a checkpoint of the library's own writer, tied and odd tensors among them."""
    import torch

    import shardckpt

    tied = torch.nn.Linear(3, 5, dtype=torch.bfloat16)
    state = {
        "model": tied,
        "tied": tied.weight.detach(),
        "none": torch.zeros(0, 4),
        "n": np.arange(3),
        "x": 1,
    }
    shardckpt.save(str(tmp_path / "c"), state)
    found = documented_reader()(str(tmp_path / "c"))
    weight = tied.weight.detach().view(torch.int16).numpy()
    assert found["model/weight"].tobytes() == found["tied"].tobytes() == weight.tobytes()
    assert found["none"].shape == (0, 4)
    assert found["n"].tolist() == [0, 1, 2]


def test_the_documented_example(tmp_path: Path) -> None:
    """The document's manifest and packs are a checkpoint, which holds what the document says."""
    manifest = re.findall(r"```json\n(.*?)```", _DOCUMENT, re.DOTALL)[-1].strip().encode()
    checked = decode_manifest(manifest, str(tmp_path))
    (tmp_path / MANIFEST).write_bytes(manifest)
    for line in re.findall(r"```text\n(.*?)```", _DOCUMENT, re.DOTALL)[-1].splitlines():
        if line.startswith("rank-"):
            path = tmp_path / line
            path.parent.mkdir()
            path.write_bytes(bytes(next(pack.size for pack in checked.packs if pack.path == line)))
            continue
        content = bytes.fromhex(line[5:53])
        whole_pack = bytearray(path.read_bytes())
        begin = int(line[:3], 16)
        whole_pack[begin : begin + len(content)] = content
        path.write_bytes(whole_pack)
        assert path.stat().st_size == 133
    found = documented_reader()(str(tmp_path))
    assert found["w"].tolist() == [[1.5, -2.0], [0.0, 4.0], [8.0, 0.5]]
    assert found["s"].tolist() == [10, 20, 30, 40, 50]
    refs = json.loads(encode_refs(checked, "/x"))["refs"]
    quoted = re.findall(r'`("[ws]/\S+: \[.*?\])`', _DOCUMENT.replace("\n", " "))
    assert len(quoted) == 2
    for text in quoted:
        ((key, reference),) = json.loads("{" + text + "}").items()
        assert refs[key] == reference
    (tmp_path / REFS).write_bytes(encode_refs(checked, str(tmp_path)))
    assert read(plain(tmp_path), "s").tolist() == [10, 20, 30, 40, 50]
    assert decode_value(checked.values)["betas"] == (0.9, 0.95)
    assert decode_value(checked.per_rank[1]["rng"]) == b"\x02"
