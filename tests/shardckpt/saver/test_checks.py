"""What of a message the saver relies on."""

from __future__ import annotations

import msgspec
import pytest

from shardckpt.run.attempts import Attempt
from shardckpt.run.lease import Holder
from shardckpt.run.tiers import Tier
from shardckpt.saver import protocol
from shardckpt.saver.checks import RequestError, check, decode_values
from tests.kit.savers import save_info

INFO = save_info(1)
LOCAL = Tier("local", "/nowhere")
HELLO = protocol.Hello("another run", [LOCAL], 2, 1.0)
ATTEMPT = Attempt("x", "attempt-0001-00000001", 0, Holder.of_this_process(()))
START = protocol.Start(ATTEMPT, claims=False)
PLAN = protocol.ChunkTable(1, [0], [0], [4], 64, b"")
BEGIN = protocol.Begin(0, INFO, 0, [])
STAGE = protocol.Stage(0, INFO, 0, 1, [], b"{}", b"")


@pytest.mark.parametrize(
    "message",
    [
        protocol.Hello("", [], 2, 1.0),
        protocol.Hello("run", [], 0, 1.0),
        protocol.Hello("run", [], 1 << 40, 1.0),
        protocol.Hello("run", [], 2, float("nan")),
        protocol.Hello("run", [], 2, -1.0),
        protocol.Hello("run", [LOCAL, LOCAL], 2, 1.0),
        protocol.Hello("run", [msgspec.structs.replace(LOCAL, keep_last=0)], 2, 1.0),
    ],
)
def test_a_hello_that_makes_no_sense(message: protocol.Hello) -> None:
    with pytest.raises(RequestError):
        check(message, None)


def test_what_trainers_send_makes_sense() -> None:
    check(HELLO, None)
    messages = (
        START,
        PLAN,
        protocol.Reserve(0),
        BEGIN,
        STAGE,
        protocol.Find(),
        protocol.Attach("x"),
        protocol.Bye(),
    )
    for message in (*messages, protocol.ChunkTable(1, [], [], [], 0, b""), protocol.Detach()):
        check(message, {"local"})
    assert decode_values(STAGE) == {}
