"""The buffers that a trainer has been granted."""

from __future__ import annotations

import os

import pytest

from shardckpt.errors import SaverError
from shardckpt.saver.buffers import SnapshotMemory
from shardckpt.saver.granted_buffers import GrantedBuffers
from shardckpt.saver.protocol import ChunkTable, GiveBack, GivenBack, Request, Reserve, Reserved

PLAN = ChunkTable(1, [], [], [], 100, b"")


def reserved(plan: int = 1, buffer: int = 0) -> tuple[Reserved, list[int]]:
    """The saver's message about a new buffer, and its descriptor."""
    descriptor, size = SnapshotMemory().allocate(100)
    return Reserved(plan, buffer, size), [descriptor]


def test_a_second_buffer_is_asked_for_once_the_first_is_there() -> None:
    """Every rank's first buffer comes before any second."""
    sent: list[Request] = []
    buffers = GrantedBuffers(sent.append)
    buffers.plan(PLAN, 2)
    assert sent == [PLAN, Reserve(100)]
    assert not buffers.has_any
    buffers.on_reserved(*reserved())
    assert sent[2:] == [Reserve(100)]
    buffers.on_reserved(*reserved(buffer=1))
    assert len(sent) == 3
    assert [buffers.take().number, buffers.take().number] == [0, 1]
    assert buffers.is_full


def test_what_comes_for_the_plan_before_is_closed() -> None:
    buffers = GrantedBuffers(lambda _: None)
    buffers.plan(PLAN, 1)
    message, descriptors = reserved(plan=0)
    buffers.on_reserved(message, descriptors)
    assert not buffers.has_any
    with pytest.raises(OSError):
        os.fstat(descriptors[0])


def test_a_buffer_in_use_is_not_given_back() -> None:
    sent: list[Request] = []
    buffers = GrantedBuffers(sent.append)
    buffers.plan(PLAN, 2)
    buffers.on_reserved(*reserved())
    buffers.on_reserved(*reserved(buffer=1))
    buffers.take()
    buffers.on_give_back(GiveBack(0))
    buffers.on_give_back(GiveBack(1))
    assert [message for message in sent if isinstance(message, GivenBack)] == [GivenBack(1)]
    assert not buffers.has_any


def test_a_saver_that_dies_while_it_gives_out_memory_is_no_noise() -> None:
    """The thread that finds out goes on, and the trainer that waits gets the error."""
    lost = SaverError("the saver of this node is gone")
    is_gone = False

    def send(_request: Request) -> None:
        if is_gone:
            raise lost

    buffers = GrantedBuffers(send)
    buffers.plan(PLAN, 2)
    is_gone = True
    buffers.on_reserved(*reserved())
    buffers.on_give_back(GiveBack(0))
    buffers.lose(lambda: lost)
    with pytest.raises(SaverError, match="the saver of this node is gone"):
        buffers.take()
