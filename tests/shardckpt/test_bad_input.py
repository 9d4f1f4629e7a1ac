"""Bad input to the library: a clear error on every rank, and nothing changed."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import shardckpt
from shardckpt.errors import (
    CorruptError,
    CredentialsError,
    FormatError,
    MissingKeysError,
    NotACheckpointError,
    RankMismatchError,
    SaveError,
    ShapeMismatchError,
    ShardckptError,
    StateError,
    StorageError,
    StorageFullError,
    UnknownVersionError,
    UnsupportedValueError,
)
from shardckpt.format import records
from shardckpt.loading.load import load_place
from shardckpt.run.places import Place
from shardckpt.saving.session import SaveSession
from shardckpt.storage import Storage, open_storage
from tests.kit.mounts import Mount
from tests.kit.servers import S3Server
from tests.kit.worlds import PeerGoneError, ThreadRanks, outcomes, run_processes, run_threads, start_save

State = dict[str, Any]


def start(root: Storage, ranks: ThreadRanks, state: State) -> None:
    """`shardckpt.save` among ranks that are threads."""
    start_save(SaveSession(ranks, 60), root, state).wait()


def load(root: Storage, ranks: ThreadRanks, state: State) -> None:
    """`shardckpt.load` among ranks that are threads."""
    load_place(Place(root), state, ranks, strict=True, started=0.0)


def training() -> State:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": 3, "names": ["a", {"b": None}]}


def content(state: State) -> str:
    """All of a state, to see whether it changes."""
    tree = {**state, "model": state["model"].state_dict(), "optimizer": state["optimizer"].state_dict()}
    return repr(tree)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of `training`."""
    path = tmp_path / "checkpoint"
    shardckpt.save(path, training(), step=3)
    return path


def assert_refused(path: Path, kind: type[ShardckptError], *parts: str) -> None:
    """Loading raises this, with these parts in the message, and the state is what it was."""
    state = training()
    before = content(state)
    with pytest.raises(kind) as caught:
        shardckpt.load(path, state)
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert content(state) == before


# -- where no checkpoint is


def test_nothing_there(tmp_path: Path) -> None:
    """A path that does not exist: an error that names it and what to do; open and load, run or checkpoint."""
    for path in (tmp_path / "none", tmp_path / "run" / "attempt-0001" / "step-00000001"):
        for function in (lambda p: shardckpt.load(p, {}), shardckpt.open):
            with pytest.raises(NotACheckpointError, match=str(path)):
                function(path)
        assert not path.exists()
    with pytest.raises(FileNotFoundError):  # also for those who know nothing of this library's errors
        shardckpt.load(tmp_path / "none", {})


def test_something_else_there(tmp_path: Path) -> None:
    """A folder of other files, a file, and a run without a finished save: the error tells which."""
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(NotACheckpointError, match=r"it has model\.pt, but no manifest\.json"):
        shardckpt.load(tmp_path, {})
    with pytest.raises(NotACheckpointError, match=r"model\.pt"):
        shardckpt.load(tmp_path / "model.pt", {})
    (tmp_path / "run" / "attempt-0001" / "step-00000001").mkdir(parents=True)
    with pytest.raises(NotACheckpointError, match="no save in it was ever finished"):
        shardckpt.load(tmp_path / "run", {})


@pytest.mark.parametrize("url", ["nowhere://x/y", ""])
def test_urls_that_make_no_sense(url: str) -> None:
    """An unknown protocol or an empty URL is refused by save and load alike."""
    for function in (shardckpt.save, shardckpt.load):
        with pytest.raises(StorageError):
            function(url, {})


def test_no_credentials(moto_s3: S3Server) -> None:
    """Without credentials: an error that tells where they would be taken from."""
    options = {"endpoint_url": moto_s3.endpoint}
    for function in (shardckpt.save, shardckpt.load):
        with pytest.raises((CredentialsError, SaveError), match="AWS_ACCESS_KEY_ID"):
            function(moto_s3.url(), {}, storage_options=options)


def test_what_the_storage_refuses_is_told_without_what_is_below(
    moto_s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sentence about the URL that was given, and the user's line; the rest is in the log at debug level."""
    caplog.set_level("DEBUG", "shardckpt")
    options = {"endpoint_url": moto_s3.endpoint}
    url = moto_s3.url()
    checkpointer = shardckpt.Checkpointer(url, storage_options=options, snapshots=0)
    for function in (
        lambda: checkpointer.restore({}),
        lambda: shardckpt.load(url, {}, storage_options=options),
        lambda: shardckpt.open(url, options),
        lambda: shardckpt.Checkpointer("s3:/bucket/run"),
        lambda: shardckpt.load(tmp_path / "none", {}),
    ):
        caplog.clear()
        with pytest.raises(ShardckptError) as caught:
            function()
        assert type(caught.value).__module__ == "shardckpt.errors"
        assert ".shardckpt-" not in str(caught.value)
        told = "".join(traceback.format_exception(caught.value))
        assert told.count("Traceback") == 1
        assert len(told.splitlines()) < 12
        assert "Traceback" in caplog.text


# -- what is stored is not what was written


def pack_of(path: Path, rank: int = 0) -> Path:
    return path / f"rank-{rank:05d}" / "data.pack"


def test_a_flipped_bit(saved: Path) -> None:
    """Any bit of any chunk or its checksum: the error names the tensor, the place in it, and the pack."""
    manifest = json.loads((saved / "manifest.json").read_bytes())
    original = pack_of(saved).read_bytes()
    row = 0
    for tensor in manifest["tensors"]:
        if not all(tensor["shape"]):
            continue
        offset = manifest["chunks"]["offset"][row]
        row += 1
        for byte in (offset, offset + 3):
            damaged = bytearray(original)
            damaged[byte] ^= 0x10
            pack_of(saved).write_bytes(damaged)
            name = tensor["name"]
            assert_refused(saved, CorruptError, repr(name), "rank-00000/data.pack", f"byte {offset}")
            with pytest.raises(CorruptError, match=name):
                shardckpt.open(saved).verify()
            with pytest.raises(CorruptError, match=name):
                shardckpt.open(saved).read(name)
    assert row == len(manifest["chunks"]["offset"]) > 10
    damaged = bytearray(original)
    damaged[-1] ^= 1  # the last checksum
    pack_of(saved).write_bytes(damaged)
    assert_refused(saved, CorruptError, "rank-00000/data.pack")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_truncated_pack(size: int, saved: Path) -> None:
    """The error names the pack, both sizes, and the first chunk that is lost."""
    whole = pack_of(saved).read_bytes()
    pack_of(saved).write_bytes(whole[:size])
    found = len(whole[:size])
    assert_refused(
        saved, CorruptError, "rank-00000/data.pack", f"{found} bytes", str(len(whole)), "chunk of '"
    )


def test_a_missing_pack(saved: Path) -> None:
    """A pack that is gone is corruption, and is named."""
    pack_of(saved).unlink()
    assert_refused(saved, CorruptError, "rank-00000/data.pack is missing")


def test_a_pack_that_grew(saved: Path) -> None:
    """A pack that is larger than it was has been changed."""
    pack_of(saved).write_bytes(pack_of(saved).read_bytes() + b"\0")
    assert_refused(saved, CorruptError, "changed after it was written")


def test_a_remote_pack(moto_s3: S3Server) -> None:
    """The same for objects: a flipped bit, a shorter object, a missing one."""
    url, options = moto_s3.url(), dict(moto_s3.options)
    state = {"a": torch.arange(1000), "b": torch.ones(1000)}
    shardckpt.save(url, state, storage_options=options)
    root = open_storage(url, options)
    path = "rank-00000/data.pack"
    whole = root.read(path)
    damaged = bytearray(whole)
    damaged[8 * 1000 + 100] ^= 1
    for spoil, named in (
        (lambda: root.write(path, bytes(damaged)), "'b'"),
        (lambda: root.write(path, whole[:500]), "'a'"),
        (lambda: root.delete(path), "is missing"),
    ):
        spoil()
        held = {"a": torch.zeros(1000, dtype=torch.int64), "b": torch.zeros(1000)}
        with pytest.raises(CorruptError, match=named):
            shardckpt.load(url, held, storage_options=options)
        assert not held["a"].any()
        assert not held["b"].any()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_bad_chunk_stops_all_ranks(damage: str, tmp_path: Path) -> None:
    """What only one rank reads is bad: the error is raised on every rank, and no rank's state changes."""

    def state(rank: int, value: int) -> State:
        return {"own": shardckpt.PerRank(torch.full((100,), value + rank)), "all": torch.full((50,), value)}

    root = open_storage(tmp_path)
    run_threads(3, lambda ranks: start(root, ranks, state(ranks.rank, 5)))
    pack = pack_of(tmp_path, 2)
    whole = bytearray(pack.read_bytes())
    whole[0] ^= 1
    if damage == "missing":
        pack.unlink()
    else:
        pack.write_bytes(whole if damage == "flipped" else whole[:10])
    states = [state(rank, 0) for rank in range(3)]
    told = outcomes(3, lambda ranks: load(root, ranks, states[ranks.rank]))
    for rank, error in enumerate(told):
        assert isinstance(error, CorruptError)
        assert "rank-00002/data.pack" in str(error)
        assert str(error).startswith("rank 2: ") == (rank != 2)
        assert torch.equal(states[rank]["own"].value, state(rank, 0)["own"].value)
        assert not states[rank]["all"].any()


# -- manifests


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = path / "manifest.json"
    record = json.loads(records.open_sealed(manifest.read_bytes(), manifest.name))
    change(record)
    manifest.write_bytes(records.encode(record))


def test_a_newer_manifest(saved: Path) -> None:
    """Another version: its name, this one's, and what to do."""
    edit(saved, lambda m: m.update(format="shardckpt/9", news=[]))
    assert_refused(saved, UnknownVersionError, "shardckpt/9", "shardckpt/1", "newer")


@pytest.mark.parametrize(
    "path", ["../../other/data.pack", "/etc/passwd", "a/../../../x", "..\\x", "a//b", ""]
)
def test_a_path_that_leaves_the_run(path: str, saved: Path) -> None:
    """A pack outside the run is refused before anything is opened."""
    edit(saved, lambda m: m["packs"][0].update(path=path))
    assert_refused(saved, FormatError, "inside this run")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(surprise=1),
        lambda m: m.pop("chunks"),
        lambda m: m["chunks"]["offset"].pop(),
        lambda m: m["chunks"]["offset"].__setitem__(0, 1 << 40),
        lambda m: m["chunks"]["crc32c"].__setitem__(0, "x"),
        lambda m: m["tensors"][0].update(dtype="float3"),
        lambda m: m["tensors"][0].update(shape=[1 << 40, 1 << 40]),
        lambda m: m["tensors"][1].update(name=m["tensors"][0]["name"]),
        lambda m: m["values"].update(step={"$unknown": 1}),
        lambda m: m["packs"][0].update(size=-1),
    ],
)
def test_a_manifest_that_makes_no_sense(change: Callable[[dict[str, Any]], object], saved: Path) -> None:
    """Unknown keys and entry types, wrong counts, places outside: one clear error, nothing allocated."""
    edit(saved, change)
    assert_refused(saved, FormatError)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["optimizer"]["param_groups"][0].pop("params"),
        lambda v: v["optimizer"].update(param_groups=5),
        lambda v: v["optimizer"].update(state=[]),
        lambda v: v["optimizer"]["param_groups"].__setitem__(0, None),
        lambda v: v.update(model={"$tensor": "not there"}),
        lambda v: v["model"].update({"0.weight": {"$tensor": "not there"}}),
        lambda v: v["model"].update({"0.weight": 5}),
    ],
)
def test_values_that_fit_no_object(change: Callable[[dict[str, Any]], object], saved: Path) -> None:
    """A module's or optimizer's entry of another form than theirs: an error of the library's own."""
    edit(saved, lambda m: change(m["values"]))
    state = training()
    before = content(state)
    with pytest.raises(ShardckptError, match=r"optimizer|model|not there"):
        shardckpt.load(saved, state)
    assert content(state) == before


# -- states


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda s: s.update(more=torch.ones(1)), MissingKeysError, "more"),
        (lambda s: s["model"].append(nn.Linear(2, 2)), MissingKeysError, "model/2.weight"),
        (lambda s: s["model"].pop(1), MissingKeysError, "model/1.weight"),
        (lambda s: s["model"].__setitem__(1, nn.Linear(8, 3)), ShapeMismatchError, "model/1.weight"),
        (lambda s: s["model"].double(), ShapeMismatchError, "model/0.weight"),
        (lambda s: s["model"].to("meta"), UnsupportedValueError, "model/0.weight"),
    ],
)
def test_states_that_do_not_fit(
    change: Callable[[State], object], kind: type[ShardckptError], named: str, saved: Path
) -> None:
    """Missing, extra, other shape, other type, meta: the name is told, and nothing is loaded."""
    state = training()
    change(state)
    before = content(state)
    with pytest.raises(kind, match=named):
        shardckpt.load(saved, state)
    assert content(state) == before


@pytest.fixture
def small_disk(tmp_path: Path, mounts: Mount) -> Path:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounts("tmpfs", folder, "size=1m")
    return folder


def test_a_full_disk(small_disk: Path) -> None:
    """The save fails with sizes and remedy, the checkpoint before it stands, and once there is space
    again, the next save works."""
    checkpointer = shardckpt.Checkpointer(small_disk / "run")
    checkpointer.save(1, {"t": torch.ones(1000)}).wait()
    handle = checkpointer.save(2, {"t": torch.ones(1 << 20)})
    with pytest.raises(SaveError, match=r"4194\d+ bytes.*Free some") as caught:
        handle.wait()
    assert isinstance(caught.value.__cause__, StorageFullError)
    assert shardckpt.open(small_disk / "run").step == 1
    shardckpt.open(small_disk / "run").verify()
    checkpointer.save(3, {"t": torch.ones(1000)}).wait()
    with pytest.raises(SaveError):
        checkpointer.wait()
    assert shardckpt.open(small_disk / "run").step == 3


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    """The run's URL is a file: refused, and the file is left alone."""
    (tmp_path / "run").write_text("precious")
    with pytest.raises(StorageError, match="run"):
        shardckpt.Checkpointer(tmp_path / "run").restore({})
    with pytest.raises((StorageError, SaveError), match="run"):
        shardckpt.save(tmp_path / "run", {})
    assert (tmp_path / "run").read_text() == "precious"


# -- ranks that do not agree


class Failing:
    """An object whose state cannot be had."""

    def state_dict(self) -> State:
        raise RuntimeError("the loader is gone")

    load_state_dict = state_dict


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (
            lambda rank: {"t": torch.full((3,), rank)},
            RankMismatchError,
            ["'t'", "rank 0", "rank 1", "PerRank"],
        ),
        (lambda rank: {"t": torch.zeros(3 + rank)}, RankMismatchError, ["'t'", "[3]", "[4]", "PerRank"]),
        (
            lambda rank: {"t": torch.zeros(3).to([torch.int8, torch.int16][rank])},
            RankMismatchError,
            ["'t'"],
        ),
        (
            lambda rank: {"a": {"n": [1, rank]}},
            RankMismatchError,
            ["'a/n/1'", "rank 0", "rank 1", "PerRank"],
        ),
        (lambda rank: {"a": 1, **({"b": 2} if rank else {})}, RankMismatchError, ["'b'", "absent"]),
        (lambda rank: {"a": [0] * (1 + rank)}, RankMismatchError, ["'a'"]),
        (lambda rank: {"a": True if rank else 1}, RankMismatchError, ["'a'"]),
        (lambda rank: {"a": 0.0 if rank else -0.0}, RankMismatchError, ["'a'"]),
        (
            lambda rank: {"t": torch.zeros(3), **({"u": torch.zeros(2)} if rank else {})},
            RankMismatchError,
            ["'u'"],
        ),
        (lambda rank: {"a": print if rank else 1}, UnsupportedValueError, ["'a'", "function"]),
        (lambda rank: {"a": Failing() if rank else 1}, None, ["the loader is gone"]),
        (
            lambda rank: {"a": torch.zeros(1, device="meta" if rank else "cpu")},
            UnsupportedValueError,
            ["'a'"],
        ),
        (lambda rank: {1: 2} if rank else {"a": 2}, StateError, ["dict with string keys"]),
    ],
)
def test_ranks_that_save_different_states(
    make: Callable[[int], State], kind: type[Exception] | None, parts: list[str], tmp_path: Path
) -> None:
    """One name with two contents, or an error on one rank: raised on all, none hangs, nothing is written."""
    root = open_storage(tmp_path)
    for error in outcomes(2, lambda ranks: start(root, ranks, make(ranks.rank))):
        assert isinstance(error, kind or Exception), error
        assert not isinstance(error, PeerGoneError)
        for part in parts:
            assert part in str(error)
    assert list(tmp_path.iterdir()) == []


def test_metrics_of_one_rank(tmp_path: Path) -> None:
    """Metrics that are no numbers on one rank are an error on all."""

    def save(ranks: ThreadRanks) -> None:
        metrics: Any = {"loss": "low" if ranks.rank else 1.0}
        start_save(SaveSession(ranks, 60), root, {}, metrics=metrics).wait()

    root = open_storage(tmp_path)
    for error in outcomes(2, save):
        assert isinstance(error, StateError)
        assert "metrics must be numbers" in str(error)


def test_dicts_in_another_order(tmp_path: Path) -> None:
    """The order of keys is no difference between ranks."""

    def make(rank: int) -> State:
        pairs = [("a", 1), ("b", {"c": torch.ones(1), "d": 2})]
        return dict(pairs[:: -1 if rank else 1])

    root = open_storage(tmp_path)
    run_threads(2, lambda ranks: start(root, ranks, make(ranks.rank)))
    assert shardckpt.open(tmp_path).values["a"] == 1


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda rank: {"t": torch.zeros(3 + rank), "a": 0}, ShapeMismatchError),
        (lambda rank: {"t": torch.zeros(3), **({"more": 1} if rank else {"a": 0})}, MissingKeysError),
        (lambda rank: {"t": torch.zeros(3), "a": Failing() if rank else 0}, None),
        (lambda rank: {"t": torch.zeros(3)} if rank else None, StateError),
    ],
)
def test_ranks_that_load_into_different_states(
    make: Callable[[int], State], kind: type[Exception] | None, tmp_path: Path
) -> None:
    """A state that fits on one rank and not on another: an error on both, and neither is changed."""
    root = open_storage(tmp_path)
    run_threads(2, lambda ranks: start(root, ranks, {"t": torch.ones(3), "a": 1}))
    states = [make(rank) for rank in range(2)]
    for error in outcomes(2, lambda ranks: load(root, ranks, states[ranks.rank])):
        assert isinstance(error, kind or Exception), error
        assert not isinstance(error, PeerGoneError)
    for state in states:
        if state is not None:
            assert not state["t"].any()
            assert state.get("a") != 1


# -- tensors that only a real world has


def _tensors_without_a_place(rank: int, folder: Path) -> dict[str, str]:
    """What saving each of some DTensors says, on this rank."""
    mesh = init_device_mesh("cpu", (2,))
    local = torch.ones(4)
    cases: dict[str, Any] = {
        "partial": DTensor.from_local(local, mesh, [Partial()]),
        "uneven": DTensor.from_local(
            torch.ones(1 + rank), mesh, [Shard(0)], shape=torch.Size([3]), stride=(1,), run_check=False
        ),
        "drifted": DTensor.from_local(local + rank, mesh, [Replicate()], run_check=False),
        "meta": DTensor.from_local(local.to("meta"), mesh, [Shard(0)], run_check=False),
        "sparse on one": local.to_sparse() if rank else local,
    }
    told = {}
    for name, tensor in cases.items():
        try:
            shardckpt.save(folder / name, {name: tensor})
            told[name] = "saved"
        except ShardckptError as error:
            told[name] = f"{type(error).__name__}: {error}"
        assert not (folder / name).exists()
    # A mixture: a DTensor here is a plain tensor there, which is loaded whole on either side.
    whole = torch.arange(5.0)
    shardckpt.save(folder / "mixed", {"t": distribute_tensor(whole, mesh, [Shard(0)])})
    held = torch.zeros(5)
    shardckpt.load(folder / "mixed", {"t": held})
    assert torch.equal(held, whole)
    return told


def _drifted_buffers(rank: int, folder: Path) -> list[list[float]]:
    """Batch statistics that differ between the ranks of DDP: rank 0's count."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + rank)
        model(torch.randn(4, 2, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mean = model.module[1].running_mean
    own = mean.tolist()
    shardckpt.save(folder / "ddp", {"model": model, "optimizer": optimizer})
    assert mean.tolist() == own
    shardckpt.load(folder / "ddp", {"model": model, "optimizer": optimizer})
    weights = copy.deepcopy(model.module[0].weight.detach())
    dist.all_reduce(weights)
    assert torch.equal(weights, model.module[0].weight * 2)
    return [own, mean.tolist()]


def _both(rank: int, folder: Path) -> tuple[dict[str, str], list[list[float]]]:
    return _tensors_without_a_place(rank, folder), _drifted_buffers(rank, folder)


def test_real_ranks(tmp_path: Path) -> None:
    """DTensors that are partial, of other shards than their placement says, drifted or on meta: the error
    names them on all ranks. Buffers of DDP, which may differ, are rank 0's."""
    (first, buffers), (second, others) = run_processes(2, _both, tmp_path)
    for name, part in {
        "partial": "UnsupportedValueError: state['partial'] is a DTensor with the placement Partial(sum)",
        "uneven": "UnsupportedValueError: state['uneven'] is a DTensor of shape [3]",
        "drifted": "RankMismatchError: state['drifted'] at [0], shape [4], has one content on rank 0",
        "meta": "UnsupportedValueError: state['meta'] is a meta tensor",
        "sparse on one": "UnsupportedValueError: state['sparse on one'] is a tensor of layout torch.sparse_coo",
    }.items():
        for told in (first[name], second[name]):
            kind, _, message = told.partition(": ")
            told = f"{kind}: {message.removeprefix('rank 0: ').removeprefix('rank 1: ')}"
            assert told.startswith(part), told
    assert buffers[0] != others[0]
    assert buffers[1] == others[1] == buffers[0]
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    shardckpt.load(tmp_path / "ddp", {"model": model})
    assert model[1].running_mean.tolist() == buffers[0]
