"""The buffers that a trainer has been granted."""

from __future__ import annotations

import os
import threading

import pytest

from shardckpt.errors import SaverError
from shardckpt.saver.buffers import SnapshotMemory
from shardckpt.saver.granted_buffers import GrantedBuffers
from shardckpt.saver.protocol import ChunkTable, GiveBack, GivenBack, Request, Reserve, Reserved
from tests.kit.savers import wait_until

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


def test_a_buffer_that_another_plan_gets_again_is_not_mapped_again() -> None:
    """As after `restore`, which asks for memory before there is a plan."""
    buffers = GrantedBuffers(lambda _: None)
    buffers.plan(PLAN, 1)
    message, descriptors = reserved()
    again = os.dup(descriptors[0])
    buffers.on_reserved(message, descriptors)
    first = buffers.take().content
    first[:5] = b"first"
    buffers.plan(ChunkTable(2, [], [], [], 90, b""), 1)
    assert not buffers.has_any
    buffers.on_reserved(Reserved(2, message.buffer, message.size), [again])
    assert buffers.take().content is first


def test_while_a_save_waits_for_a_buffer_no_other_is_asked_for() -> None:
    """Allocating it would take the CPU from that save. It is asked for once that one is staged."""
    sent: list[Request] = []
    buffers = GrantedBuffers(sent.append)
    buffers.plan(PLAN, 2)
    taken: list[int] = []
    waiting = threading.Thread(target=lambda: taken.append(buffers.take().number))
    waiting.start()
    wait_until(lambda: buffers.is_waited_for)
    buffers.on_reserved(*reserved())
    waiting.join()
    assert (taken, sent) == ([0], [PLAN, Reserve(100)])
    buffers.ask_after_use()
    assert sent[2:] == [Reserve(100), Reserve(100)]


def test_a_buffer_that_is_put_back_is_given_out_again() -> None:
    """As after a save that was abandoned: nothing else would be asked for."""
    buffers = GrantedBuffers(lambda _: None)
    buffers.plan(PLAN, 1)
    buffers.on_reserved(*reserved())
    memory = buffers.take()
    assert buffers.is_full
    buffers.put_back(memory)
    assert buffers.take() is memory
    buffers.plan(ChunkTable(2, [], [], [], 100, b""), 1)
    buffers.put_back(memory)
    assert not buffers.has_any
