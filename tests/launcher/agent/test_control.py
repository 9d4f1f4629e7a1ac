"""Requests to a running job: real sockets, good clients and bad ones."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.control import Control
from launcher.agent.control_protocol import RECORD
from launcher.cli.ask import ask, is_running
from launcher.errors import NotRunningError, RunDirError, UnreachableError, UsageError
from launcher.events import RequestReceived

Answer = Callable[[Control, RequestReceived], None]


class Agent:
    """Serves a control in a thread, as an agent's loop does."""

    def __init__(self, record: Path, answer: Answer, **options: Any) -> None:
        self.control = Control(record, **options)
        self.asked: list[RequestReceived] = []
        self._arrived: queue.SimpleQueue[RequestReceived] = queue.SimpleQueue()
        self._answer = answer
        self._ending, self._end = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([*self.control.descriptors, self._ending], [], [])
            if self._ending in ready:
                return
            for event in self.control.receive():
                assert isinstance(event, RequestReceived)
                self.asked.append(event)
                self._answer(self.control, event)
                self._arrived.put(event)

    def wait(self) -> RequestReceived:
        """The next request that this was not called for yet."""
        return self._arrived.get(timeout=20)

    def stop(self) -> None:
        """Serve it no more, without closing it."""
        os.write(self._end, b"x")
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self.control.close()
        os.close(self._end)
        os.close(self._ending)


def echo(control: Control, asked: RequestReceived) -> None:
    control.answer(asked.client, {"verb": asked.verb, "number": asked.number})


def answer_never(_control: Control, _asked: RequestReceived) -> None:
    pass


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def start(answer: Answer = echo, record: Path = tmp_path / RECORD, **options: Any) -> Agent:
        agents.append(Agent(record, answer, **options))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(20)
    connection.connect("\0" + json.loads((path / RECORD).read_text())["address"])
    return connection


def read_all(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        return file.read()


def test_questions_and_answers(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    assert list(ask(tmp_path, "status")) == [{"verb": "status", "number": None}]
    assert list(ask(tmp_path, "scale", 6)) == [{"verb": "scale", "number": 6}]
    list(ask(tmp_path, "scale", 6, without={7, 3}))
    asked = [(asked.verb, asked.number, asked.without) for asked in agent.asked]
    assert asked == [("status", None, ()), ("scale", 6, ()), ("scale", 6, (3, 7))]
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["pid"] == os.getpid()
    assert record["host"] == socket.gethostname()


def test_several_answers_come_as_they_are_given(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start(answer_never)
    answers = ask(tmp_path, "stacks")
    came: list[object] = []
    first = threading.Thread(target=lambda: came.append(next(answers)))
    first.start()
    client = agent.wait().client
    agent.control.answer(client, {"line": 1}, more=True)
    first.join()
    assert came == [{"line": 1}]
    agent.control.answer(client, {"line": 2}, more=True)
    agent.control.answer(client, {"line": 3})
    agent.control.answer(client, {"line": 4})  # too late
    assert list(answers) == [{"line": 2}, {"line": 3}]


def test_a_large_answer_to_a_slow_reader(start: Callable[..., Agent], tmp_path: Path) -> None:
    """It does not fit into any buffer. Nobody else waits for it."""
    text = "x" * 5_000_000
    start(lambda control, asked: control.answer(asked.client, {"text": text if asked.number else "short"}))
    with connect(tmp_path) as slow:
        slow.sendall(b'{"verb": "scale", "number": 1}\n')
        assert list(ask(tmp_path, "status")) == [{"text": "short"}]
        assert json.loads(read_all(slow))["answer"]["text"] == text


def test_a_client_that_never_reads_is_dropped(start: Callable[..., Agent], tmp_path: Path) -> None:
    """Before what waits for it fills the memory; it finds an end, although there was more to come."""
    answered = threading.Event()

    def answer(control: Control, asked: RequestReceived) -> None:
        for _ in range(4):
            control.answer(asked.client, {"text": "x" * (1 << 20)}, more=True)
        answered.set()

    start(answer, max_unsent=1 << 20)
    with connect(tmp_path) as client:
        client.sendall(b'{"verb": "status"}\n')
        assert answered.wait(10)
        assert len(read_all(client)) < 2 << 20


def test_a_refusal(start: Callable[..., Agent], tmp_path: Path) -> None:
    start(lambda control, asked: control.answer(asked.client, {"error": "not elastic"}))
    with pytest.raises(UsageError, match=r"^not elastic$"):
        list(ask(tmp_path, "scale", 3))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"garbage\n", "expected one line like"),
        (b"\xff\xff\n", "expected one line like"),
        (b"[]\n", "expected one line like"),
        (b"17\n", "expected one line like"),
        (b"[" * 4000 + b"\n", "expected one line like"),
        (b"x" * 10_000, "expected one line like"),
        (b"{}\n", "expected one line like"),
        (b'{"verb": "explode"}\n', "unknown verb 'explode'"),
        (b'{"verb": ["status"]}\n', "unknown verb"),
        (b'{"verb": "scale"}\n', "expected a number of workers, found None"),
        (b'{"verb": "scale", "number": "6"}\n', "found '6'"),
        (b'{"verb": "scale", "number": true}\n', "found True"),
        (b'{"verb": "scale", "number": 0}\n', "found 0"),
        (b'{"verb": "stop", "number": 3}\n', "expected no number of workers, found 3"),
        (b'{"verb": "scale", "number": 6, "without": 3}\n', "expected a list of slots, found 3"),
        (b'{"verb": "scale", "number": 6, "without": [-1]}\n', "expected a list of slots, found [-1]"),
        (b'{"verb": "stop", "without": [3]}\n', "expected no slots, found [3]"),
    ],
)
def test_nonsense_is_refused(start: Callable[..., Agent], tmp_path: Path, sent: bytes, reason: str) -> None:
    agent = start()
    with connect(tmp_path) as client:
        client.sendall(sent)
        assert reason in json.loads(read_all(client))["answer"]["error"]
    assert list(ask(tmp_path, "status"))
    assert [asked.verb for asked in agent.asked] == ["status"]


def test_bad_clients_disturb_nobody(start: Callable[..., Agent], tmp_path: Path) -> None:
    """Silent ones, more than there is room for; those that go in mid-question, or before the answer."""
    agent = start()
    silent = [connect(tmp_path) for _ in range(50)]
    for client in [connect(tmp_path) for _ in range(20)]:
        client.sendall(b'{"verb": "sta')
        client.close()
    for client in [connect(tmp_path) for _ in range(20)]:
        client.sendall(b'{"verb": "status"}\n')
        client.close()
    with connect(tmp_path) as half:
        half.sendall(b'{"verb": "status"}\n')
        half.shutdown(socket.SHUT_WR)
        assert b'"status"' in read_all(half)
    assert list(ask(tmp_path, "status")) == [{"verb": "status", "number": None}]
    assert silent[0].recv(1) == b""  # had to go
    for client in silent:
        client.close()
    agent.control.answer(12345, {})  # nobody


def test_an_answer_never_goes_to_another(start: Callable[..., Agent], tmp_path: Path) -> None:
    """Nor when the one who asked has gone, and another has got its file descriptor."""
    agent = start(answer_never)
    clients = []
    for _ in range(2):
        with connect(tmp_path) as client:
            client.sendall(b'{"verb": "stacks"}\n')
            clients.append(agent.wait().client)
    with connect(tmp_path) as last:
        last.sendall(b'{"verb": "status"}\n')
        present = agent.wait().client
        for client in clients:
            agent.control.answer(client, {"for": "others"})
        agent.control.answer(present, {"for": "last"})
        assert json.loads(read_all(last))["answer"] == {"for": "last"}


def test_after_the_end(tmp_path: Path) -> None:
    agent = Agent(tmp_path / RECORD, echo)
    assert is_running(tmp_path)
    agent.close()
    assert not (tmp_path / RECORD).exists()
    assert not is_running(tmp_path)
    with pytest.raises(NotRunningError, match=f"^nothing runs in {tmp_path}$"):
        list(ask(tmp_path, "status"))


def test_the_job_ends_before_it_has_answered(tmp_path: Path) -> None:
    agent = Agent(tmp_path / RECORD, answer_never)
    ender = threading.Thread(target=lambda: [agent.wait(), agent.close()])
    ender.start()
    with pytest.raises(NotRunningError, match="ended before it had answered"):
        list(ask(tmp_path, "status"))
    ender.join()


def test_an_agent_that_was_killed(start: Callable[..., Agent], tmp_path: Path) -> None:
    """Its record stays behind; the next agent replaces it."""
    record = str(tmp_path / RECORD)
    code = f"from launcher.agent.control import *; from pathlib import Path; Control(Path({record!r}))"
    killed = subprocess.Popen([sys.executable, "-c", f"{code}; import os; os.kill(os.getpid(), 9)"])
    assert killed.wait() == -signal.SIGKILL
    assert not is_running(tmp_path)
    with pytest.raises(NotRunningError, match=rf"its launch \(pid {killed.pid}\) was killed"):
        list(ask(tmp_path, "status"))
    start()
    assert list(ask(tmp_path, "status"))


def test_an_agent_in_another_network_namespace(start: Callable[..., Agent], tmp_path: Path) -> None:
    """It lives, but its address is not known here."""
    start()
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, "address": "elsewhere"}))
    with pytest.raises(UnreachableError, match="network namespace") as error:
        list(ask(tmp_path, "status"))
    assert not isinstance(error.value, NotRunningError)
    (tmp_path / RECORD).write_text(json.dumps({**record, "address": "elsewhere", "started": 1}))
    with pytest.raises(NotRunningError):  # the number is another process's now
        list(ask(tmp_path, "status"))


def test_an_agent_that_does_not_answer(start: Callable[..., Agent], tmp_path: Path) -> None:
    start(answer_never)
    with pytest.raises(UnreachableError, match=rf"has not answered in 0.1 s.*kill -CONT {os.getpid()}"):
        list(ask(tmp_path, "status", timeout=0.1))


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run in .*nope: expected a run directory"):
        list(ask(tmp_path / "nope", "status"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"no run in .*file"):
        list(ask(tmp_path / "file", "status"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_broken_record(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(NotRunningError):
        list(ask(tmp_path, "status"))


def test_several_nodes(start: Callable[..., Agent], tmp_path: Path) -> None:
    """The agent of this host is asked; those of others cannot be."""
    others = tmp_path / "nodes/node-a"
    others.mkdir(parents=True)
    (others / RECORD).write_text(json.dumps({"pid": 1, "started": 1, "address": "x", "host": "node-a"}))
    with pytest.raises(UnreachableError, match=r"runs on node-a, and this is .*: ask there") as error:
        list(ask(tmp_path, "status"))
    assert not isinstance(error.value, NotRunningError)
    for name in ("node-b", "node-c"):
        (tmp_path / "nodes" / name).mkdir()
    dead = {"pid": 2**22 + 1, "started": 1, "address": "gone", "host": socket.gethostname()}
    (tmp_path / "nodes/node-b" / RECORD).write_text(json.dumps(dead))
    start(record=tmp_path / "nodes/node-c" / RECORD)
    assert list(ask(tmp_path, "status"))
    assert is_running(tmp_path)


def test_another_users_job(start: Callable[..., Agent], tmp_path: Path) -> None:
    """Both ends check the other's user, which each of them is made to take for another here."""
    agent = start(peer=lambda _: 12345)
    with connect(tmp_path) as client:
        assert b"ask as that user" in read_all(client)
    with pytest.raises(UnreachableError, match="is of user 12345: ask as that user"):
        list(ask(tmp_path, "status", user=lambda: 54321, peer=lambda _: 12345))
    assert agent.asked == []


def test_a_real_other_user(start: Callable[..., Agent], tmp_path: Path, other_user: int) -> None:
    agent = start()
    address = json.loads((tmp_path / RECORD).read_text())["address"]
    code = (
        f"import os, socket; os.setuid({other_user}); s = socket.socket(socket.AF_UNIX); "
        f"s.connect(chr(0) + {address!r}); print(s.makefile().read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "this job is of user root: ask as that user" in done.stdout
    assert agent.asked == []


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"no/control.json cannot be written: No such file"):
        Control(tmp_path / "no" / RECORD)


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = open_descriptors()
    agent = Agent(tmp_path / RECORD, answer_never)
    clients = [connect(tmp_path) for _ in range(5)]
    clients[0].sendall(b'{"verb": "status"}\n')
    agent.wait()
    agent.close()
    for client in clients:
        client.close()
    assert open_descriptors() == before
