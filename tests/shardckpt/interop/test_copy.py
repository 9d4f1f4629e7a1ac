"""copy: streamed, resumable; and what an interrupted command leaves."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from shardckpt import load, save
from shardckpt.errors import CorruptError
from shardckpt.interop.copy import copy
from shardckpt.interop.reshard import reshard
from shardckpt.storage import LocalStorage, Storage, open_storage
from tests.kit.faults import HookedStorage
from tests.kit.servers import FaultyProxy, S3Server, faulty_proxy

MIB = 1 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four packs."""
    folder = tmp_path_factory.mktemp("made")
    save(folder / "one", _state())
    reshard(folder / "one", folder / "four", 4)
    return folder / "four"


def _state() -> dict[str, torch.Tensor]:
    return {name: torch.arange(100_000) + number for number, name in enumerate("abc")}


def _check(where: str | Path | Storage, options: dict[str, Any] | None = None) -> None:
    into = {name: torch.zeros(100_000, dtype=torch.int64) for name in "abc"}
    load(where, into, storage_options=options)
    assert all(torch.equal(into[name], tensor) for name, tensor in _state().items())


class TestResume:
    def test_what_is_there_and_right_is_not_copied_again(self, made: Path, tmp_path: Path) -> None:
        """Neither after a failure nor after an interrupt; and what is not right is copied."""
        ends: list[type[BaseException]] = [OSError, KeyboardInterrupt]
        for number, end in enumerate(ends):
            out = tmp_path / str(number)
            written: list[str] = []

            def stop(
                method: str, path: str, written: list[str] = written, end: type[BaseException] = end
            ) -> None:
                if method == "write_pieces":
                    written.append(path)
                    if len(written) == 3:
                        raise end("enough")

            with pytest.raises(end) as caught:
                copy(made, HookedStorage(LocalStorage(str(out)), stop))
            assert "2 of 4 packs" in "".join(getattr(caught.value, "__notes__", ()))
            assert not (out / "manifest.json").exists()
            spoilt = out / "rank-00001/data.pack"
            data = bytearray(spoilt.read_bytes())
            data[len(data) // 2] ^= 1
            spoilt.write_bytes(data)
            again = HookedStorage(LocalStorage(str(out)), lambda _method, _path: None)
            copy(made, again)
            packs = [path for method, path in again.calls if method == "write_pieces"]
            assert packs == [f"rank-{rank:05d}/data.pack" for rank in (1, 2, 3)]
            _check(out)

    def test_nothing_is_left_of_one_that_is_corrupt(self, made: Path, tmp_path: Path) -> None:
        """Nobody will ever finish that copy."""
        source = tmp_path / "source"
        subprocess.run(["cp", "-r", str(made), str(source)], check=True)
        spoilt = source / "rank-00002/data.pack"
        spoilt.write_bytes(spoilt.read_bytes()[:-1])
        with pytest.raises(CorruptError, match="rank-00002"):
            copy(source, tmp_path / "out")
        assert not list((tmp_path / "out").rglob("data.pack"))

    def test_progress_is_reported_within_a_pack(self, tmp_path: Path) -> None:
        save(tmp_path / "in", {str(n): torch.zeros(20 * MIB, dtype=torch.uint8) for n in range(4)})
        seen: list[tuple[int, int]] = []
        copy(tmp_path / "in", tmp_path / "out", progress=lambda *at: seen.append(at))
        assert len(seen) >= 4
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("direction", ["to S3", "local"])
def test_memory_is_bounded_and_no_temporary_file_is_needed(
    direction: str, moto_s3: S3Server, tmp_path: Path
) -> None:
    """A pack of 480 MB without any $TMPDIR, in a process that takes 300 MB for it."""
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    save(source, {str(n): torch.full((60 * MIB,), n, dtype=torch.uint8) for n in range(8)})
    if direction == "to S3":
        out = moto_s3.url("large")
    options = dict(moto_s3.options)
    program = f"""
import resource, sys, tempfile
import s3fs, shardckpt.interop.copy
tempfile.tempdir = "/nonexistent"
source, out, options = {source!r}, {out!r}, {options!r}
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shardckpt.interop.copy.copy(
    source, out,
    source_options=options if "://" in source else None, target_options=options if "://" in out else None,
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 << 10


class TestInterrupt:
    """Ctrl-C ends a command within moments, whatever it waits for; then what it says is true."""

    @pytest.fixture
    def proxied(self, moto_s3: S3Server, made: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A checkpoint at a server that the test may spoil, and the URL of it. A command has the keys to it."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        url = moto_s3.url("source")
        copy(made, url, target_options=moto_s3.options)
        with faulty_proxy(moto_s3.endpoint) as proxy:
            yield proxy, url

    def run(
        self,
        proxy: FaultyProxy,
        arguments: list[object],
        at: Callable[[str, str], bool],
        then: Callable[[str, str], str | None],
    ) -> str:
        """Interrupt a command when a request is `at` that point; what it says. `then` are the faults since."""
        hit = threading.Event()

        def faults(method: str, path: str) -> str | None:
            if at(method, path):
                hit.set()
            return then(method, path) if hit.is_set() else None

        proxy.faults = faults
        command = [
            sys.executable,
            "-m",
            "shardckpt",
            *map(str, arguments),
            "--endpoint-url",
            proxy.endpoint,
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            assert hit.wait(60)
            child.send_signal(signal.SIGINT)
            message = child.communicate(timeout=60)[1]
        assert child.returncode == 130, message
        return message.strip().splitlines()[-1]

    @pytest.mark.parametrize("command", ["verify", "copy", "merge", "reshard", "ls"])
    @pytest.mark.parametrize("fault", ["ignore", "trickle"])
    def test_in_the_middle_of_reads(
        self,
        command: str,
        fault: str,
        proxied: tuple[FaultyProxy, str],
        tmp_path: Path,
    ) -> None:
        proxy, url = proxied
        out = {"merge": [tmp_path / "x.pt"], "copy": [tmp_path / "x"]}.get(command, [])
        if command == "reshard":
            out = [tmp_path / "x", "--world-size", "2"]  # type: ignore[list-item]
        message = self.run(
            proxy,
            [command, url, *out],
            lambda method, path: method == "GET" and ("data.pack" in path or command == "ls"),
            lambda method, _path: fault if method == "GET" else None,
        )
        assert message == "shardckpt: interrupted; nothing half-written is left"
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    @pytest.mark.parametrize("command", ["copy", "reshard"])
    def test_in_the_middle_of_uploads(
        self,
        command: str,
        proxied: tuple[FaultyProxy, str],
        moto_s3: S3Server,
        tmp_path: Path,
    ) -> None:
        """The upload is aborted; complete packs are removed, or the message names them for the next copy."""
        save(tmp_path / "in", {"w": torch.zeros(80 * MIB, dtype=torch.uint8)})
        reshard(tmp_path / "in", tmp_path / "two", 2)
        proxy, out = proxied[0], moto_s3.url("out")
        arguments: list[object] = [command, tmp_path / "two", out]
        message = self.run(
            proxy,
            [*arguments, "--world-size", "2"] if command == "reshard" else arguments,
            lambda method, path: method == "PUT" and "rank-00001" in path and "partNumber=2" in path,
            lambda method, _path: "ignore" if method == "PUT" else None,
        )
        left = open_storage(out, moto_s3.options).list()
        if command == "reshard":
            assert message == "shardckpt: interrupted; nothing half-written is left"
            assert left == []
        else:
            assert re.search(r"interrupted; 1 of 2 packs are at s3://.*the same command goes on", message)
            assert left == ["rank-00000"]
        assert _uploads(moto_s3, out) == []

    def test_of_a_store_that_does_not_answer(
        self,
        proxied: tuple[FaultyProxy, str],
        moto_s3: S3Server,
        tmp_path: Path,
    ) -> None:
        """The message names what may be left, and where."""
        save(tmp_path / "in", {"w": torch.zeros(40 * MIB, dtype=torch.uint8)})
        proxy, out = proxied[0], moto_s3.url("out")
        message = self.run(
            proxy,
            ["copy", tmp_path / "in", out],
            lambda method, path: method == "PUT" and "partNumber=2" in path,
            lambda _method, _path: "ignore",
        )
        assert f"parts of an unfinished upload to {out}/rank-00000/data.pack may be left" in message
        assert len(_uploads(moto_s3, out)) == 1


def _uploads(server: S3Server, url: str) -> list[str]:
    """Uploads below the URL that were neither completed nor aborted."""
    files = fsspec.filesystem("s3", **server.options)
    found = files.call_s3("list_multipart_uploads", Bucket=server.bucket).get("Uploads", [])
    return [upload["Key"] for upload in found if url.endswith(upload["Key"].partition("/")[0])]
