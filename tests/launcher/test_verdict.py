"""What is read from a failed rank's files, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.events import WorkerExited, ZygoteLost
from launcher.restart import GiveUp, Restart, Round
from launcher.run_dir import RankFiles
from launcher.verdict import Evidence, describe_exit, find_culprit, gather, judge

TRACEBACK = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    f()
KeyError: 'x'
"""


@pytest.fixture
def files(tmp_path: Path) -> RankFiles:
    for name in ("out", "err"):
        (tmp_path / name).touch()
    return RankFiles(0, tmp_path / "out", tmp_path / "err", tmp_path / "error", tmp_path)


def test_a_traceback_is_preferred(files: RankFiles) -> None:
    files.err.write_text(f"loading\n{TRACEBACK}\nThen:\n\n{TRACEBACK.replace('x', 'y')}bye\n")
    evidence = gather(files)
    assert evidence.has_traceback
    assert evidence.error == "KeyError: 'y'"
    assert evidence.lines[-1] == "KeyError: 'y'"
    assert len(evidence.lines) == 4


def test_torch_prefixes_are_cut_off(files: RankFiles) -> None:
    files.err.write_text("".join(f"[rank0]: {line}\n" for line in TRACEBACK.splitlines()))
    assert "\n".join(gather(files).lines) + "\n" == TRACEBACK


def test_last_lines_else(files: RankFiles) -> None:
    """stderr's, or stdout's if there is nothing on stderr; of a progress bar its last state."""
    files.out.write_text("".join(f"step {i}\n" for i in range(100)))
    assert gather(files).lines == tuple(f"step {i}" for i in range(90, 100))
    files.err.write_bytes(b"\r 1%\r 2%\r 3%\xff")
    assert gather(files).lines == (" 3%\ufffd",)
    assert gather(files).error is None


def test_the_error_file_of_torchelastic(files: RankFiles) -> None:
    message = {"message": "KeyError: 'z'", "extraInfo": {"py_callstack": TRACEBACK}}
    files.error.write_text(json.dumps({"message": message}))
    evidence = gather(files)
    assert evidence.error == "KeyError: 'z'"
    assert evidence.has_traceback
    for garbage in ("", "{", "[]", '{"message": {}}', "1"):
        files.error.write_text(garbage)
        assert gather(files).error is None


def test_missing_files_are_no_evidence(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert gather(RankFiles(0, nowhere, nowhere, nowhere, nowhere)) == Evidence()


def exited(rank: int, code: int, at: float = 1.0) -> WorkerExited:
    return WorkerExited(rank, 100 + rank, code, at)


def a_round(*exits: WorkerExited, **fields: object) -> Round:
    return Round(2, 4, 0.5, exits=exits, **fields)  # type: ignore[arg-type]


RESET = Evidence(error="RuntimeError: Connection closed by peer [127.0.0.1]:1", has_traceback=True)
OWN = Evidence(error="ValueError: boom", has_traceback=True)
NOTHING = Evidence()


@pytest.mark.parametrize(
    ("exits", "evidence", "culprit"),
    [
        ([exited(2, 1), exited(0, -15)], {2: OWN, 0: NOTHING}, 2),
        ([exited(0, 0), exited(2, -9), exited(1, 1)], {2: NOTHING, 1: RESET}, 2),
        # Interpreters take their time to end: a victim may be gone before its culprit.
        ([exited(0, 1), exited(2, 1)], {0: RESET, 2: OWN}, 2),
        ([exited(0, 1), exited(2, -15)], {0: RESET, 2: OWN}, 2),
        ([exited(0, 1), exited(1, -15), exited(2, -9)], {0: RESET, 1: NOTHING, 2: NOTHING}, 2),
        ([exited(0, 1), exited(1, 1)], {0: RESET, 1: RESET}, 0),
        ([exited(0, -15), exited(1, -15)], {0: NOTHING, 1: NOTHING}, 0),
    ],
)
def test_the_culprit(exits: list[WorkerExited], evidence: dict[int, Evidence], culprit: int) -> None:
    """The first to die, unless it only says that a peer went away."""
    found = find_culprit(a_round(*exits), evidence)
    assert found is not None
    assert found.rank == culprit


def test_no_culprit() -> None:
    assert find_culprit(a_round(exited(0, 0)), {}) is None


def test_verdict(files: RankFiles) -> None:
    """One block says who, why, who else, and what comes next; the same goes to the JSON file."""
    exits = (exited(1, 1), exited(0, 1), exited(2, -15), exited(3, -15))
    left = Evidence(("Traceback …", "ValueError: boom"), True, "ValueError: boom", 1200)
    evidence = {1: left, 0: RESET, 2: NOTHING, 3: NOTHING}
    verdict = judge(
        a_round(*exits),
        exits[0],
        [files] * 4,
        evidence,
        Restart(1, 3),
        now=9.0,
        wall_time=1e9,
    )
    assert verdict.render() == [
        "round 2 failed after 0.5 s",
        "  rank 1 failed first: ValueError: boom (exit code 1), 1200 steps done",
        "  its traceback:",
        "    Traceback …",
        "    ValueError: boom",
        "  then rank 0: RuntimeError: Connection closed by peer [127.0.0.1]:1",
        "  stopped: ranks 2-3",
        f"  log: {files.err}",
        "  restarting: 1 of at most 3 restarts",
    ]
    record = json.loads(verdict.to_json())
    assert (record["round"], record["rank"], record["code"], record["step"]) == (2, 1, 1, 1200)
    assert record["stopped"] == [2, 3]


def test_verdict_on_a_lost_zygote(files: RankFiles) -> None:
    round_ = a_round(trouble=ZygoteLost(-9, 3.0))
    verdict = judge(round_, None, [files], {}, GiveUp(70, 0), now=9.0, wall_time=1e9)
    text = verdict.render()
    assert "the zygote was lost, and all workers with it: killed by SIGKILL" in text[1]
    assert text[-1] == "  giving up: no restarts allowed; exit code 70"


def test_exits_are_described() -> None:
    assert describe_exit(3) == "exit code 3"
    assert "SIGSEGV (signal 11" in describe_exit(-11)
    assert "memory" in describe_exit(-9)
    assert describe_exit(-40).startswith("killed by ")
