"""torch's state in a backend to which other processes can write."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.rendezvous.member.signed_backend import OverwrittenError, SignedBackend
from launcher.rendezvous.member.signing import Signer
from tests.kit.rendezvous_stores import Attacker, torch_state
from tests.kit.teams import Team


@pytest.mark.parametrize("secret", [None, "of the nodes alone"])
def test_a_pickle_in_place_of_the_state(team: Team, secret: str | None) -> None:
    """No node unpickles it; they repair the state, report it once, and go on."""
    team.secret = secret
    host, other = team.add(), team.add()
    team.form()
    attacker = Attacker(team)
    attacker.overwrite("launch.job/state")
    team.wait(lambda: bool(host.news() or other.news()))
    (text,) = host.news() or other.news()
    assert re.search(
        r"^the store at 127.0.0.1:\d+ holds what no node of this job has written \(state\)", text
    )
    attacker.overwrite("launch.job/state")
    team.form()
    for node in team.nodes:
        node.broadcast(kind="on")
    team.wait(lambda: len(host.received("on")) == len(other.received("on")) == 2)
    assert not attacker.trace.exists()
    assert not host.failure()


class MemoryBackend:
    """A backend in memory, to which tests write past the signatures."""

    name = "memory"

    def __init__(self) -> None:
        self.stored: bytes | None = None

    def get_state(self) -> tuple[bytes, Any] | None:
        return None if self.stored is None else (self.stored, self.stored)

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        has_set = token == self.stored
        self.stored = state if has_set else self.stored
        return None if self.stored is None else (self.stored, self.stored, has_set)


def signed_backend(
    secret: bytes | None = b"secret", memory: MemoryBackend | None = None, run_id: str = "job"
) -> tuple[Any, MemoryBackend]:
    memory = memory or MemoryBackend()
    return SignedBackend(memory, Signer(secret, run_id), pause=0.0), memory  # type: ignore[arg-type]


def test_torch_reads_back_what_it_has_written() -> None:
    backend, memory = signed_backend()
    assert backend.get_state() is None
    written = backend.set_state(torch_state("a", "b"))
    assert written[2]
    assert vars(pickle.loads(backend.get_state()[0])) == vars(pickle.loads(torch_state("a", "b"))) | {
        name: vars(pickle.loads(written[0]))[name] for name in ("deadline", "last_heartbeats")
    }
    assert backend.round_of("a/7") == 3
    assert not backend.set_state(torch_state("c"), b"of another state")[2]
    assert backend.participants() == ["a/7", "b/7"]
    assert b"\x80" not in memory.stored  # no pickle


def test_an_older_state_is_replaced_by_the_newest() -> None:
    """A process that has read a signed state can write it again."""
    backend, memory = signed_backend()
    backend.set_state(torch_state("a"))
    old = memory.stored
    backend.set_state(torch_state("a", "b"), memory.stored)
    new, memory.stored = memory.stored, old
    assert backend.participants() == ["a/7", "b/7"]
    assert pickle.loads(backend.get_state()[0]).participants
    assert signed_backend(memory=memory)[0].participants() == ["a/7", "b/7"]
    assert memory.stored == new
    memory.stored = None
    assert backend.participants() == ["a/7", "b/7"]


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"garbage",
        pickle.dumps(Path("x")),
        b"unsigned:{}",
        b"hmac-sha256:",
        b"hmac-sha256:" + b"0" * 64 + b"{}",
    ],
)
def test_a_value_that_is_no_state(stored: bytes) -> None:
    """A node that knows the state repairs it; one that does not waits for that, and then gives up."""
    backend, memory = signed_backend()
    backend.set_state(torch_state("a"))
    good, memory.stored = memory.stored, stored
    assert backend.participants() == ["a/7"]
    assert memory.stored == good
    memory.stored = stored
    with pytest.raises(OverwrittenError):
        signed_backend(memory=memory)[0].participants()
    assert memory.stored == stored
