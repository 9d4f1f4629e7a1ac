"""The configuration of a job: defaults, spellings, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import parse
from launcher.config.command import Command, Kind
from launcher.config.job import Config
from launcher.errors import UsageError
from launcher.system.devices import count_cpus

pytestmark = pytest.mark.usefixtures("folder")


def test_defaults(folder: Path) -> None:
    config = parse(["train.py", "--lr", "1"])
    assert config.command == Command(Kind.SCRIPT, "train.py", ("--lr", "1"))
    assert (config.nproc, config.max_restarts, config.grace) == (1, 3, 15.0)
    assert config.drain_timeout == 300.0
    assert config.directory == folder / "runs/train"
    assert config.logs == folder / "runs/train/logs"
    assert config.checkpoints == str(folder / "runs/train/checkpoints")
    assert config.is_warm


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--nproc", "3"], "nproc", 3),
        (["--nproc=3"], "nproc", 3),
        (["--nproc-per-node=3"], "nproc", 3),
        (["--nproc_per_node", "3"], "nproc", 3),
        (["--nproc", "2", "--nproc", "3"], "nproc", 3),
        (["--max_restarts=0"], "max_restarts", 0),
        (["--shutdown-timeout", "7"], "grace", 7.0),
        (["--grace", "0.5"], "grace", 0.5),
        (["--drain_timeout=0"], "drain_timeout", 0.0),
        (["--rdzv_id=abc"], "run_id", "abc"),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:1234"], "master_port", 1234),
        (["--rdzv-endpoint", "[::1]:1234"], "master_addr", "::1"),
        (["--rdzv-endpoint=localhost"], "master_port", 0),
        (["--master-addr", "localhost"], "master_addr", "localhost"),
        (["--master_port=1234"], "master_port", 1234),
        (["--local-addr", "localhost"], "master_addr", "localhost"),
        (["--local-addr", "::1", "--master-addr", "localhost"], "master_addr", "localhost"),
        (["--role", "trainer"], "role", "trainer"),
        (["--standalone", "--nnodes", "1"], "nproc", 1),
        (["--standalone", "--nnodes=1:1", "--node-rank", "0"], "nproc", 1),
        (["--monitor-interval", "5", "--start-method=fork"], "nproc", 1),
        (["--preload", "json,csv"], "preload", ("json", "csv")),
        (["--cold"], "cold", True),
        (["--cold=false"], "cold", False),
        (["--ckpt", "s3://bucket/run"], "checkpoints", "s3://bucket/run"),
        (["--ckpt", "file:///x"], "checkpoints", "file:///x"),
        (["--ckpt", "/x:/y"], "checkpoints", "/x:/y"),
        (["--nproc", "3"], "min_nproc", 3),
        (["--nproc", "2:3"], "min_nproc", 2),
        (["--nproc", "2:3"], "nproc", 3),
        (["--nproc", "1:cpu"], "nproc", count_cpus()),
        (["--nnodes", "1"], "is_alone", True),
        (["--crash-loop", "0"], "crash_loop", 0),
        (["--hang-timeout", "0"], "hang_timeout", 0.0),
        (["--hang-timeout=90"], "hang_timeout", 90.0),
        (["--cold"], "hang_timeout", None),
        (["--quiet"], "quiet", True),
        (["--log-level", "debug"], "log_level", "debug"),
        (["--metrics-port=9100"], "metrics_port", 9100),
        (["--rdzv-conf", "timeout=5"], "is_alone", True),
        (["--rdzv-id", "a"], "run_id", "a"),
        (["--cold"], "run_id", "train"),
        (["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"], "nproc", 1),
    ],
)
def test_spellings(argv: list[str], field: str, value: object) -> None:
    assert getattr(parse([*argv, "train.py"]), field) == value


def test_local_paths_become_absolute(folder: Path) -> None:
    config = parse(["--run-dir", "a", "--log-dir", "b", "--ckpt", "c", "train.py"])
    assert (config.directory, config.logs) == (folder / "a", folder / "b")
    assert config.checkpoints == str(folder / "c")


def test_streams_shown_here() -> None:
    """torchrun's masks: 1 stdout, 2 stderr; what is teed is shown even if it is redirected."""
    shown = parse(["--nproc=3", "-r", "0:3,1:1", "-t0:2", "--local-ranks-filter", "0,1", "train.py"]).shown
    assert not shown.shows(0, stderr=False)
    assert shown.shows(0, stderr=True)
    assert not shown.shows(1, stderr=False)
    assert shown.shows(1, stderr=True)
    assert not shown.shows(2, stderr=False)
    assert parse(["train.py"]).shown.shows(5, stderr=False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to run"),
        (["--nproc", "2"], "nothing to run"),
        (["--nproc"], "--nproc needs a value"),
        (["--nproc", "0", "train.py"], "at least 1, or auto, gpu or cpu, or MIN:MAX of these, found '0'"),
        (["--nproc", "-3", "train.py"], "at least 1, or auto, gpu or cpu, or MIN:MAX of these, found '-3'"),
        (
            ["--nproc", "many", "train.py"],
            "at least 1, or auto, gpu or cpu, or MIN:MAX of these, found 'many'",
        ),
        (["--nproc", "xpu", "train.py"], "found 'xpu'"),
        (["--nproc", "gpu", "train.py"], "a node with GPUs"),
        (["--nprok", "2", "train.py"], "--nprok: unknown option: did you mean --nproc"),
        (["--dry-run", "train.py"], "--dry-run: unknown option: `launch --help` lists the options"),
        (["--nproc", "2", "--local-ranks-filter", "0,2", "train.py"], "filter: expected ranks from 0 to 1"),
        (["--cold=maybe", "train.py"], "--cold: expected true or false"),
        (["-x", "train.py"], "-x: unknown option"),
        (["--max-restarts", "-1", "train.py"], "0 or more, found '-1'"),
        (["--grace", "nan", "train.py"], "a number of seconds"),
        (["--nproc", "4:2", "train.py"], "nproc: expected a minimum of at most 2, the most workers"),
        (["--nproc", "0:2", "train.py"], "at least 1, or auto, gpu or cpu, or MIN:MAX of these"),
        (["--nproc", "auto:8", "train.py"], "found 'auto:8'"),
        (["--nproc", ":8", "train.py"], "found ':8'"),
        (["--nproc", "1:2:3", "train.py"], "found '1:2:3'"),
        (["--nnodes", "0", "train.py"], "a number of nodes of at least 1, or MIN:MAX, found '0'"),
        (["--nnodes", "3:2", "train.py"], "or MIN:MAX, found '3:2'"),
        (["--nnodes", "2:", "train.py"], "or MIN:MAX, found '2:'"),
        (["--nnodes", "2", "train.py"], "2 nodes need a place to meet: give --rdzv-endpoint HOST:PORT"),
        (["--nnodes=1:4", "train.py"], "4 nodes need a place to meet"),
        (["--nnodes=2", "--master-port=1", "train.py"], "2 nodes need a place to meet"),
        (["--nnodes=2", "--rdzv-backend=c10d", "--master-addr=h", "train.py"], "need a place to meet"),
        (["--nnodes=2", "--rdzv-backend=static", "train.py"], "2 nodes need a place to meet"),
        (["--nnodes=2", "--rdzv-endpoint=h:0", "train.py"], "a port from 1 to 65535 that all nodes know"),
        (["--nnodes=2", "--rdzv-endpoint=h:70000", "train.py"], "expected HOST or HOST:PORT"),
        (["--nnodes=2", "--rdzv-endpoint=h:x", "train.py"], "expected HOST or HOST:PORT, found 'h:x'"),
        (["--nnodes=2", "--rdzv-endpoint=/a/file", "train.py"], "expected HOST or HOST:PORT"),
        (["--nnodes=2", "--rdzv-endpoint=", "train.py"], "expected HOST or HOST:PORT"),
        (["--nnodes=2", "--master-addr=h", "train.py"], "node_rank: expected 0 to 1, another on each node"),
        (
            ["--nnodes=2", "--master-addr=h", "--node-rank=2", "train.py"],
            "expected 0 to 1, another on each",
        ),
        (["--nnodes=2", "--master-addr=h", "--node-rank=-1", "train.py"], "a node's number from 0"),
        (["--nnodes=1:2", "--master-addr=h", "--node-rank=0", "train.py"], "static nodes never change"),
        (["--nnodes=2", "--standalone", "train.py"], "--nnodes: --standalone means one node"),
        (["--nnodes=2", "--rdzv-endpoint=h", "--master-addr=h", "train.py"], "--master-addr says the same"),
        (
            ["--nnodes=2", "--rdzv-endpoint=h", "--rdzv-conf=join_timeout=x", "train.py"],
            "join_timeout to be",
        ),
        (
            ["--nnodes=2", "--rdzv-endpoint=h", "--rdzv-conf=join_timeout=0", "train.py"],
            "join_timeout to be",
        ),
        (["--nnodes=2", "--rdzv-endpoint=h", "--rdzv-conf=is_host=2", "train.py"], "is_host to be true or"),
        (["--nnodes=2", "--rdzv-endpoint=h", "--rdzv-conf=store_type=file", "train.py"], "to be tcp"),
        (["--nnodes=2", "--rdzv-endpoint=h", "--rdzv-conf=timeout=9", "train.py"], "c10d knows no timeout"),
        (["--rdzv-conf", "join_timeout", "train.py"], "KEY=VALUE pairs separated by commas"),
        (["--rdzv-conf", "join=3", "train.py"], "expected keys of ca_cert, cacert"),
        (["--rdzv-backend", "mpi", "train.py"], "expected c10d or etcd-v2 or etcd or static, found 'mpi'"),
        (["--node-rank", "1", "train.py"], "--node-rank: expected 0, as there is one node, found 1"),
        (["--hang-timeout", "-1", "train.py"], "a number of seconds, 0 or more"),
        (["--crash-loop=-1", "train.py"], "a number of failures, 0 or more"),
        (
            ["--ckpt", "s3:/bucket/run", "train.py"],
            "--ckpt: expected a folder or a URL: did you mean s3://bucket/",
        ),
        (
            ["--ckpt=file:/x", "train.py"],
            "did you mean file://x? (A folder of this name would be ./file:/x), fou",
        ),
        (["--ckpt=", "train.py"], "--ckpt: expected a folder or a URL, found ''"),
        (
            ["--ckpt", "s3://b/run/attempt-0002/step-00000050/", "train.py"],
            "--ckpt: expected a run, not a checkpoint in it: give s3://b/run, found",
        ),
        (["--log-level", "loud", "train.py"], "debug or info or warning or error, found 'loud'"),
        (["--metrics-port", "99999", "train.py"], "65535"),
        (["--master-port", "70000", "train.py"], "65535"),
        (["--rdzv-endpoint", "h:1", "--master-port=2", "train.py"], "--master-port says the same"),
        (["--standalone", "--rdzv-endpoint", "h:1", "train.py"], "--standalone picks the endpoint"),
        (["--signals-to-handle", "SIGUSR1", "train.py"], "(so does SIGUSR1; SIGUSR2 never)"),
        (["--virtual-local-rank", "train.py"], "torch.cuda.set_device"),
        (["--redirects", "4", "train.py"], "0 to 3"),
        (["--local-ranks-filter", "a", "train.py"], "ranks separated by commas"),
        (["--preload", "1x", "train.py"], "module names separated by commas"),
        (["--preload", "no_such_module", "train.py"], "no module named no_such_module"),
        (["--preload", "json", "--cold", "train.py"], "leave out --preload"),
        (["-m", "--no-python", "train.py"], "-m and --no-python exclude each other"),
        (["-m", "--", "train.py"], "-m and -- exclude each other"),
        (["x" * 300], "cannot be read: File name too long"),
        (["nope.py"], "script nope.py does not exist"),
        (["."], "is a directory without __main__.py"),
        (["-m", "no_such_module"], "no such module"),
        (["-m", "json.no_such_module"], "no such module"),
        (["-m", "json"], "json is a package without __main__"),
        (["--", "no-such-command"], "command no-such-command not found"),
        (["--", "x" * 300], "not found: check it and PATH"),
        (["--", "./train.py"], "is not executable"),
    ],
)
def test_bad_usage(argv: list[str], message: str, folder: Path) -> None:
    """Each is one clear message, and nothing is made."""
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(argv)
    assert [path.name for path in folder.iterdir()] == ["train.py"]


def test_a_config_validates_itself() -> None:
    command = Command(Kind.SCRIPT, "train.py")
    wrongs: list[dict[str, Any]] = [
        {"nproc": 0},
        {"min_nproc": -1},
        {"nproc": 2, "min_nproc": 3},
        {"max_restarts": -1},
        {"grace": -1.0},
        {"drain_timeout": -1.0},
        {"hang_timeout": -1.0},
        {"crash_loop": -1},
        {"metrics_port": -1},
        {"log_level": "loud"},
        {"nnodes": (2, 2)},
        {"nnodes": (0, 2)},
        {"nnodes": (1, 0)},
        {"rdzv_backend": "mpi", "nnodes": (2, 2)},
        {"rdzv_endpoint": ("h", 0), "nnodes": (2, 2)},
        {"rdzv_conf": {"timeout": "1"}, "rdzv_endpoint": ("h", 1), "nnodes": (2, 2)},
        {"node_rank": 2, "rdzv_backend": "static", "rdzv_endpoint": ("h", 1), "nnodes": (2, 2)},
    ]
    for wrong in wrongs:
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Config(command=command, **wrong)


def test_more_workers_than_gpus_are_refused() -> None:
    assert parse(["--nproc", "2", "train.py"], gpus=2).nproc == 2
    assert parse(["--nproc", "3", "--", "ls"], gpus=2).nproc == 3  # it may need none
    for asked in ("3", "1:3", "3:3"):
        with pytest.raises(UsageError, match=r"expected at most 2, the GPUs .* found 3"):
            parse(["--nproc", asked, "train.py"], gpus=2)


def test_workers_by_gpus() -> None:
    """Fewer GPUs than the minimum are one clear line."""
    for words in ("auto", "gpu"):
        config = parse(["--nproc", f"1:{words}", "train.py"], gpus=2)
        assert (config.min_nproc, config.nproc) == (1, 2)
        assert parse(["--nproc", words, "train.py"], gpus=2).min_nproc == 2
    assert parse(["--nproc", "auto", "train.py"], gpus=0).nproc == count_cpus()
    with pytest.raises(UsageError, match=r"a minimum of at most 2, the most workers .* found 4"):
        parse(["--nproc", "4:auto", "train.py"], gpus=2)


@pytest.mark.parametrize(
    ("limit", "nproc", "message"),
    [
        (256, 96, ""),
        (
            256,
            97,
            "97 workers need 258 open files, and 256 are allowed here: raise the hard limit (`ulimit -Hn`), ",
        ),
        (
            24,
            1,
            "1 worker needs 66 open files, and 24 are allowed here: raise the hard limit (`ulimit -Hn`)\n",
        ),
    ],
)
def test_more_workers_than_files_may_be_open(limit: int, nproc: int, message: str) -> None:
    """The soft limit is raised; the message about a hard limit that is too low has numbers that make sense."""
    code = (
        "import resource, sys; from launcher.cli import parse; from launcher.errors import UsageError\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (24, {limit}))\n"
        f"try: assert parse(['--nproc={nproc}', 'train.py'], gpus=0).nproc == {nproc}\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in done.stdout
    assert bool(done.stdout) == bool(message)
    assert "or ask for at most 96\n" in done.stdout or nproc != 97
