"""The nodes of a job and their rendezvous, from torchrun's options."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import parse

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--rdzv-endpoint=h"], "rdzv_backend", "c10d"),
        (["--rdzv-endpoint=h"], "rdzv_endpoint", ("h", 29400)),
        (["--rdzv-endpoint=h:1"], "rdzv_endpoint", ("h", 1)),
        (["--rdzv-endpoint=[::1]"], "rdzv_endpoint", ("::1", 29400)),
        (["--rdzv-endpoint=fe80::2"], "rdzv_endpoint", ("fe80::2", 29400)),
        (["--rdzv-endpoint=h", "--rdzv-backend=etcd-v2"], "rdzv_endpoint", ("h", 2379)),
        (["--rdzv-endpoint=h", "--rdzv-backend=etcd"], "rdzv_backend", "etcd"),
        (["--rdzv-endpoint=h", "--rdzv-backend=static", "--node-rank=1"], "rdzv_endpoint", ("h", 29500)),
        (["--master-addr=h", "--node-rank=1"], "rdzv_backend", "static"),
        (["--master-addr=h", "--node-rank=1"], "rdzv_endpoint", ("h", 29500)),
        (["--master-addr=h", "--master-port=7", "--node-rank=1"], "rdzv_endpoint", ("h", 7)),
        (["--master-addr=h", "--node-rank=1"], "node_rank", 1),
        (["--rdzv-endpoint=h", "--node-rank=9"], "rdzv_backend", "c10d"),
        (["--rdzv-endpoint=h"], "run_id", "none"),
        (["--rdzv-endpoint=h", "--rdzv-id=job7"], "run_id", "job7"),
        (["--rdzv-endpoint=h", "--local-addr=10.0.0.2"], "local_addr", "10.0.0.2"),
        (["--rdzv-endpoint=h"], "master_addr", "127.0.0.1"),
        (
            ["--rdzv-endpoint=h", "--rdzv-conf=join_timeout=9, is_host=1"],
            "rdzv_conf",
            {"join_timeout": "9", "is_host": "1"},
        ),
    ],
)
def test_several_nodes(argv: list[str], field: str, value: object) -> None:
    """torchrun's options say the same here, and its default ports hold."""
    config = parse(["--nnodes", "2", *argv, "train.py"])
    assert (config.nnodes, config.is_alone) == ((2, 2), False)
    assert getattr(config, field) == value


def test_elastic_nodes() -> None:
    config = parse(["--nnodes=1:4", "--rdzv-endpoint=h", "--nproc=6:8", "train.py"])
    assert (config.nnodes, config.is_alone) == ((1, 4), False)
    assert (config.min_nproc, config.nproc) == (6, 8)


@pytest.mark.parametrize(
    ("flags", "variables", "file", "backend", "endpoint"),
    [
        ("--rdzv-endpoint=h", {"PET_MASTER_ADDR": "m"}, "", "c10d", ("h", 29400)),
        ("--master-addr=h", {"PET_RDZV_ENDPOINT": "m"}, "", "static", ("h", 29500)),
        ("--master-addr=h", {"PET_MASTER_PORT": "5"}, "", "static", ("h", 5)),
        ("", {"PET_MASTER_ADDR": "m", "PET_MASTER_PORT": "5"}, "rdzv-endpoint: f", "static", ("m", 5)),
        ("--rdzv-backend=etcd", {}, "rdzv-endpoint: f:3", "etcd", ("f", 3)),
        ("--rdzv-endpoint=h", {}, "standalone: true", "c10d", ("h", 29400)),
    ],
)
def test_the_higher_source_determines_the_endpoint(
    flags: str,
    variables: dict[str, str],
    file: str,
    backend: str,
    endpoint: tuple[str, int],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by other options than the lower source has."""
    (folder / "c.yaml").write_text(file)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argv = ["--config=c.yaml", "--nnodes=2", "--node-rank=0", *flags.split(), "train.py"]
    config = parse(argv)
    assert (config.rdzv_backend, config.rdzv_endpoint) == (backend, endpoint)
