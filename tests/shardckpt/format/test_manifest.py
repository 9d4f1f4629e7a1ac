"""The manifest and the part: what is written is read, and what is wrong is refused with a reason."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import FormatError, UnknownVersionError
from shardckpt.format import records
from shardckpt.format.box import Box
from shardckpt.format.chunks import chunk_bytes
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.manifest import (
    FORMAT,
    ArrayEntry,
    Chunks,
    Manifest,
    Pack,
    Part,
    TensorEntry,
    WrittenPack,
    marked_rank,
    marker_path,
    pack_path,
    part_path,
    parts_folder,
    parts_of,
)
from shardckpt.format.manifest_codec import (
    decode_checked,
    decode_manifest,
    decode_part,
    encode_checked,
    encode_record,
)

IN_RUN = "s3://bucket/run/attempt-0003/step-00000150"
ALONE = "/data/checkpoint"

_quick = settings(deadline=None, max_examples=100)


def laid_out(tensors: list[TensorEntry], writers: int = 1, **head: Any) -> Manifest:
    """A valid manifest of these tensors, their chunks dealt out and laid one behind another."""
    sizes = [0] * writers
    rows: list[tuple[int, int, int]] = []
    for tensor in tensors:
        for array in tensor.arrays:
            for _ in array.cells():
                pack = len(rows) % writers
                rows.append((pack, sizes[pack], (1 << 32) - 1 - len(rows)))
                sizes[pack] += chunk_bytes(tensor.dtype, array.chunk) + 60
    given_head = {
        "id": "ab",
        "step": 150,
        "attempt": 3,
        "created": 1.5,
        "writer": "test",
        "metrics": {},
        "values": {f"v{i}": {"$tensor": tensor.name} for i, tensor in enumerate(tensors)},
        "per_rank": [{} for _ in range(writers)],
    }
    return Manifest(
        **{**given_head, **head},  # type: ignore[arg-type]
        world_size=writers,
        packs=tuple(Pack(pack_path(rank), size) for rank, size in enumerate(sizes)),
        tensors=tuple(tensors),
        chunks=Chunks(*np.array(rows, dtype=np.int64).reshape(-1, 3).T),
    )


def one_array(name: str, dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, dtype, shape, (ArrayEntry((0,) * len(shape), shape, chunk),))


@st.composite
def _tensors(draw: st.DrawFn, name: str) -> TensorEntry:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    parts = tuple(draw(st.integers(1, 4)) for _ in shape)
    boxes = [Box.whole(shape)] if draw(st.booleans()) else list(Box.whole(shape).cells(parts))
    arrays = tuple(
        ArrayEntry(box.offsets, box.shape, tuple(draw(st.integers(1, max(n, 1))) for n in box.shape))
        for box in boxes
    )
    return TensorEntry(name, dtype, shape, arrays)


_keys = st.text().filter(lambda key: not key.startswith("$"))


@st.composite
def _manifests(draw: st.DrawFn) -> Manifest:
    names = draw(
        st.lists(st.sampled_from(["w", "model/a", "model/b.c", "x y/%2F/1", "%C3%A9"]), unique=True)
    )
    return laid_out(
        [draw(_tensors(name)) for name in names],
        draw(st.integers(1, 3)),
        values={
            **draw(st.dictionaries(_keys, st.none() | st.integers(-9, 9) | st.text(), max_size=3)),
            "the tensors": [{"$tensor": name} for name in names],
        },
        metrics=draw(
            st.dictionaries(
                st.text(),
                st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["nan", "inf", "-inf"]),
                max_size=2,
            )
        ),
    )


@_quick
@given(_manifests(), st.sampled_from([IN_RUN, ALONE]))
def test_round_trip(manifest: Manifest, where: str) -> None:
    """Any manifest comes back as it was."""
    back = decode_manifest(encode_record(manifest), where)
    assert back == manifest
    assert len(back.first_rows) == 1 + sum(len(tensor.arrays) for tensor in back.tensors)
    assert back.first_rows[-1] == len(back.chunks.pack)
    assert set(back.metric_values) == set(manifest.metrics)
    assert all(isinstance(value, float) for value in back.metric_values.values())


@_quick
@given(_manifests())
def test_a_checked_manifest_is_passed_on(manifest: Manifest) -> None:
    """To ranks that decode it without a look at the record."""
    assert decode_checked(encode_checked(manifest)) == manifest


@pytest.mark.parametrize("where", ["top", "table"])
def test_members_of_one_name_are_found_beside_the_table(where: str) -> None:
    """The chunk table is left out of the search only where it stands as it is written."""
    document = records.open_sealed(encode_record(laid_out([one_array("a", "int8", (4,), (2,))])), "")
    if where == "top":
        document = document.replace(b'{"format"', b'{"step":150,"format"', 1)
    else:
        document = document.replace(b'"offset":[0,66]', b'"offset":[0,66],"offset":[0,66]', 1)
    with pytest.raises(FormatError, match="an object has two members named"):
        decode_manifest(records.encode(msgspec.Raw(document)), ALONE)


@_quick
@given(
    st.lists(st.integers(0, (1 << 32) - 1), max_size=4), st.dictionaries(st.text(), st.text(), max_size=2)
)
def test_part_round_trip(numbers: list[int], values: dict[str, Any]) -> None:
    """Any part comes back as it was."""
    pack = WrittenPack(rank=2, size=9, chunk=numbers, offset=numbers, crc32c=numbers, values=values)
    part = Part(id="x", packs=[pack, msgspec.structs.replace(pack, rank=3)])
    assert decode_part(encode_record(part), IN_RUN) == part


def test_paths() -> None:
    """Each rank has a folder of its own, and each save one for its parts and markers."""
    assert pack_path(7) == "rank-00007/data.pack"
    assert part_path("ab-1", 123456) == "parts-ab-1/rank-123456.json"
    assert marker_path("ab-1", 7) == "parts-ab-1/rank-00007.failed.json"
    assert parts_of(parts_folder("ab-1")) == "ab-1"
    assert parts_of("rank-00000") is None


def test_markers_are_known_by_their_names() -> None:
    name = marker_path("x", 123456).rpartition("/")[2]
    assert marked_rank(name) == 123456
    assert marked_rank(part_path("x", 0).rpartition("/")[2]) is None
    assert marked_rank("failed.json") is None


def record(where: str = IN_RUN) -> dict[str, Any]:
    """A valid manifest as JSON: an array in two chunks, a group of two boxes, a scalar; two packs."""
    boxes = (ArrayEntry((0, 0), (1, 3), (1, 3)), ArrayEntry((1, 0), (3, 3), (3, 3)))
    manifest = laid_out(
        [
            one_array("model/w", "float32", (4,), (2,)),
            TensorEntry("model/s", "int8", (4, 3), boxes),
            one_array("n", "int64", (), ()),
        ],
        writers=2,
    )
    decode_manifest(encode_record(manifest), where)
    found = json.loads(encode_record(manifest))
    assert found.popitem()[0] == "crc32c"
    assert isinstance(found, dict)
    return found


def refuse(data: dict[str, Any] | bytes, message: str, where: str = IN_RUN) -> None:
    content = data if isinstance(data, bytes) else records.encode(data)
    with pytest.raises(FormatError, match=message) as caught:
        decode_manifest(content, where)
    assert str(caught.value).startswith(where)


Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda m: m.update(more=1), "unknown field `more`", id="unknown key"),
        pytest.param(lambda m: m.pop("step"), "missing required field `step`", id="missing key"),
        pytest.param(lambda m: m.update(step="1"), "Expected `int`, got `str`", id="wrong type"),
        pytest.param(lambda m: m.update(step=1.5), "Expected `int`, got `float`", id="fraction"),
        pytest.param(lambda m: m.update(step=True), "Expected `int`, got `bool`", id="truth"),
        pytest.param(lambda m: m["tensors"][0].update(codec="x"), "unknown field `codec`", id="codec"),
        pytest.param(
            lambda m: m["tensors"][1]["arrays"][0].update(x=1), "unknown field `x`", id="array key"
        ),
        pytest.param(lambda m: m["packs"][0].update(x=1), "unknown field `x`", id="pack key"),
        pytest.param(lambda m: m["chunks"].update(x=[]), "unknown field `x`", id="table key"),
        pytest.param(lambda m: m.update(step=-1), "step -1, attempt 3, world size 2", id="step"),
        pytest.param(lambda m: m.update(attempt=-1), "step 150, attempt -1", id="attempt"),
        pytest.param(lambda m: m.update(world_size=0), "world size 0", id="no world"),
        pytest.param(lambda m: m.update(world_size=3), "values of 2 ranks of 3", id="per rank"),
        pytest.param(
            lambda m: m["metrics"].update(loss="low"), "metric 'loss' is 'low', which is not", id="metric"
        ),
        pytest.param(
            lambda m: m["packs"][0].update(size=-1), "'rank-00000/data.pack' has the size -1", id="size"
        ),
        pytest.param(
            lambda m: m["tensors"][2].update(name="model/w"), "lists tensor 'model/w' twice", id="twice"
        ),
        pytest.param(
            lambda m: m["tensors"][2].update(name="model"),
            "a tensor lies inside tensor 'model'",
            id="inside",
        ),
        pytest.param(
            lambda m: m["tensors"][2].update(name="model/s/box-0"),
            "a tensor lies inside tensor 'model/s'",
            id="inside a group of boxes",
        ),
        pytest.param(
            lambda m: m["tensors"][0].update(dtype="float128"), "has the type 'float128'", id="type"
        ),
        pytest.param(lambda m: m["tensors"][0].update(shape=[-4]), r"has the shape \(-4,\)", id="shape"),
        pytest.param(lambda m: m["tensors"][0].update(shape=[1 << 70]), "has the shape", id="huge shape"),
        pytest.param(
            lambda m: m["tensors"][0].update(shape=[1 << 40, 0, 1 << 40]),
            "has the shape",
            id="huge empty shape",
        ),
        pytest.param(
            lambda m: m["tensors"][0].update(shape=[5]), "is not tiled exactly", id="missing cells"
        ),
        pytest.param(lambda m: m["tensors"][0].update(shape=[3]), "is not inside it", id="box outside"),
        pytest.param(lambda m: m["tensors"][0].update(shape=[4, 1]), "is not inside it", id="rank"),
        pytest.param(
            lambda m: m["tensors"][0]["arrays"][0].update(offset=[-1]),
            "is not inside it",
            id="negative offset",
        ),
        pytest.param(
            lambda m: m["tensors"][0]["arrays"][0].update(offset=[]), "is not inside it", id="no offset"
        ),
        pytest.param(
            lambda m: m["tensors"][1]["arrays"][0].update(offset=[1, 0]),
            "is not tiled exactly",
            id="overlap",
        ),
        pytest.param(lambda m: m["tensors"][1]["arrays"].pop(), "is not tiled exactly", id="no box"),
        pytest.param(lambda m: m["tensors"][1].update(arrays=[]), "is not tiled exactly", id="no boxes"),
        pytest.param(
            lambda m: m["tensors"][1]["arrays"].append(m["tensors"][1]["arrays"][0]),
            "is not tiled exactly",
            id="box twice",
        ),
        pytest.param(
            lambda m: m["tensors"][0]["arrays"][0].update(chunk=[0]),
            r"chunk shape \(0,\) for \(4,\)",
            id="chunk 0",
        ),
        pytest.param(
            lambda m: m["tensors"][0]["arrays"][0].update(chunk=[5]),
            r"chunk shape \(5,\) for \(4,\)",
            id="chunk 5",
        ),
        pytest.param(
            lambda m: m["tensors"][0]["arrays"][0].update(chunk=[2, 1]),
            "has the chunk shape",
            id="chunk rank",
        ),
        pytest.param(
            lambda m: m["tensors"][0]["arrays"][0].update(chunk=[1]),
            "6 chunks.* 5 chunks|7 chunks",
            id="grid",
        ),
        pytest.param(lambda m: m["chunks"]["pack"].pop(), "5 chunks.* 4 packs, 5 offsets", id="no pack"),
        pytest.param(lambda m: m["chunks"]["offset"].append(0), "5 packs, 6 offsets", id="more offsets"),
        pytest.param(lambda m: m["chunks"]["crc32c"].pop(), "5 offsets and 4 checksums", id="no checksum"),
        pytest.param(
            lambda m: m["chunks"]["pack"].__setitem__(0, 2), "pack number .* out of range", id="pack 2"
        ),
        pytest.param(
            lambda m: m["chunks"]["pack"].__setitem__(0, -1), "pack number .* out of range", id="pack -1"
        ),
        pytest.param(lambda m: m.update(packs=[]), "pack number .* out of range", id="no packs"),
        pytest.param(
            lambda m: m["chunks"]["crc32c"].__setitem__(0, 1 << 32), "checksum out of range", id="checksum"
        ),
        pytest.param(
            lambda m: m["chunks"]["crc32c"].__setitem__(0, -1), "checksum out of range", id="checksum -1"
        ),
        pytest.param(
            lambda m: m["chunks"]["offset"].__setitem__(2, -1),
            "chunk 2 lies at byte -1 of pack",
            id="offset -1",
        ),
        pytest.param(
            lambda m: m["chunks"]["offset"].__setitem__(1, 500),
            "chunk 1 lies at byte 500 .* has",
            id="beyond",
        ),
        pytest.param(
            lambda m: m["chunks"]["offset"].__setitem__(1, (1 << 63) - 1),
            "chunk 1 lies at byte 9",
            id="far beyond",
        ),
        pytest.param(
            lambda m: m["chunks"]["offset"].__setitem__(1, 1 << 63),
            "a number of the chunk table is out of range",
            id="offset 2^63",
        ),
        pytest.param(
            lambda m: m["packs"][0].update(size=1 << 64),
            "a number is out of range",
            id="pack of 2^64 bytes",
        ),
        pytest.param(
            lambda m: m["packs"][0].update(size=m["packs"][0]["size"] - 61),
            "lies at byte .* which has",
            id="short",
        ),
        pytest.param(
            lambda m: m["chunks"]["offset"].__setitem__(2, 4),
            "two of its chunks overlap in a pack",
            id="overlap",
        ),
        pytest.param(
            lambda m: m["chunks"]["offset"].__setitem__(2, 0),
            "two of its chunks overlap",
            id="same place, longer",
        ),
    ],
)
def test_refusals(edit: Edit, message: str) -> None:
    """Each way in which a manifest can be wrong is refused, and the message says what is wrong."""
    manifest = record()
    edit(manifest)
    refuse(manifest, message)


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "a//b", "/a", "a/", ".", "..", "a/../b", "a/...", "zarr.json", "a/zarr.json"),
        *("__a", "a/__b", "a\\b", "a\0b", "a\nb", "a\x7fb"),
    ],
)
def test_names_that_no_node_can_have(name: str) -> None:
    """A tensor's name is a legal path of a Zarr hierarchy."""
    manifest = record()
    manifest["tensors"][0]["name"] = name
    refuse(manifest, "cannot be a tensor's name")


@pytest.mark.parametrize("file", ["manifest", "part"])
def test_other_versions(file: str) -> None:
    """Another version is refused as such, whatever else it may hold."""
    decode = decode_manifest if file == "manifest" else decode_part
    for version in ("shardckpt/2", "shardckpt/1.1", "", "other"):
        data = json.dumps({"format": version, "new": {"a": 1}}).encode()
        with pytest.raises(
            UnknownVersionError, match="this version reads 'shardckpt/1' only; read it with"
        ):
            decode(data, IN_RUN)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"format": 1}',
        b'{"format": "shardckpt/1"}',
        b'{"format": "shardckpt/1", "id": NaN}',
        b"\xff\xfe",
        b'{"format": "\xff"}',
        b'{"format": "shardckpt/1"}{}',
        b"[" * 100_000,
        b'{"format": "shardckpt/1", "values": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format": "shardckpt/1", "step": ' + b"9" * 5000 + b"}",
    ],
    ids=range(14),
)
def test_not_a_record(data: bytes) -> None:
    """What is not JSON, not UTF-8, or nested or long beyond reason is refused, and crashes nothing."""
    refuse(data, "manifest.json is not a valid shardckpt/1 record")
    with pytest.raises(FormatError, match=r"a part is not a valid shardckpt/1 record"):
        decode_part(data, IN_RUN)


def test_truncated() -> None:
    """No prefix of a manifest is one."""
    data = records.encode(record())
    for length in range(len(data)):
        refuse(data[:length], "is not a valid shardckpt/1 record")


OUTSIDE = [
    "/etc/passwd",
    "//etc/passwd",
    "",
    ".",
    "..",
    "../",
    "./data.pack",
    "a/./b",
    "a//b",
    "a/",
    "a/../data.pack",
    "a/../../data.pack",
    "../../../other/data.pack",
    "../../../../etc/passwd",
    "../..",
    "rank-00000/../../../../data.pack",
    "a\0b",
    "a\\b",
    "..\\..\\b",
    "s3://other/data.pack",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("where", [IN_RUN, ALONE])
def test_packs_outside_the_run(path: str, where: str) -> None:
    """A path that leaves the run, or that is not in its plain form, is refused."""
    manifest = record(where)
    manifest["packs"][0]["path"] = path
    refuse(manifest, "which is not a plain path inside this run", where)


@pytest.mark.parametrize(
    "path", ["../../attempt-0001/step-00000001/rank-00000/data.pack", "../step-1/x", "../x"]
)
@pytest.mark.parametrize(
    ("where", "in_run"),
    [
        (IN_RUN, True),
        (IN_RUN + "/", True),
        ("attempt-0003/step-00000150", True),
        ("/data/attempt-0003-0a1b/step-00000150", True),
        (ALONE, False),
        ("/data/attempt-0003/step-00000150/copy", False),
        ("/data/my-attempt-0003/step-00000150", False),
        ("/data/attempt-0003/my-step-00000150", False),
        ("/data/attempt-x/step-00000150", False),
        ("", False),
    ],
)
def test_packs_of_older_steps(path: str, where: str, in_run: bool) -> None:
    """A checkpoint in a run may name packs of the same run; one that lies alone names its own only."""
    manifest = record(IN_RUN)
    manifest["packs"][0]["path"] = path
    if in_run:
        assert decode_manifest(records.encode(manifest), where).packs[0].path == path
    else:
        refuse(manifest, "which is not a plain path inside this run", where)


def test_shared_chunks() -> None:
    """Tied tensors have the same chunks: allowed if they are wholly the same."""
    manifest = laid_out([one_array("a", "float32", (4,), (2,)), one_array("b", "float32", (4,), (2,))])
    manifest.chunks.offset[2:] = manifest.chunks.offset[:2]
    assert decode_manifest(encode_record(manifest), IN_RUN) == manifest
    manifest.chunks.offset[2] += 1
    with pytest.raises(FormatError, match="overlap"):
        decode_manifest(encode_record(manifest), IN_RUN)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p.update(more=1), "unknown field `more`"),
        (lambda p: p.pop("size"), "missing required field `size`"),
        (lambda p: p.update(rank="0"), "Expected `int`, got `str`"),
        (lambda p: p["chunk"].append(1), "chunk columns of different lengths"),
        (lambda p: p["offset"].append(1), "chunk columns of different lengths"),
        (lambda p: p.update(crc32c=[]), "chunk columns of different lengths"),
        (lambda p: p.update(rank=-1), "a number is out of range"),
        (lambda p: p.update(size=-1), "a number is out of range"),
        (lambda p: p.update(chunk=[-1]), "a number is out of range"),
        (lambda p: p.update(offset=[-1]), "a number is out of range"),
        (lambda p: p.update(crc32c=[1 << 32]), "a number is out of range"),
    ],
)
def test_part_refusals(edit: Edit, message: str) -> None:
    """A part is read as strictly as a manifest."""
    pack = {"rank": 0, "size": 8, "chunk": [0], "offset": [0], "crc32c": [1], "values": {}}
    part = {"format": FORMAT, "id": "x", "packs": [pack]}
    decode_part(records.encode(part), IN_RUN)
    edit(pack)
    with pytest.raises(FormatError, match=message) as caught:
        decode_part(records.encode(part), IN_RUN)
    assert str(caught.value).startswith(IN_RUN)


def test_a_million_chunks(record_property: Callable[[str, object], None]) -> None:
    """A table for 10^6 chunks takes tens of megabytes and about a second."""
    tensors = [one_array(f"model/layers.{i}.weight", "float32", (4000, 8), (4, 8)) for i in range(1000)]
    manifest = laid_out(tensors, writers=8)
    started = time.perf_counter()
    data = encode_record(manifest)
    encoded = time.perf_counter()
    back = decode_manifest(data, IN_RUN)
    decoded = time.perf_counter()
    record_property("megabytes", round(len(data) / 1e6, 1))
    record_property("encode_seconds", round(encoded - started, 2))
    record_property("decode_seconds", round(decoded - encoded, 2))
    print(f"{len(data) / 1e6:.1f} MB, encode {encoded - started:.2f} s, decode {decoded - encoded:.2f} s")
    assert len(back.chunks.offset) == 1_000_000
    assert back.nbytes == 1000 * 4000 * 8 * 4
    assert len(data) < 40e6
    assert math.isclose(back.stored_bytes, 1_000_000 * (128 + 64))
