"""Endpoints at which no store answers."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from launcher.rendezvous.member.endpoint import (
    format_endpoint,
)
from tests.kit.teams import Team


def test_a_node_that_comes_before_the_first(team: Team) -> None:
    """The user is notified once that nothing answers."""
    team.conf = {"is_host": "0"}
    early = team.add()
    early.join()
    team.wait(lambda: bool(early.news()))
    assert early.news() == [
        f"nobody answers at {format_endpoint(team.endpoint)} yet (Connection refused); trying for 60 s"
    ]
    team.conf = {"is_host": "1"}
    team.add().join()
    team.wait(lambda: early.size() > 0)
    assert len(early.news()) == 1


@pytest.mark.parametrize("bound", ["read_timeout", "join_timeout"])
def test_nobody_answers(team: Team, bound: str) -> None:
    team.conf = {"is_host": "0", bound: "1"}
    node = team.add()
    node.join()
    host, port = team.endpoint
    assert node.wait_for_failure().kind == "unavailable"
    assert node.wait_for_failure().reason.startswith(
        f"nobody answers at {host}:{port} within 1 s (Connection refused)"
    )
    assert "start the first node, or check --rdzv-endpoint" in node.wait_for_failure().reason


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "nonsense"])
def test_another_program_answers(team: Team, answer: bytes) -> None:
    """The node first tries to serve the store itself, but another program has the port."""
    team.conf = {"read_timeout": "2"}
    with socket.create_server(team.endpoint) as server, ExitStack() as connections:
        server.settimeout(0)
        node = team.add()
        node.join()

        def serve() -> bool:
            try:
                connection = connections.enter_context(server.accept()[0])
            except BlockingIOError:
                return node.failure() is not None
            connection.sendall(answer)
            return False

        team.wait(serve)
    assert node.wait_for_failure().kind == "unavailable"
    assert "it is frozen, or another program has that port" in node.wait_for_failure().reason
