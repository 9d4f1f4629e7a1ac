"""Load: manifest -> plan -> fetch -> verify -> apply, on every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.errors import public_api
from shardckpt.format.manifest import Manifest
from shardckpt.format.manifest_codec import decode_checked, encode_checked
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.fill import fill
from shardckpt.loading.leftovers import Leftovers
from shardckpt.loading.pack_reader import Source
from shardckpt.memory import no_garbage_collection
from shardckpt.progress import doing
from shardckpt.ranks.world import Ranks, agreement, current_ranks
from shardckpt.run.places import Place, exact_place, find_place, read_manifest
from shardckpt.run.tiers import tier_name
from shardckpt.state.load_targets import LoadTargets
from shardckpt.state.tensors import CannotAllocateError
from shardckpt.state.unflatten import bind_state
from shardckpt.storage import Storage

__all__ = ["Loaded", "load", "load_place", "load_source", "shared_manifest"]


@dataclass(frozen=True)
class Loaded:
    """What was loaded, from where.

    Attributes:
        url: the checkpoint's URL.
        tier: the tier that it was read from: "memory", "local" or "remote".
        step: optimizer steps done when it was saved.
        attempt: the number of the attempt that saved it; 0 outside a run.
        world_size: ranks that saved it.
        metrics: the metrics that were given when it was saved.
        nbytes: bytes of the chunks that this rank needed.
        total_nbytes: bytes of all tensors of the checkpoint.
        seconds: duration of the load.
        missing: with strict=False, names in the state that the checkpoint lacks; their values are unchanged.
        unexpected: with strict=False, names in the checkpoint that the state's objects lack.
        unused: top-level entries of the checkpoint that the state does not have.
        kept: paths of PerRank values that this rank keeps, since fewer ranks saved the checkpoint.
    """

    url: str
    tier: str
    step: int
    attempt: int
    world_size: int
    metrics: dict[str, float]
    nbytes: int
    seconds: float
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    total_nbytes: int = 0

    @property
    def is_complete(self) -> bool:
        """True if the state and the checkpoint have the same entries."""
        return not (self.missing or self.unexpected or self.unused)


@public_api
def load(
    url: str | os.PathLike[str] | Storage,
    state: dict[str, Any],
    *,
    strict: bool = True,
    atomic: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a checkpoint into `state`, in place, on any number of ranks and in any layout. Collective.

    Args:
        url: a checkpoint, or a run, of which the newest good checkpoint is loaded.
        state: a dict with string keys, of modules, optimizers, tensors (also DTensors, of any sharding), NumPy
            arrays, objects with state_dict() and load_state_dict(), and plain values. Only the top-level entries
            that it has are loaded.
        strict: the names below each of these entries must agree with the checkpoint's. If False, names that only
            one side has are skipped, and returned in `Loaded.missing` and `Loaded.unexpected`.
        atomic: change nothing unless all of the checkpoint that is needed is good, on every rank. That takes a
            second pass over local files, and as much memory again for tensors from object storage. If False, the
            tensors are filled while what is read is verified: that is faster, and takes about 64 MiB of memory a
            rank. Then an error may leave the state partly loaded; its text says so, and names the entries.
        storage_options: for `url`, as docs/storage.md has them.

    Tensors, modules and optimizers are filled in place. So are dicts, lists, sets and NumPy arrays of plain
    values: they have then what was saved, and nothing else. Other values are replaced. Modules, optimizers and
    objects with hooks or methods of their own are given what was saved through their load_state_dict.

    Raises, with the state unchanged unless the text says that it is partly loaded: NotACheckpointError,
    FormatError, CorruptError, StorageError, MissingKeysError, ShapeMismatchError, StateError.

    >>> import tempfile, torch, shardckpt
    >>> model = torch.nn.Linear(2, 2)
    >>> state = {"model": torch.nn.Linear(2, 2), "step": 0}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shardckpt.save(folder, {"model": model, "step": 7})
    ...     loaded = shardckpt.load(folder, state)
    >>> loaded.tier, state["step"], torch.equal(state["model"].weight, model.weight)
    ('local', 7, True)
    """
    ranks = current_ranks()
    started = time.monotonic()
    path = ""
    with agreement(ranks):
        if ranks.rank == 0:
            path = find_place(url, storage_options).url
    found = ranks.broadcast(path.encode()).decode()
    place = find_place(url) if isinstance(url, Storage) else exact_place(found, storage_options)
    leftovers = Leftovers()
    with leftovers.explained():
        return load_place(
            place, state, ranks, strict=strict, started=started, atomic=atomic, leftovers=leftovers
        )


@no_garbage_collection()
def load_place(
    place: Place,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    strict: bool,
    started: float,
    atomic: bool = True,
    leftovers: Leftovers | None = None,
    tier: str | None = None,
) -> Loaded:
    """Load the checkpoint at `place`, as `load` does. Collective.

    Args:
        place: of a committed checkpoint.
        state, strict, atomic: as `load` has them.
        ranks: of the job.
        started: when the load began, by time.monotonic().
        leftovers: of earlier loads into `state` that failed; an error may leave more.
        tier: the name of the place's tier; None: it follows from the place's storage.
    """
    manifest = shared_manifest(place, ranks)
    tier = tier_name(place.root) if tier is None else tier
    return load_source(
        place,
        manifest,
        state,
        ranks,
        strict=strict,
        started=started,
        atomic=atomic,
        leftovers=leftovers,
        tier=tier,
    )


@no_garbage_collection()
def load_source(
    source: Source,
    manifest: Manifest,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    strict: bool,
    started: float,
    atomic: bool = True,
    leftovers: Leftovers | None = None,
    tier: str,
) -> Loaded:
    """Load the checkpoint of `manifest` from the packs of `source`. Collective. Arguments as in `load_place`.

    The flow: bind the state to the manifest, fill the tensors (plan, fetch, verify, apply: `fill`), and hand the
    values to the state's objects. Ranks agree after each step, and go on only if it succeeded on all of them.
    Where an object of the state may still refuse the checkpoint, the load is atomic.
    """
    leftovers = Leftovers() if leftovers is None else leftovers
    with doing("restore"):
        with agreement(ranks):
            targets = _bind(source, manifest, state, ranks, strict=strict)

        def prepare() -> None:
            targets.prepare()
            leftovers.check(targets)

        def begin() -> None:
            targets.begin()
            leftovers.add(targets)

        try:
            nbytes = fill(
                source,
                manifest,
                targets.tensors,
                ranks,
                prepare=prepare,
                begin=begin,
                atomic=atomic or bool(targets.on_verified),
            )
        except BaseException:
            targets.undo()
            raise
        leftovers.clear()
        with agreement(ranks):
            targets.apply()
    return Loaded(
        url=source.url,
        tier=tier,
        step=manifest.step,
        attempt=manifest.attempt,
        world_size=manifest.world_size,
        metrics=manifest.metric_values,
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        missing=tuple(targets.missing),
        unexpected=tuple(targets.unexpected),
        unused=tuple(targets.unused),
        kept=tuple(targets.kept),
        total_nbytes=sum(tensor.nbytes for tensor in manifest.tensors),
    )


def _bind(
    source: Source, manifest: Manifest, state: dict[str, Any], ranks: Ranks, *, strict: bool
) -> LoadTargets:
    """What the load fills on this rank. Changes nothing; raises as `bind_state` does."""
    try:
        return bind_state(state, manifest, ranks.rank, strict=strict)
    except CannotAllocateError:
        if isinstance(source, Place):  # perhaps a forged size: raises if the packs are smaller than that
            Fetcher(source, manifest).check_all_sizes()
        raise


def shared_manifest(place: Place, ranks: Ranks) -> Manifest:
    """The manifest, which rank 0 reads and checks for all ranks. Collective."""
    manifest: Manifest | None = None
    data = b""
    with agreement(ranks):
        if ranks.rank == 0:
            manifest = read_manifest(place)
            data = encode_checked(manifest) if ranks.size > 1 else b""
    shared = ranks.broadcast(data)
    return manifest if manifest is not None else decode_checked(shared)
