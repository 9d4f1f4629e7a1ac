"""Load: manifest, plan, fetch, verify, assemble, apply; on every rank or on none."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.errors import CheckpointError, ShardckptError, public_api
from shardckpt.format.manifest import Manifest
from shardckpt.format.manifest_codec import decode_checked, decode_manifest
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.fill import fill
from shardckpt.loading.pack_reader import Source
from shardckpt.memory import no_garbage_collection
from shardckpt.progress import doing
from shardckpt.ranks.world import Ranks, agree, current_ranks
from shardckpt.run.places import Place, exact_place, find_place, read_decoded
from shardckpt.run.tiers import tier_name
from shardckpt.state.load_targets import LoadTargets
from shardckpt.state.tensors import CannotAllocateError
from shardckpt.state.unflatten import bind_state
from shardckpt.storage import Storage

__all__ = ["Loaded", "load", "load_place", "load_source"]


@dataclass(frozen=True)
class Loaded:
    """What a load did.

    Attributes:
        url: the checkpoint's URL.
        tier: where it was read from: "memory", "local" or "remote".
        step: optimizer steps done when it was saved.
        attempt: number of the attempt that saved it; 0 outside a run.
        world_size: number of ranks that saved it.
        metrics: the metrics given when it was saved.
        nbytes: bytes that this rank read.
        seconds: how long it took.
        missing: with strict=False, names of the state that the checkpoint lacks; they are unchanged.
        unexpected: with strict=False, names of the checkpoint that the state's objects lack.
        unused: top-level entries of the checkpoint that the state did not ask for.
        kept: paths of PerRank values that this rank keeps, since the checkpoint's world was smaller.
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


@public_api
def load(
    url: str | os.PathLike[str] | Storage,
    state: dict[str, Any],
    *,
    strict: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a checkpoint into `state`, in place, on any world size and in any layout. Collective.

    `url` is a checkpoint, or a run, of which the newest good checkpoint is taken. Only the top-level entries
    that `state` has are loaded; below these the names must agree, unless `strict` is False. Tensors,
    modules and optimizers are filled. So are dicts, lists, sets and NumPy arrays of plain values, which have then
    what was saved, and nothing else; other values are replaced. Modules, optimizers and objects with hooks or
    methods of their own get what was saved through their load_state_dict. Raises, with nothing changed:
    NotACheckpointError, FormatError, CorruptError, StorageError, MissingKeysError, ShapeMismatchError,
    StateError.
    """
    ranks = current_ranks()
    started = time.monotonic()
    error: Exception | None = None
    path = ""
    try:
        if ranks.rank == 0:
            path = find_place(url, storage_options).url
    except Exception as failure:
        error = failure
    agree(ranks, error)
    found = ranks.broadcast(path.encode()).decode()
    place = find_place(url) if isinstance(url, Storage) else exact_place(found, storage_options)
    return load_place(place, state, ranks, strict=strict, started=started)


@no_garbage_collection()
def load_place(
    place: Place,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    strict: bool,
    started: float,
    tier: str | None = None,
) -> Loaded:
    """Load the checkpoint at `place`, as `load` does. Collective.

    `started` is when, by time.monotonic; `tier` what the place is called, if not by its storage.
    """
    manifest = _shared_manifest(place, ranks)
    tier = tier_name(place.root) if tier is None else tier
    return load_source(place, manifest, state, ranks, strict=strict, started=started, tier=tier)


@no_garbage_collection()
def load_source(
    source: Source,
    manifest: Manifest,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    strict: bool,
    started: float,
    tier: str,
) -> Loaded:
    """Load what `manifest` describes from its packs, wherever these are. Collective. Raises as `load` does."""
    with doing("restore"):
        targets, nbytes = _fill(source, manifest, state, ranks, strict=strict)
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
    )


def _fill(
    source: Source, manifest: Manifest, state: dict[str, Any], ranks: Ranks, *, strict: bool
) -> tuple[LoadTargets, int]:
    """Fill the state. Returns what was filled, and the bytes that this rank read."""
    error: Exception | None = None
    targets = LoadTargets()
    try:
        targets = bind_state(state, manifest, ranks.rank, strict=strict)
    except CannotAllocateError as failure:
        error = _larger_than_stored(source, manifest) or failure
    except Exception as failure:  # of the state's own objects, too
        error = failure
    agree(ranks, error)
    try:
        nbytes = fill(source, manifest, targets.tensors, ranks, prepare=targets.prepare)
    except BaseException:
        targets.undo()
        raise
    try:
        targets.apply()
    except ShardckptError as failure:
        error = failure
    agree(ranks, error)
    return targets, nbytes


def _larger_than_stored(source: Source, manifest: Manifest) -> CheckpointError | None:
    """What is wrong with the packs' sizes, which say how large the tensors are."""
    try:
        if isinstance(source, Place):
            Fetcher(source, manifest).check_all_sizes()
    except CheckpointError as error:
        return error
    return None


def _shared_manifest(place: Place, ranks: Ranks) -> Manifest:
    """The manifest as rank 0 reads and checks it: all ranks have the same, and it is fetched once."""
    error: Exception | None = None
    manifest: Manifest | None = None
    data = b""
    try:
        if ranks.rank == 0:
            data, manifest = read_decoded(
                place, lambda stored: (stored, decode_manifest(stored, place.url))
            )
    except Exception as failure:
        error = failure
    agree(ranks, error)
    told = ranks.broadcast(data)
    return manifest if manifest is not None else decode_checked(told)
