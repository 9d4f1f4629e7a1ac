"""A saver that is silent: it is given up, and does not hold up training."""

from __future__ import annotations

import queue
import signal
from pathlib import Path

import pytest

from shardckpt.errors import SaverSilentError
from shardckpt.run.tiers import Tier
from shardckpt.saver import protocol
from shardckpt.saver.client import SaverClient
from shardckpt.saving.saver_backend import SaverBackend
from tests.kit.savers import LIMIT, SaverProcess, connected, save_info


def impatient(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> SaverClient:
    monkeypatch.setenv("LAUNCH_SAVER", saver.address)
    return SaverClient("run", [], 2, LIMIT, linger=0, patience=0.3, interval=0.1)


def test_a_saver_that_is_stopped_is_given_up(
    saver: SaverProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever waits for it is told what it is, and a save that it has becomes durable once it goes on."""
    connected(saver, monkeypatch).close()  # so that it has started
    tier = Tier("local", str(tmp_path))
    client = SaverClient("run", [tier], 2, LIMIT, linger=0, patience=0.3, interval=0.1)
    client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
    memory = client.take()
    saver.send(signal.SIGSTOP)
    outcomes: queue.SimpleQueue[protocol.Outcome] = queue.SimpleQueue()
    info = save_info(1, world_size=2)
    client.begin(protocol.Begin(memory.number, info, 1, ["local"]))
    client.stage(protocol.Stage(memory.number, info, 1, 1, ["local"], b"{}", b""), outcomes.put)
    found = {outcomes.get(timeout=LIMIT).tier for _ in range(2)}
    assert found == {"memory", "local"}
    assert isinstance(client.loss, SaverSilentError)
    assert str(client.loss) == (
        f"the saver of this node (process {saver.pid}, stopped by a signal) has not answered for 0.3 s"
    )
    with pytest.raises(SaverSilentError):
        client.take()
    with pytest.raises(SaverSilentError):
        client.snapshots()
    saver.send(signal.SIGCONT)
    assert saver.told("staged")["step"] == 1


def test_whether_a_saver_answers(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(saver, monkeypatch)
    assert client.probe(LIMIT)
    saver.send(signal.SIGSTOP)
    assert not client.probe(0.1)
    assert isinstance(client.loss, SaverSilentError)
    with pytest.raises(SaverSilentError, match=r"has not answered for 0\.3 s"):
        impatient(saver, monkeypatch)
    saver.send(signal.SIGCONT)
    again = connected(saver, monkeypatch)
    assert again.snapshots() == []
    again.close()


def test_a_sink_does_not_wait_for_long_again(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a save entrusted to a saver that does not answer."""
    monkeypatch.setenv("LAUNCH_SAVER", saver.address)
    sink = SaverBackend("run", [], 2, LIMIT, linger=0)
    first = sink.connect()
    saver.send(signal.SIGSTOP)
    sink.probe(0.1)
    assert first.is_lost
    with pytest.raises(SaverSilentError, match="has not answered for 2 s"):
        sink.connect()
    saver.send(signal.SIGCONT)
    assert sink.connect().probe(LIMIT)
    sink.close()
