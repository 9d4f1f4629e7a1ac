"""Ceph's RADOS gateway over one small cluster on loopback: a real S3 server, and a fast one.

Needs Debian's packages: apt-get install --no-install-recommends ceph-mon ceph-mgr ceph-osd ceph-common radosgw
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CEPH_KEY", "CEPH_SECRET", "ceph", "ceph_is_installed"]

CEPH_KEY, CEPH_SECRET = "bench-key", "bench-secret"

_DAEMONS = ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw")
_START_SECONDS = 60.0
_CONFIG = """\
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = [v1:127.0.0.1:{mon_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
osd_memory_target = 1073741824
bluestore_block_size = {nbytes}
bluestore_block_create = true
mon_data = {folder}/mon
mgr_data = {folder}/mgr
osd_data = {folder}/osd
rgw_data = {folder}/rgw
keyring = {folder}/keyring
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
pid_file = {folder}/$name.pid
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{port}{tls}
"""


def ceph_is_installed() -> bool:
    """True if the daemons are there."""
    return all(shutil.which(name) for name in _DAEMONS)


@contextlib.contextmanager
def ceph(folder: Path, certificate: Path | None = None, *, gigabytes: int = 20) -> Iterator[str]:
    """Run the cluster; yields the endpoint. Takes 10 to 20 s to start.

    Args:
        folder: an empty one, for everything.
        certificate: a file with a certificate and its key has the endpoint speak https.
        gigabytes: size of the cluster's sparse file. What is overwritten or deleted counts for hours.
    """
    (port, tls_port, mon_port), daemons = _free_ports(3), []
    tls = f" ssl_endpoint=127.0.0.1:{tls_port} ssl_certificate={certificate}" if certificate else ""
    config, fsid, osd = folder / "ceph.conf", str(uuid.uuid4()), str(uuid.uuid4())
    config.write_text(
        _CONFIG.format(
            fsid=fsid, mon_port=mon_port, nbytes=gigabytes << 30, folder=folder, port=port, tls=tls
        )
    )
    for name in ("mon", "mgr", "osd", "rgw"):
        (folder / name).mkdir()

    def run(program: str, *arguments: str) -> None:
        conf = [] if program in ("ceph-authtool", "monmaptool") else ["-c", str(config)]
        command = [program, *conf, *arguments]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_START_SECONDS, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")

    def start(program: str, *arguments: str) -> None:
        with (folder / f"{program}.out").open("wb") as output:
            daemons.append(
                subprocess.Popen(
                    [program, "-f", "-c", str(config), *arguments], cwd=folder, stdout=output, stderr=output
                )
            )

    try:
        run(
            "ceph-authtool",
            "--create-keyring",
            "keyring",
            "--gen-key",
            "-n",
            "mon.",
            "--cap",
            "mon",
            "allow *",
        )
        run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", "--fsid", fsid, "monmap")
        run("ceph-mon", "-i", "a", "--mkfs", "--monmap", "monmap", "--keyring", "keyring")
        start("ceph-mon", "-i", "a")
        start("ceph-mgr", "-i", "x")
        run("ceph", "osd", "new", osd)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0")
        start("radosgw", "-n", "client.rgw.a")
        _wait_for(tls_port if certificate else port)
        user = (
            "--uid=bench",
            "--display-name=bench",
            f"--access-key={CEPH_KEY}",
            f"--secret-key={CEPH_SECRET}",
        )
        run("radosgw-admin", "user", "create", *user)
        yield f"https://127.0.0.1:{tls_port}" if certificate else f"http://127.0.0.1:{port}"
    finally:
        for daemon in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon.pid, signal.SIGKILL)
            daemon.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [held.getsockname()[1] for held in sockets]


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise RuntimeError("radosgw did not start")
