"""Targets that share memory, have none, or lie in it unusually; and what a load leaves of the user's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.errors import CorruptError, StateError
from shardckpt.loading.load import load_place
from shardckpt.run.places import Place
from shardckpt.saving.session import SaveSession
from shardckpt.state.overlaps import find_conflict, find_overlaps, overlaps_itself
from shardckpt.storage import Storage
from tests.kit.worlds import ThreadRanks, outcomes, run_threads, start_save

Z = torch.tensor([1 + 2j, 3 - 4j])


def pair(seed: int, *, tied: bool = False) -> nn.ModuleDict:
    """An embedding and a head of one shape."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    for parameter in model.parameters():
        parameter.data = torch.randn(5, 4, generator=generator)
    if tied:
        model["head"].weight = model["emb"].weight
    return model


# -- elements of one tensor


@pytest.mark.parametrize(
    ("tensor", "overlaps"),
    [
        (torch.zeros(10).as_strided((4, 3), (1, 1)), True),
        (torch.zeros(10).unfold(0, 3, 1), True),
        (torch.zeros(10).unfold(0, 2, 2), False),
        (torch.zeros(10).as_strided((2, 3), (3, 2)), False),
        (torch.zeros(11).as_strided((3, 4), (3, 1)), True),
        (torch.zeros(1).expand(4), True),
        (torch.zeros(3, 4).t(), False),
        (torch.zeros(3, 4)[:, ::2], False),
        (torch.zeros(0).expand(4, 0), False),
        (torch.zeros(()), False),
    ],
)
def test_elements_that_share_memory(tensor: torch.Tensor, overlaps: bool, place: Storage) -> None:
    """Such a tensor is no target: it could not hold what was saved. One that only looks like it is."""
    assert overlaps_itself(tensor) == overlaps
    saved = torch.arange(float(tensor.numel())).reshape(tensor.shape)
    shardckpt.save(place, {"t": saved})
    if not overlaps:
        shardckpt.load(place, {"t": tensor})
        assert torch.equal(tensor, saved)
        return
    before = tensor.clone()
    with pytest.raises(StateError, match="'t'"):
        shardckpt.load(place, {"t": tensor})
    assert torch.equal(tensor, before)


# -- tensors that share memory


def test_which_tensors_overlap() -> None:
    """Only those that may; an empty one never does."""
    z, t = torch.zeros(4, dtype=torch.complex64), torch.zeros(10)
    assert find_overlaps([t[:5], t[5:], z, torch.zeros(0)]) == []
    groups = find_overlaps([z, z.real, t[:5], z.imag, t[3:], torch.zeros(3)])
    assert sorted(map(sorted, groups)) == [[0, 1, 3], [2, 4]]


def test_which_contents_conflict() -> None:
    """Interleaved tensors do not; nothing is written to any."""
    z = torch.zeros(4, dtype=torch.complex64)
    ones, twos = torch.ones(4), torch.full((4,), 2.0)
    assert find_conflict([z.real, z.imag], [ones, twos]) is None
    assert find_conflict([z, z.imag], [twos + 1j * ones, ones]) is None
    assert find_conflict([z, z.real, z.imag], [twos + 1j * ones, twos, twos]) == (0, 2)
    assert find_conflict([z, z.conj()], [ones * 1j, ones * -1j]) is None
    assert find_conflict([z.imag, z.conj().imag], [ones, -ones]) is None
    nan = torch.full((4,), torch.nan)
    assert find_conflict([z.real, z.real], [nan, nan]) is None
    single = z.real.as_strided((1,), (5,))  # the stride of one element may be any
    assert find_conflict([single, z.real], [twos[:1], ones]) == (0, 1)
    assert find_conflict([single, z.real], [ones[:1], ones]) is None
    assert not z.any()


@pytest.mark.parametrize("is_module", [True, False])
def test_what_differs_does_not_load_into_tied_tensors(is_module: bool, place: Storage) -> None:
    """On any rank, though only one has them tied; nothing has changed. What was equal loads."""
    saved, equal = pair(0), pair(0)
    equal["head"].weight.data = equal["emb"].weight.data.clone()
    shardckpt.save(place, {"m": saved} if is_module else {"m": dict(saved.state_dict())})
    targets: list[Any] = [pair(1, tied=True), pair(1)]
    if not is_module:
        targets = [dict(target.state_dict()) for target in targets]

    def load(ranks: ThreadRanks) -> None:
        load_place(Place(place), {"m": targets[ranks.rank]}, ranks, strict=True, started=0.0)

    for error in outcomes(2, load):
        assert isinstance(error, StateError)
        assert "state['m/emb.weight'] and state['m/head.weight'] share" in str(error)
    for target, tied in zip(targets, (True, False), strict=True):
        before = pair(1, tied=tied).state_dict()
        now = target.state_dict() if is_module else target
        assert all(torch.equal(now[key], before[key]) for key in before)
    place.delete_tree("")
    shardckpt.save(place, {"m": equal})
    target = pair(1, tied=True)
    shardckpt.load(place, {"m": target})
    assert torch.equal(target["emb"].weight, equal["emb"].weight)


def test_a_corrupt_chunk_leaves_tied_tensors_alone(place: Storage) -> None:
    """What was saved for them is compared in other memory."""
    saved = pair(0)
    saved["head"].weight.data = saved["emb"].weight.data.clone()
    shardckpt.save(place, {"m": saved})
    data = bytearray(place.read("rank-00000/data.pack"))
    data[-8] ^= 1
    place.delete("rank-00000/data.pack")
    place.write("rank-00000/data.pack", bytes(data))
    target = pair(1, tied=True)
    with pytest.raises(CorruptError):
        shardckpt.load(place, {"m": target})
    assert torch.equal(target["emb"].weight, pair(1)["emb"].weight)


def test_views_of_one_buffer(place: Storage) -> None:
    """A fused tensor and its parts load if they agree."""
    fused = torch.arange(12.0).reshape(3, 4)
    shardckpt.save(place, {"t": {"fused": fused, "a": fused[0], "b": fused[1:]}})
    target = torch.zeros(3, 4)
    shardckpt.load(place, {"t": {"fused": target, "a": target[0], "b": target[1:]}})
    assert torch.equal(target, fused)
    with pytest.raises(StateError, match="share their memory"):
        shardckpt.load(place, {"t": {"fused": target, "a": target[2], "b": target[1:]}})
    assert torch.equal(target, fused)


def test_conjugates_are_not_tied(place: Storage) -> None:
    """x and x.conj() have one memory and two contents; so have x.imag and its negative."""
    shardckpt.save(place, {"t": {"a": Z, "b": Z.conj(), "c": Z.imag, "d": Z.conj().imag}})
    state = {
        "t": {"a": torch.zeros_like(Z), "b": torch.zeros_like(Z), "c": torch.zeros(2), "d": torch.zeros(2)}
    }
    shardckpt.load(place, state)
    assert torch.equal(state["t"]["b"], Z.conj())
    assert torch.equal(state["t"]["d"], -Z.imag)
    target = torch.zeros_like(Z)
    shardckpt.load(
        place, {"t": {"a": target, "b": target.conj(), "c": target.imag, "d": target.conj().imag}}
    )
    assert torch.equal(target, Z)


def test_a_conjugate_is_noticed_between_saves(place: Storage) -> None:
    """Its memory is the same."""
    model = nn.Module()
    model.w = nn.Parameter(Z.clone())
    with shardckpt.Checkpointer(place) as checkpoints:
        checkpoints.save(1, {"m": model}).wait()
        model.w.data = model.w.data.conj()
        checkpoints.save(2, {"m": model}).wait()
    assert np.array_equal(shardckpt.open(place).read("m/w"), Z.conj().resolve_conj().numpy())


# -- what a load leaves of the user's tensors


def step_and_save(model: nn.Module, optimizer: torch.optim.Optimizer, place: Storage) -> None:
    """After a step the optimizer has state to save."""
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    shardckpt.save(place, {"model": model, "optimizer": optimizer})


@pytest.mark.parametrize("nbytes", [0, 8])
def test_freed_memory(nbytes: int, place: Storage) -> None:
    """A tensor whose storage was freed, or is too small, is refused by its name."""
    shardckpt.save(place, {"t": torch.ones(4)})
    target = torch.zeros(4)
    target.untyped_storage().resize_(nbytes)
    with pytest.raises(StateError, match=r"state\['t'\].*freed"):
        shardckpt.load(place, {"t": target})


def test_autograd_notices_a_load(place: Storage) -> None:
    """A backward pass through what was replaced raises, as after torch's own load_state_dict."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    step_and_save(model, optimizer, place)
    version = optimizer.state[model.weight]["exp_avg"]._version
    loss = model(torch.ones(2, 3, requires_grad=True)).sum()
    shardckpt.load(place, {"model": model, "optimizer": optimizer})
    assert optimizer.state[model.weight]["exp_avg"]._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_stay_resizable(place: Storage) -> None:
    """Neither a save nor a load takes hold of the user's memory."""
    tensors = [torch.ones(4), torch.ones(4)]

    def save_and_load(ranks: ThreadRanks) -> None:
        state = {"t": tensors[ranks.rank]}
        start_save(SaveSession(ranks, 60), place, state).wait()
        load_place(Place(place), state, ranks, strict=True, started=0.0)

    run_threads(2, save_and_load)
    for tensor in tensors:
        assert tensor.untyped_storage().resizable()


def test_optimizer_state_that_cannot_be_filled_is_replaced(place: Storage) -> None:
    """An expanded tensor is no target, but load_state_dict puts another one in its place."""
    model = nn.Linear(3, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step_and_save(model, optimizer, place)
    state = optimizer.state[model.weight]
    wanted, state["momentum_buffer"] = state["momentum_buffer"], torch.zeros(()).expand(3, 3)
    shardckpt.load(place, {"model": model, "optimizer": optimizer})
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], wanted)


def test_a_load_keeps_the_optimizer_s_tensors(place: Storage) -> None:
    """Live state stays in the very tensors that it was in."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    step_and_save(model, optimizer, place)
    before = {key: value.data_ptr() for key, value in optimizer.state[model.weight].items()}
    shardckpt.load(place, {"model": model, "optimizer": optimizer})
    assert {key: value.data_ptr() for key, value in optimizer.state[model.weight].items()} == before
