"""The command as a process: exit codes, errors, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.format.manifest import MANIFEST
from tests.kit.servers import S3Server
from tests.shardckpt.cli.helpers import Call, change, flip, rest


class TestErrors:
    """One line on stderr, nothing on stdout, and an exit code that says what can be done."""

    @pytest.mark.parametrize("command", ["info", "verify", "merge", "reshard", "copy"])
    @pytest.mark.parametrize("there", ["nothing", "another folder"])
    def test_not_a_checkpoint(self, call: Call, tmp_path: Path, command: str, there: str) -> None:
        url = tmp_path / "x"
        if there != "nothing":
            url.mkdir()
            (url / "file").touch()
        code, out, err = call(command, url, *rest(command, tmp_path))
        assert (code, out) == (3, "")
        assert f"{url} is neither a checkpoint nor a run" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["info", "verify", "merge", "reshard", "copy"])
    @pytest.mark.parametrize(
        ("edit", "code", "text"),
        [
            (lambda m: m.update(format="shardckpt/2"), 3, "format 'shardckpt/2'"),
            (lambda m: m.update(surprise=1), 4, "unknown field `surprise`"),
            (lambda m: m["packs"][0].update(path="../../../x"), 4, "not a plain path inside"),
        ],
    )
    def test_a_manifest_that_is_not_right(
        self,
        call: Call,
        newest: Path,
        tmp_path: Path,
        command: str,
        edit: Callable[[Any], object],
        code: int,
        text: str,
    ) -> None:
        change(newest / MANIFEST, edit)
        found, out, err = call(command, newest, *rest(command, tmp_path))
        assert (found, out) == (code, "")
        assert text in err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["merge", "reshard", "copy"])
    @pytest.mark.parametrize("damage", ["bit", "cut"])
    def test_a_damaged_pack(
        self, call: Call, newest: Path, tmp_path: Path, command: str, damage: str
    ) -> None:
        """Nothing is left that could be taken for a result."""
        pack = newest / "rank-00000/data.pack"
        if damage == "bit":
            flip(pack, shardckpt.open(newest).manifest.chunks.offset[-1])
        else:
            os.truncate(pack, pack.stat().st_size - 1)
        code, out, err = call(command, newest, *rest(command, tmp_path))
        assert (code, out) == (4, "")
        assert "rank-00000/data.pack" in err or "corrupt" in err
        assert not (tmp_path / "out.pt").exists()
        assert call("info", tmp_path / "out")[0] == 3

    def test_what_the_checkpoint_lacks(self, call: Call, run: Path, tmp_path: Path) -> None:
        code, _, err = call("merge", run, tmp_path / "w.pt", "--select", "no*")
        assert code == 2
        assert "no tensor's name matches 'no*'" in err
        code, _, err = call("merge", run, tmp_path / "w.pt", "--only", "modell")
        assert code == 2
        assert "nothing is saved at 'modell': the state has model, sampler, rng" in err
        assert not list(tmp_path.glob("*.pt"))

    def test_json_tells_of_errors_too(self, call: Call, tmp_path: Path) -> None:
        """One document on stdout whatever happens, and the line on stderr as well."""
        code, out, err = call("verify", tmp_path / "x", "--json")
        document = json.loads(out)
        assert code == document["error"]["exit_code"] == 3
        assert document["error"]["type"] == "NotACheckpointError"
        assert err == f"shardckpt: {document['error']['message']}\n"
        code, out, _ = call("reshard", "a", "--json")
        assert code == json.loads(out)["error"]["exit_code"] == 2

    def test_a_full_disk(self, call: Call, tmp_path: Path, small_disk: Path) -> None:
        shardckpt.save(tmp_path / "big", {"w": torch.zeros(2 << 20)})
        for command in ("merge", "reshard", "copy"):
            code, out, err = call(command, tmp_path / "big", *rest(command, small_disk))
            assert (code, out) == (5, ""), err
            assert "are free" in err
        assert not list(small_disk.glob("*.pt"))

    def test_a_storage_out_of_reach(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        code, out, err = call("ls", "s3://bucket/run", "--endpoint-url", "http://127.0.0.1:1")
        assert (code, out) == (5, "")
        assert err.count("\n") == 1
        assert "s3://bucket/run" in err

    def test_no_credentials(self, call: Call, moto_s3: S3Server) -> None:
        code, _, err = call("ls", moto_s3.url("x"), "--endpoint-url", moto_s3.endpoint)
        assert code == 5
        assert "credentials" in err.lower()

    def test_a_bucket_that_does_not_exist(self, call: Call, s3: tuple[str, list[str]]) -> None:
        code, _, err = call("ls", "s3://no-such-bucket/run", *s3[1])
        assert code in (3, 5)
        assert "no-such-bucket" in err

    def test_an_unknown_protocol(self, call: Call) -> None:
        code, _, err = call("ls", "s4://bucket/run")
        assert code == 5
        assert "unknown protocol 's4'" in err


class TestAsAProcess:
    def test_a_reader_that_leaves_early(self, tmp_path: Path) -> None:
        """`shardckpt info ... | head -1` ends without a word."""
        shardckpt.save(tmp_path / "many", {f"layer.{i}": {"w": torch.ones(1)} for i in range(3000)})
        command = f"{sys.executable} -m shardckpt info --all {tmp_path / 'many'} | head -1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("checkpoint")
        assert done.stderr == ""

    def test_starts_without_what_it_does_not_need(self, made: Path) -> None:
        """Torch, Zarr, fsspec and rich take longer to import than a listing takes."""
        code = (
            "import sys; from shardckpt.cli import main; main(['ls', sys.argv[1]]); "
            "print(*{'torch', 'zarr', 'fsspec', 's3fs', 'rich'} & {*sys.modules}, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(made)], capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == ""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupted(self, large: Path, tmp_path: Path, number: signal.Signals) -> None:
        """In the middle of writing: nothing half-written is left, and the exit code is the shell's."""
        command = [sys.executable, "-m", "shardckpt", "merge", str(large), str(tmp_path / "w.safetensors")]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not list(tmp_path.iterdir()):
            assert child.poll() is None
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
        assert err == "shardckpt: interrupted; nothing half-written is left\n"
        assert child.returncode == 130
        assert not list(tmp_path.iterdir())
