"""The saver: started by `launch` for a worker, reports on the control socket, and ends when it has flushed."""

from __future__ import annotations

import json
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.agent.saver_handle import SaverHandle
from launcher.events import (
    Event,
    SaveFailed,
    SavePersisted,
    SavePersisting,
    SaverEnded,
    SaverWanted,
    SaveStaged,
    SaveSuperseded,
)
from shardckpt import Checkpointer
from shardckpt.errors import SaveError
from tests.kit.contract import section
from tests.kit.job import PATIENCE, until
from tests.kit.teams import SparedPids


@pytest.fixture
def handle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SaverHandle]:
    """The agent's, and this process as its worker."""
    found = SaverHandle(tmp_path / "saver.log", SparedPids())
    monkeypatch.setenv("LAUNCH_SAVER", found.address)
    yield found
    found.close()


def receive(handle: SaverHandle, is_enough: Callable[[list[Event]], bool]) -> list[Event]:
    """Receive events until `is_enough` of all of them."""
    events: list[Event] = []
    deadline = time.monotonic() + PATIENCE
    while not is_enough(events):
        assert time.monotonic() < deadline, events
        poll = select.poll()
        for fd in handle.descriptors:
            poll.register(fd, select.POLLIN)
        if poll.poll(100):
            events += handle.receive()
    return events


def has(kind: type) -> Callable[[list[Event]], bool]:
    return lambda events: any(isinstance(event, kind) for event in events)


def state() -> dict[str, torch.Tensor]:
    return {"w": torch.ones(1000)}


def open_checkpointer(handle: SaverHandle, url: Path) -> Checkpointer:
    """A worker's Checkpointer; its connection makes the agent start the saver."""
    checkpointer = Checkpointer(url)
    with ThreadPoolExecutor() as threads:
        restored = threads.submit(checkpointer.restore, state())
        assert receive(handle, bool) == [SaverWanted()]
        handle.start()
        restored.result(PATIENCE)
    return checkpointer


def test_a_save_is_reported_until_it_is_durable(handle: SaverHandle, tmp_path: Path) -> None:
    """The saver ends with 0 once it is told that there are no more workers."""
    with open_checkpointer(handle, tmp_path / "run") as checkpointer:
        checkpointer.save(7, state())
        events = receive(handle, has(SavePersisted))
    assert SaveStaged(7) in events
    (persisted,) = (event for event in events if isinstance(event, SavePersisted))
    assert (persisted.step, persisted.tier) == (7, "local")
    assert Path(persisted.url.removeprefix("file://"), "manifest.json").exists()
    assert persisted.seconds > 0
    for event in events:
        if isinstance(event, SavePersisting):
            assert (event.step, event.tier) == (7, "local")
            assert 0 <= event.done <= event.total
    handle.begin_flush(PATIENCE, waited=0.0, leave_in=None)
    assert receive(handle, has(SaverEnded))[-1] == SaverEnded(0)


def test_a_save_that_fails_is_reported(handle: SaverHandle, tmp_path: Path) -> None:
    """The saver tries it once more at the end, and ends with 1."""
    with open_checkpointer(handle, tmp_path / "run") as checkpointer:
        (tmp_path / "run/attempt-0001/step-00000007").touch()  # a file where a folder is to be
        checkpointer.save(7, state())
        (failed,) = (event for event in receive(handle, has(SaveFailed)) if isinstance(event, SaveFailed))
        assert (failed.step, failed.tier, failed.again) == (7, "local", False)
        assert failed.error
        with pytest.raises(SaveError):
            checkpointer.wait()
    handle.begin_flush(PATIENCE, waited=0.0, leave_in=None)
    events = receive(handle, has(SaverEnded))
    assert events[-1] == SaverEnded(1)
    assert replace(failed, again=True) in [
        replace(one, error=failed.error) for one in events if isinstance(one, SaveFailed)
    ]


def test_launch_reads_the_lines_of_the_document(tmp_path: Path) -> None:
    """A saver that writes just these lines; of a line that it does not know `launch` takes no notice."""
    lines = re.findall(r"^\| `(\{.*\})` \|", section("The saver"), re.M)
    assert [json.loads(line)["event"] for line in lines][-1] == "drained"
    script = tmp_path / "saver.py"
    script.write_text(
        "import socket, sys\n"
        "control = socket.socket(fileno=int(sys.argv[-1]))\n"
        f"control.sendall({chr(10).join([*lines, json.dumps({'event': 'unknown'}), '']).encode()!r})\n"
    )
    handle = SaverHandle(tmp_path / "saver.log", SparedPids(), [sys.executable, str(script)])
    handle.start()
    url, tier = "s3://…", "remote"
    assert receive(handle, has(SaverEnded)) == [
        SaveStaged(120),
        SavePersisting(120, tier, 1200, 2000),
        SavePersisted(120, tier, url, 1.2),
        SaveFailed(120, tier, url, "…", False),
        SaveSuperseded(120, tier),
        SaverEnded(0),
    ]
    handle.close()


def test_the_saver_is_started_as_documented(handle: SaverHandle) -> None:
    """The document's command, with descriptors for FD."""
    (command,) = re.findall(r"^    python (-P -m shardckpt\.saver .*)$", section("The saver"), re.M)
    handle.start()
    path = Path(f"/proc/{handle.pid}/cmdline")
    words = until(path.read_bytes).decode().split("\0")[1:-1]  # empty for a moment
    assert re.sub(r"\b\d+\b", "FD", " ".join(words)) == command
    handle.begin_flush(PATIENCE, waited=0.0, leave_in=None)
    assert receive(handle, has(SaverEnded))[-1] == SaverEnded(0)
