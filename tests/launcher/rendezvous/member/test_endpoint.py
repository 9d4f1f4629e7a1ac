"""Endpoints: host names, addresses, this machine."""

from __future__ import annotations

import pytest

from launcher.rendezvous.member.endpoint import (
    is_this_machine,
    listening_address,
    local_address,
    resolve_endpoint,
    wait_until_resolvable,
)
from launcher.rendezvous.member.refused import Refused
from tests.kit.teams import SLOW


def test_a_host_that_does_not_exist() -> None:
    """It is unavailable and no bad usage: the name may have an address later."""
    with pytest.raises(Refused, match=r"nosuch\.invalid, cannot be resolved \(.*\w") as refused:
        resolve_endpoint(("nosuch.invalid", 29400))
    assert refused.value.kind == "unavailable"
    with pytest.raises(
        Refused, match=r"nosuch\.invalid, .*; tried since [\d:]+, for 0 s: start the node"
    ) as refused:
        wait_until_resolvable(("nosuch.invalid", 29400), 0.0, pytest.fail)
    assert refused.value.kind == "unavailable"
    with pytest.raises(Refused, match="is no name of a host") as refused:
        wait_until_resolvable(("x" * 80, 29400), SLOW, pytest.fail)
    assert refused.value.kind == "usage"


def test_a_name_that_is_resolvable_later() -> None:
    """As the name of a pod that has not started yet."""
    answers = [Refused("unavailable", "not known"), Refused("unavailable", "not known"), None]

    def resolve(_: tuple[str, int]) -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    wait_until_resolvable(("pod-0", 29400), SLOW, pytest.fail, resolve)
    assert answers == []


def test_is_it_this_machine() -> None:
    assert is_this_machine(("localhost", 29400))
    assert is_this_machine(("127.0.0.1", 29400))
    assert not is_this_machine(("192.0.2.1", 29400))  # reserved for documentation
    assert local_address(("127.0.0.1", 29400)) == "127.0.0.1"


def test_where_a_store_listens() -> None:
    """At the endpoint's address only; at all addresses if the endpoint's is not this machine's."""
    assert listening_address(("127.0.0.1", 29400), None) == "127.0.0.1"
    assert listening_address(("localhost", 29400), None) == "127.0.0.1"
    assert listening_address(("192.0.2.1", 29400), None) == ""  # translated on the way to this machine
    assert listening_address(("192.0.2.1", 29400), "127.0.0.3") == "127.0.0.3"
