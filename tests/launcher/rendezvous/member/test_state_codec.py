"""torch's state as JSON."""

from __future__ import annotations

import json

import pytest

from launcher.rendezvous.member.state_codec import StateError, decode_state, encode_state, from_torch
from tests.kit.rendezvous_stores import torch_state

PLAIN = {
    "round": 1,
    "complete": False,
    "closed": False,
    "deadline": None,
    "participants": [],
    "wait_list": [],
    "redundancy_list": [],
    "last_heartbeats": [],
}
"""A state of torch's rendezvous as it is stored."""


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"round": 1}',
        *(
            json.dumps({**PLAIN, **wrong})
            for wrong in (
                {"round": True},
                {"round": "1"},
                {"closed": 0},
                {"deadline": 5},
                {"deadline": "2026-01-01"},
                {"participants": [[["a", 1], 0]]},
                {"participants": {"a": 0}},
                {"wait_list": [["a", "1", 0]]},
                {"last_heartbeats": [[["a", 1, 0], "never"]]},
                {"more": 1},
            )
        ),
        "[" * 100000,
    ],
)
def test_a_text_that_is_no_state(text: str) -> None:
    with pytest.raises(StateError):
        decode_state(text)


def test_every_field_of_torchs_state_is_known() -> None:
    """Another version of torch may have others."""
    state = from_torch(torch_state("a", "b"))
    assert vars(decode_state(encode_state(state))) == vars(state)
    assert encode_state(decode_state(json.dumps(PLAIN))) == json.dumps(PLAIN, sort_keys=True)
