"""One file from any checkpoint, and any for another world size: bit-equal, streamed, all or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import shardckpt
from shardckpt.errors import (
    CheckpointExistsError,
    CorruptError,
    MissingKeysError,
    NotACheckpointError,
    StateError,
    StorageError,
    StorageFullError,
)
from shardckpt.format.box import Box, split_evenly
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.manifest import MANIFEST, Manifest, tied_names
from shardckpt.format.manifest_codec import decode_manifest
from shardckpt.format.save_plan import Layout, plan_save
from shardckpt.interop.export import merge
from shardckpt.interop.reshard import reshard
from shardckpt.loading.stream import iter_boxes, slabs
from shardckpt.run.commit import commit
from shardckpt.run.pack_writer import persist
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.storage import open_storage
from tests.kit.faults import FaultyStorage
from tests.kit.mounts import Mount
from tests.kit.servers import S3Server

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.block = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.block(self.embedding(tokens)))
        return out


def make_state() -> dict[str, Any]:
    """One of everything that a state can hold."""
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "types": {name: some(name) for name in DTYPES},
        "plain": {"none": None, "nan": float("nan"), "bytes": b"\0\xff", "big": 2**70, 1: [True, (1, "ü")]},
        "odd": [torch.tensor(2.5), torch.zeros(0, 4), torch.zeros(3, 0), np.arange(6).reshape(2, 3)],
        "rng": shardckpt.PerRank({"state": torch.arange(7), "count": 3}),
        "a/b": {"c/d": torch.ones(2)},
    }


def some(dtype: str) -> torch.Tensor:
    """Every bit pattern of one byte, as elements of this type."""
    if dtype == "bool":
        return torch.tensor([[True, False, True]])
    return torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(4, -1)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return make_state()


@pytest.fixture(scope="module")
def saved(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("saved") / "checkpoint")
    shardckpt.save(url, state, step=7, metrics={"loss": 1.5, "worst": float("inf")})
    return url


class TestTorchFile:
    def test_has_the_state_as_it_was_saved(self, saved: str, state: dict[str, Any], tmp_path: Path) -> None:
        """Nested, with plain values in place, and nothing that weights_only refuses."""
        merged = merge(saved, tmp_path / "out.pt")
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert list(found) == list(state)
        assert merged.tensors == len(shardckpt.open(saved).tensors)
        assert merged.nbytes == (tmp_path / "out.pt").stat().st_size
        for name, tensor in state["types"].items():
            assert same(found["types"][name], tensor), name
        plain = dict(found["plain"])
        assert np.isnan(plain.pop("nan"))
        assert plain == {"none": None, "bytes": b"\0\xff", "big": 2**70, 1: [True, (1, "ü")]}
        assert all(same(a, torch.as_tensor(b)) for a, b in zip(found["odd"], state["odd"], strict=True))
        assert [(list(rank["state"]), rank["count"]) for rank in found["rng"]] == [(list(range(7)), 3)]
        assert found["a/b"]["c/d"].tolist() == [1, 1]
        for name, entry in state["optimizer"].state_dict()["state"].items():
            group = found["optimizer"]["param_groups"][0]
            saved_entry = found["optimizer"]["state"][group["params"][name]]
            assert same(saved_entry["exp_avg"], entry["exp_avg"])

    def test_tied_tensors_stay_tied(self, saved: str, tmp_path: Path) -> None:
        merge(saved, tmp_path / "out.pt", only="model")
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert found["embedding.weight"].data_ptr() == found["head.weight"].data_ptr()
        model = Tied()
        model.load_state_dict(found)
        assert model.head.weight is model.embedding.weight

    def test_is_a_sound_archive_that_can_be_mapped(
        self, saved: str, state: dict[str, Any], tmp_path: Path
    ) -> None:
        """Its checksums are right, and every storage is aligned."""
        merge(saved, tmp_path / "out.pt")
        with zipfile.ZipFile(tmp_path / "out.pt") as archive:
            assert archive.testzip() is None
        found = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
        for name, tensor in state["types"].items():
            assert same(found["types"][name], tensor), name
            assert found["types"][name].data_ptr() % 64 == 0

    def test_select_makes_a_flat_dict(self, saved: str, state: dict[str, Any], tmp_path: Path) -> None:
        merge(saved, tmp_path / "out.pt", select=["model/block.*", "types/b*"])
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert set(found) == {"model/block.weight", "model/block.bias", "types/bool", "types/bfloat16"}
        assert same(found["model/block.bias"], state["model"].block.bias.data)

    def test_one_tensor(self, saved: str, tmp_path: Path) -> None:
        merge(saved, tmp_path / "out.pt", only="odd/0")
        assert torch.load(tmp_path / "out.pt", weights_only=True) == torch.tensor(2.5)


class TestSafetensors:
    def test_every_tensor_by_name(self, saved: str, state: dict[str, Any], tmp_path: Path) -> None:
        """Also tied ones, which the format cannot share, and types that its own package maps."""
        names = [name for name in shardckpt.open(saved).tensors if name != "types/complex128"]
        merged = merge(saved, tmp_path / "out.safetensors", select=[_escaped(name) for name in names])
        found = safetensors.torch.load_file(tmp_path / "out.safetensors")
        assert set(found) == set(names)
        assert merged.tensors == len(names)
        for name in DTYPES:
            if name != "complex128":
                assert same(found[f"types/{name}"], state["types"][name]), name
        weight = state["model"].embedding.weight.data
        assert same(found["model/embedding.weight"], weight)
        assert same(found["model/head.weight"], weight)
        assert found["odd/1"].shape == (0, 4)
        assert found["odd/0"].shape == ()
        content = (tmp_path / "out.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert length % 8 == 0
        for name, tensor in found.items():
            assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name

    def test_only_gives_names_that_the_model_takes(
        self, saved: str, state: dict[str, Any], tmp_path: Path
    ) -> None:
        merge(saved, tmp_path / "out.safetensors", only="model")
        model = Tied()
        model.load_state_dict(safetensors.torch.load_file(tmp_path / "out.safetensors"))
        assert all(map(same, model.state_dict().values(), state["model"].state_dict().values()))
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "step": "7"}

    def test_only_gives_keys_as_they_are(self, saved: str, tmp_path: Path) -> None:
        """A slash in a key is encoded in the checkpoint's names, and is a slash again here."""
        merge(saved, tmp_path / "out.safetensors", only="a%2Fb")
        assert set(safetensors.torch.load_file(tmp_path / "out.safetensors")) == {"c/d"}

    def test_a_type_that_the_format_lacks(self, saved: str, tmp_path: Path) -> None:
        with pytest.raises(StateError, match=r"'types/complex128' is complex128.*\.pt"):
            merge(saved, tmp_path / "out.safetensors")
        assert not list(tmp_path.iterdir())


class TestBadInput:
    """Each has a clear error, and nothing is written."""

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"only": "modell"}, MissingKeysError, r"'modell': the state has model, optimizer"),
            ({"only": "model/blok.weight"}, MissingKeysError, r"model has embedding\.weight"),
            ({"only": "plain/none/x"}, MissingKeysError, r"plain/none has nothing below it"),
            ({"select": ["*.weight", "none*"]}, MissingKeysError, r"'none\*'; .* has 43, like"),
            ({"out": "x.bin"}, ValueError, r"must end with \.safetensors or \.pt"),
            ({"out": "no/x.pt"}, StorageError, r"there is no folder .*/no"),
            ({"url": "nothing"}, NotACheckpointError, "nothing is there"),
        ],
    )
    def test_merge(
        self,
        saved: str,
        tmp_path: Path,
        arguments: dict[str, Any],
        error: type[Exception],
        text: str,
    ) -> None:
        url, out = arguments.pop("url", saved), arguments.pop("out", "x.pt")
        with pytest.raises(error, match=text):
            merge(url if url == saved else tmp_path / url, tmp_path / out, **arguments)
        assert not list(tmp_path.iterdir())

    def test_a_file_is_replaced_only_on_demand(self, saved: str, tmp_path: Path) -> None:
        out = tmp_path / "out.pt"
        out.write_text("mine")
        with pytest.raises(CheckpointExistsError, match=r"out\.pt exists already"):
            merge(saved, out)
        assert out.read_text() == "mine"
        merge(saved, out, only="model", overwrite=True)
        assert "block.bias" in torch.load(out, weights_only=True)
        with pytest.raises(CheckpointExistsError, match="is a folder"):
            (tmp_path / "folder.pt").mkdir()
            merge(saved, tmp_path / "folder.pt", overwrite=True)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_damage_leaves_what_was_there(self, tmp_path: Path, suffix: str) -> None:
        """A bit flip in the last tensor is found after most was written."""
        url = _damaged(tmp_path / "checkpoint")
        out = tmp_path / f"out{suffix}"
        out.write_text("mine")
        with pytest.raises(CorruptError, match=r"the chunk of 'c' at \[0\].*is corrupt"):
            merge(url, out, overwrite=True)
        assert out.read_text() == "mine"
        assert names(tmp_path) == ["checkpoint", out.name]

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_a_full_disk_is_found_before_anything_is_written(
        self, small_disk: Path, tmp_path: Path, suffix: str
    ) -> None:
        state = {name: torch.zeros(3 << 20, dtype=torch.uint8) for name in "ab"}
        shardckpt.save(tmp_path / "checkpoint", state)

        def progress(done: int, _: int) -> None:
            raise AssertionError(f"{done} bytes were written")

        with pytest.raises(StorageFullError, match=r"wanted 62\d{5} bytes, 4\d{6} are free"):
            merge(tmp_path / "checkpoint", small_disk / f"out{suffix}", progress=progress)
        with pytest.raises(StorageFullError, match="are free"):
            reshard(tmp_path / "checkpoint", small_disk / "out", 2, progress=progress)
        assert not list(small_disk.iterdir())

    @pytest.mark.parametrize("number", [0, -1, 2.5, True])
    def test_world_sizes_that_are_none(self, saved: str, tmp_path: Path, number: Any) -> None:
        with pytest.raises(ValueError, match="whole number of 1 or more"):
            reshard(saved, tmp_path / "out", number)
        assert not list(tmp_path.iterdir())


class TestReshard:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 8])
    def test_loads_bit_equal(
        self, saved: str, tmp_path: Path, state: dict[str, Any], world_size: int
    ) -> None:
        """With all values, metrics and the step; and plain Zarr reads the same."""
        made = reshard(saved, tmp_path / "out", world_size)
        found, source = shardckpt.open(made.url), shardckpt.open(saved)
        assert (found.step, found.metrics) == (7, {"loss": 1.5, "worst": float("inf")})
        assert found.manifest.world_size == world_size == len(found.manifest.packs)
        assert found.manifest.values == source.manifest.values
        assert list(found.tensors) == list(source.tensors)
        assert made.dropped == ()
        found.verify()
        for name in source.tensors:
            one, other = found.read(name), source.read(name)
            assert one.tobytes() == other.tobytes() and one.dtype == other.dtype, name
        assert np.array_equal(found.zarr()["model/block.weight"][:], source.read("model/block.weight"))
        loaded = make_state()
        for module in (loaded["model"],):
            nn.init.zeros_(module.block.weight)
        loaded["rng"].value["state"].zero_()
        shardckpt.load(made.url, loaded)
        assert same(loaded["model"].block.weight.data, state["model"].block.weight.data)
        assert loaded["rng"].value["state"].tolist() == list(range(7))

    def test_is_what_fully_shard_would_have_saved(self, tmp_path: Path) -> None:
        """The same boxes, on the same ranks, at the same places of their packs."""
        one, two = f"{tmp_path}/one", f"{tmp_path}/two"
        command = [sys.executable, "-c", SAVE_SHARDED]
        ranks = [subprocess.Popen([*command, str(rank), f"{tmp_path}/meet", one, two]) for rank in range(2)]
        assert [rank.wait(100) for rank in ranks] == [0, 0]
        found = shardckpt.open(reshard(one, tmp_path / "out", 2).url).manifest
        wanted = shardckpt.open(two).manifest
        assert found.tensors == wanted.tensors
        assert found.packs == wanted.packs
        assert (found.chunks.pack, found.chunks.offset) == (wanted.chunks.pack, wanted.chunks.offset)
        assert found.values == wanted.values

    def test_tied_tensors_are_stored_once(self, saved: str, tmp_path: Path) -> None:
        reshard(saved, tmp_path / "out", 3)
        manifest = shardckpt.open(tmp_path / "out").manifest
        assert tied_names(manifest) == {"model/head.weight": "model/embedding.weight"}

    def test_twice_is_the_same_as_once(self, saved: str, tmp_path: Path) -> None:
        reshard(saved, tmp_path / "3", 3)
        reshard(tmp_path / "3", tmp_path / "3-2", 2)
        reshard(saved, tmp_path / "2", 2)
        for rank in range(2):
            pack = f"rank-{rank:05d}/data.pack"
            assert (tmp_path / "3-2" / pack).read_bytes() == (tmp_path / "2" / pack).read_bytes()

    def test_per_rank_values_stay_with_their_rank(self, tmp_path: Path) -> None:
        """A smaller world has no place for the last ones, and says so; a larger one has none for the new."""
        values = [{"rng": {"n": rank, "t": {"$tensor": f"rng/rank-{rank:05d}/t"}}} for rank in range(3)]
        arrays = {f"rng/rank-{rank:05d}/t": np.full(2, rank) for rank in range(3)}
        layouts = [[_whole(name, arrays[name])] for name in arrays]
        write_checkpoint(
            tmp_path / "3", arrays, layouts, values={"rng": {"$per_rank": "rng"}}, per_rank=values
        )
        smaller = reshard(tmp_path / "3", tmp_path / "2", 2)
        assert smaller.dropped == (2,)
        found = shardckpt.open(smaller.url)
        assert [value["n"] for value in found.per_rank("rng")] == [0, 1]
        assert list(found.tensors) == ["rng/rank-00000/t", "rng/rank-00001/t"]
        assert found.manifest.packs[1].size == 2 * 8 + 4
        larger = reshard(smaller.url, tmp_path / "4", 4)
        assert larger.dropped == ()
        found = shardckpt.open(larger.url)
        assert [value["n"] for value in found.per_rank("rng")] == [0, 1]
        assert found.manifest.per_rank[2:] == [{}, {}]
        merge(larger.url, tmp_path / "out.pt")
        merged = torch.load(tmp_path / "out.pt", weights_only=True)
        assert [value["t"].tolist() for value in merged["rng"]] == [[0, 0], [1, 1]]

    def test_into_a_run(self, saved: str, tmp_path: Path) -> None:
        """The new checkpoint knows its attempt from where it is."""
        reshard(saved, tmp_path / "run/attempt-0004/step-00000007", 2)
        assert shardckpt.open(tmp_path / "run").manifest.attempt == 4

    def test_reports_progress_to_the_end(self, saved: str, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        reshard(saved, tmp_path / "out", 2, progress=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
        seen.clear()
        merged = merge(saved, tmp_path / "out.pt", progress=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] <= merged.nbytes

    def test_never_onto_anything(self, saved: str, tmp_path: Path) -> None:
        reshard(saved, tmp_path / "out", 1)
        before = (tmp_path / "out" / MANIFEST).read_bytes()
        with pytest.raises(CheckpointExistsError, match="has a checkpoint already"):
            reshard(saved, tmp_path / "out", 2)
        assert (tmp_path / "out" / MANIFEST).read_bytes() == before
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        with pytest.raises(CheckpointExistsError, match="is not empty: it has file"):
            reshard(saved, tmp_path / "other", 2)

    def test_damage_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptError, match="the chunk of 'c' at"):
            reshard(_damaged(tmp_path / "checkpoint"), tmp_path / "out", 2)
        assert names(tmp_path) == ["checkpoint"]

    def test_a_failure_at_any_call_leaves_nothing(self, saved: str) -> None:
        """Whatever the storage refuses, there is no checkpoint afterwards; and with no refusal there is."""
        for call in range(1, 100):
            url = f"memory://reshard-{uuid.uuid4().hex}"
            storage = FaultyStorage(open_storage(url), call, StorageFullError("no space"))
            try:
                reshard(saved, storage, 2)
            except StorageFullError:
                with pytest.raises(NotACheckpointError):
                    shardckpt.open(url)
                continue
            shardckpt.open(url).verify()
            break
        assert call > 5

    def test_to_and_from_s3(self, saved: str, tmp_path: Path, moto_s3: S3Server) -> None:
        url = moto_s3.url("reshard")
        made = reshard(saved, url, 3, out_storage_options=moto_s3.options)
        assert made.url == url
        back = reshard(url, tmp_path / "back", 1, storage_options=moto_s3.options)
        direct = reshard(saved, tmp_path / "direct", 1)
        packs = [Path(place.url, "rank-00000/data.pack").read_bytes() for place in (back, direct)]
        assert packs[0] == packs[1]
        merge(url, tmp_path / "out.pt", only="model", storage_options=moto_s3.options)
        assert "block.bias" in torch.load(tmp_path / "out.pt", weights_only=True)


SAVE_SHARDED = """
import sys
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
import shardckpt

def state(shard):
    # Rows that two ranks share evenly, unevenly, and not at all.
    model = nn.Sequential(nn.Embedding(101, 16), nn.Linear(16, 33), nn.LayerNorm(33), nn.Linear(33, 1))
    if shard:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}

if __name__ == "__main__":
    rank, rendezvous, one, two = sys.argv[1:]
    if rank == "0":
        shardckpt.save(one, state(False))
    torch.distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=int(rank), world_size=2)
    shardckpt.save(two, state(True))
    torch.distributed.destroy_process_group()
"""


def split(shape: Sequence[int], dims: Sequence[int], world: int) -> list[tuple[Box, ...]]:
    """For each of `world * world` ranks, its box of a tensor split over two dimensions of a mesh."""
    boxes = []
    for rank in range(world * world):
        runs = [((0, n),) for n in shape]
        for dim, index in zip(dims, divmod(rank, world), strict=True):
            if shape:
                runs[dim % len(shape)] = split_evenly(runs[dim % len(shape)], world, index)  # type: ignore[call-overload]
        if all(runs):
            boxes.append((Box(tuple(r[0][0] for r in runs), tuple(r[0][1] - r[0][0] for r in runs)),))
        else:
            boxes.append(())
    return boxes


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), max_size=3),
            st.tuples(st.integers(0, 2), st.integers(0, 2)),
            st.sampled_from(["bfloat16", "float8_e5m2", "int64", "bool", "float32"]),
        ),
        min_size=1,
        max_size=4,
    ),
    world=st.integers(1, 3),
    other=st.integers(1, 7),
)
def test_any_layout_merges_and_reshards(
    tmp_path: Path, tensors: list[tuple[list[int], tuple[int, int], str]], world: int, other: int
) -> None:
    """Boxes of one and two split dimensions, also uneven, empty ones, scalars, and any new world size."""
    folder = tmp_path / uuid.uuid4().hex
    arrays, layouts = {}, [[] for _ in range(world * world)]  # type: ignore[var-annotated]
    for number, (shape, dims, dtype) in enumerate(tensors):
        count = int(np.prod(shape, dtype=int))
        content = np.arange(1, count * numpy_dtype(dtype).itemsize + 1).astype(np.uint8)
        content &= 1 if dtype == "bool" else 0x7F
        name = f"t{number}"
        arrays[name] = content.view(numpy_dtype(dtype)).reshape(shape)
        for rank, boxes in enumerate(split(shape, dims, world)):
            layouts[rank].append(Layout(name, dtype, tuple(shape), boxes))
    write_checkpoint(folder / "in", arrays, layouts)
    reshard(folder / "in", folder / "out", other)
    found = shardckpt.open(folder / "out")
    assert found.manifest.world_size == other
    for url in (folder / "in", folder / "out"):
        merge(url, folder / "out.safetensors", overwrite=True)
        merge(url, folder / "out.pt", overwrite=True)
        merged = safetensors.torch.load_file(folder / "out.safetensors")
        state = torch.load(folder / "out.pt", weights_only=True)
        for name, array in arrays.items():
            for tensor in (merged[name], state[name]):
                assert tuple(tensor.shape) == array.shape
                assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    for name, array in arrays.items():
        assert found.read(name).tobytes() == array.tobytes()
        if array.ndim and array.size:  # as fully_shard splits, row after row
            rows = -(-array.shape[0] // other)
            assert found.tensors[name].arrays[0].chunk == (rows, *array.shape[1:])


class TestStreaming:
    def test_slabs_cut_no_chunk_and_cover_all(self, tmp_path: Path) -> None:
        """A tensor of several slabs: each is a run of whole rows, and they read as the tensor."""
        array = np.arange(40 << 18, dtype=np.float64).reshape(-1, 64)  # 80 MiB
        layouts = [[Layout("t", "float64", array.shape, boxes)] for boxes in split(array.shape, (0, 1), 2)]
        manifest = write_checkpoint(tmp_path / "in", {"t": array}, layouts)
        (tensor,) = manifest.tensors
        cut = slabs(tensor)
        assert len(cut) > 1
        assert [box.shape[1] for box in cut] == [64] * len(cut)
        place = Place(open_storage(tmp_path / "in"))
        pieces = list(iter_boxes(place, manifest, [("t", box) for box in cut]))
        assert np.array_equal(np.concatenate(pieces), array)

    def test_each_chunk_is_read_once(self) -> None:
        """Also where boxes lie across chunks: a remote checkpoint is fetched once, not once for each rank."""
        array = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
        storage = FaultyStorage(open_storage(f"memory://{uuid.uuid4().hex}"))
        columns = [[Layout("t", "float32", (64, 64), boxes)] for boxes in split((64, 64), (1, 1), 2)]
        manifest = write_checkpoint(storage, {"t": array}, columns)
        storage.calls.clear()
        rows = [("t", Box((start, 0), (1, 64))) for start in range(64)]
        assert np.array_equal(np.concatenate(list(iter_boxes(Place(storage), manifest, rows))), array)
        assert len([call for call in storage.calls if call[0] == "read_into"]) == 4

    @pytest.mark.parametrize(
        "work",
        [
            "merge(source, target + '.safetensors')",
            "merge(source, target + '.pt')",
            "reshard(source, target, 3)",
        ],
    )
    def test_memory_is_bounded_by_the_largest_tensor(self, big: str, tmp_path: Path, work: str) -> None:
        """A checkpoint of 240 MiB in tensors of 24 MiB takes less than half of it."""
        code = f"""
            import resource, sys
            source, target = sys.argv[1:]
            from shardckpt.interop.export import merge
            from shardckpt.interop.reshard import reshard
            import shardckpt.interop.formats.torch_pt
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            {work}
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
        command = [sys.executable, "-c", textwrap.dedent(code), big, str(tmp_path / "out")]
        kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert kib < 110 << 10


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("big")
    state = {f"t{i}": torch.full((6 << 10, 1 << 10), float(i)) for i in range(10)}
    shardckpt.save(folder, state)
    yield str(folder)
    (folder / "rank-00000/data.pack").unlink()


def write_checkpoint(
    url: Any,
    arrays: dict[str, np.ndarray[Any, Any]],
    layouts: list[list[Layout]],
    *,
    values: Any = None,
    per_rank: list[dict[str, Any]] | None = None,
) -> Manifest:
    """Save as ranks with these layouts would, in one process."""
    plan = plan_save(layouts)
    place = Place(open_storage(url))
    tree = {name: {"$tensor": name} for name in arrays} if values is None else values
    proposal = Proposal(SaveInfo(uuid.uuid4().hex, "", 1, 0, len(plan.pack_sizes)), {}, tree, plan)
    for rank, nbytes in enumerate(plan.pack_sizes):
        content = memoryview(bytearray(nbytes))
        for write in plan.writes(rank):
            chunk = np.zeros(write.chunk, numpy_dtype(write.dtype))
            chunk[tuple(slice(0, n) for n in write.box.shape)] = arrays[write.name][write.box.slices]
            _, offset, nbytes = write.location
            content[offset : offset + nbytes] = chunk.tobytes()
        persist(
            place.storage,
            content,
            plan.locations(rank),
            save_id=proposal.info.id,
            rank=rank,
            per_rank=per_rank[rank] if per_rank else {},
        )
    commit(place, proposal, 5)
    return decode_manifest(place.storage.read(MANIFEST), place.url)


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def _whole(name: str, array: np.ndarray[Any, Any]) -> Layout:
    return Layout(name, str(array.dtype), array.shape, (Box.whole(array.shape),))


def _damaged(folder: Path) -> str:
    """A checkpoint with a flipped bit in its last tensor, 'c'."""
    shardckpt.save(folder, {name: torch.zeros(40 << 18) for name in "abc"})
    offset = shardckpt.open(folder).manifest.chunks.offset[-3]
    with open(folder / "rank-00000/data.pack", "r+b") as file:
        file.seek(offset + 5)
        file.write(b"\x01")
    return str(folder)


def _escaped(name: str) -> str:
    return name.replace("[", "[[]")


@pytest.fixture
def small_disk(tmp_path: Path, mounts: Mount) -> Path:
    """A file system with 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts("tmpfs", folder, "size=4m")
    return folder
