"""Scripts that run under `launch` and without it, and what each of them did."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.kit.job import WITHOUT_SIGUSR1, Job

__all__ = ["PATIENCE", "Outcome", "Style", "outcome", "run_launched", "run_plain", "script", "write"]

PATIENCE = 120.0
"""Seconds; far more than any script here takes, also where torch is imported again and again."""


@dataclass(frozen=True)
class Style:
    """One way to write a training job.

    Attributes:
        files: source by path; `train.py` is what runs if `words` do not say otherwise.
        words: the command line after `python` or `launch`.
        stdin: what there is to read.
        environment: what the user has exported.
    """

    files: Mapping[str, str]
    words: tuple[str, ...] = ("train.py", "--lr", "0.1")
    stdin: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def script(source: str, *words: str, stdin: str = "", **environment: str) -> Style:
    """The style of a single file."""
    return Style({"train.py": source}, ("train.py", *words), stdin, environment)


def write(job: Job, style: Style) -> None:
    for name, source in style.files.items():
        job.script(textwrap.dedent(source).lstrip("\n"), name)
    for name, value in style.environment.items():
        if name == "PYTHONPATH":
            value = os.pathsep.join([value, job.environment["PYTHONPATH"]])
        job.environment[name] = value


@dataclass(frozen=True)
class Outcome:
    """What a script did. Addresses and process IDs are masked."""

    code: int
    out: str
    err: str


def outcome(code: int, out: str, err: str) -> Outcome:
    """From an exit code as `subprocess` or a shell gives it."""
    mask = re.compile(r"0x[0-9a-f]{8,}|Thread-\d+|(?<=process )\d+")
    return Outcome(128 - code if code < 0 else code, mask.sub("…", out), mask.sub("…", err))


def torchrun_variables() -> dict[str, str]:
    """What torchrun sets for the only rank of a job."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ones = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE")
    zeros = ("RANK", "LOCAL_RANK", "ROLE_RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")
    return {
        **dict.fromkeys(ones, "1"),
        **dict.fromkeys(zeros, "0"),
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def run_plain(job: Job, style: Style) -> Outcome:
    done = subprocess.run(
        [*WITHOUT_SIGUSR1, sys.executable, "-u", *style.words],
        cwd=job.path,
        env={**job.environment, **torchrun_variables()},
        input=style.stdin.encode(),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    return outcome(done.returncode, out, err)


def run_launched(job: Job, style: Style) -> Outcome:
    """Its exit code, and what the rank's log files hold."""
    (job.path / "stdin").write_text(style.stdin, encoding="utf-8")
    with (job.path / "stdin").open() as file:
        process = job.start("--max-restarts=0", "--run-dir=runs/train", *style.words, stdin=file)
    process.communicate(timeout=PATIENCE)
    return outcome(process.returncode, job.log(0, "out"), job.log(0, "err"))
