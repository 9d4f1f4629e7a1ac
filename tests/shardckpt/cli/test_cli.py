"""The command `shardckpt` as a user meets it: what it prints, what it exits with, what it says of mistakes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import shardckpt
from shardckpt.cli import main
from shardckpt.cli.output import print_table, printable
from shardckpt.format import records
from shardckpt.format.manifest import MANIFEST, REFS
from shardckpt.formatting import age, size
from tests.kit.mounts import Mount
from tests.kit.servers import S3Server

COMMANDS = ("ls", "info", "verify", "merge", "reshard", "copy", "refs")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts: steps 50 and 100, then 150, and 200, which was not finished."""
    run = tmp_path_factory.mktemp("made") / "run"
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    state = {"model": model, "sampler": {"position": 0}, "rng": shardckpt.PerRank(torch.arange(3))}
    for steps in ((50, 100), (150,)):
        mgr = shardckpt.Checkpointer(run)
        mgr.restore(state)
        for step in steps:
            state["sampler"] = {"position": step * 10}
            mgr.save(step, state, metrics={"loss": 1 / step}).wait()
        mgr.close()
    (run / "attempt-0002/step-00000200/rank-00000").mkdir(parents=True)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def newest(run: Path) -> Path:
    """The run's newest good checkpoint."""
    return run / "attempt-0002/step-00000150"


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process; its exit code, and what it printed."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def change(path: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file, which keeps its checksum right if it has one."""
    document = json.loads(path.read_bytes())
    is_record = document.pop("crc32c", None) is not None
    edit(document)
    path.write_bytes(records.encode(document) if is_record else json.dumps(document).encode())


class TestLs:
    def test_lists_a_run_newest_last(self, call: Call, run: Path) -> None:
        """One aligned line for each, without decoration where it is piped; the newest good one is marked."""
        code, out, err = call("ls", run)
        lines = out.splitlines()
        assert (code, err) == (0, "")
        assert lines[0].split() == ["ATTEMPT", "STEP", "AGE", "RANKS", "SIZE", "STATE", "METRICS"]
        rows = [line.replace("*", " ").split() for line in lines[1:]]
        assert [(row[0], row[1]) for row in rows] == [("1", "50"), ("1", "100"), ("2", "150"), ("2", "200")]
        assert [line.startswith("*") for line in lines[1:]] == [False, False, True, False]
        assert rows[2][-2:] == ["loss", "0.00666667"]
        assert rows[3][-1] == "unfinished"

    def test_json(self, call: Call, run: Path) -> None:
        code, out, _ = call("ls", run, "--json")
        rows = json.loads(out)["checkpoints"]
        assert code == 0
        assert [(row["step"], row["state"], row["newest"]) for row in rows] == [
            (50, "good", False),
            (100, "good", False),
            (150, "good", True),
            (200, "unfinished", False),
        ]
        assert rows[2]["url"] == str(run / "attempt-0002/step-00000150")
        assert rows[2]["bytes"] == (run / "attempt-0002/step-00000150/rank-00000/data.pack").stat().st_size
        assert rows[2]["metrics"] == {"loss": 1 / 150}
        assert rows[3]["created"] is None

    def test_what_is_wrong_with_each(self, call: Call, run: Path, newest: Path) -> None:
        """A checkpoint that was marked bad, cannot be read, is of another version, or whose save failed."""
        (newest / "bad.json").write_bytes(
            records.encode({"error": f"{newest}: the chunk of 'x' is corrupt"})
        )
        (run / "attempt-0001/step-00000100" / MANIFEST).write_text("{")
        change(run / "attempt-0001/step-00000050" / MANIFEST, lambda m: m.update(format="shardckpt/9"))
        failed = run / "attempt-0002/step-00000200/failed.json"
        failed.write_bytes(records.encode({"id": "x", "error": "StorageFullError: no\x1b[31m space"}))
        code, out, _ = call("ls", run, "--json")
        rows = json.loads(out)["checkpoints"]
        assert [row["state"] for row in rows] == ["other version", "invalid", "bad", "failed"]
        assert rows[2]["note"] == "the chunk of 'x' is corrupt"
        assert not any(row["newest"] for row in rows)
        code, out, _ = call("ls", run)
        assert code == 0
        assert "\x1b" not in out
        assert "no\\x1b[31m space" in out

    def test_one_checkpoint(self, call: Call, newest: Path, tmp_path: Path) -> None:
        """In a run, and on its own."""
        assert json.loads(call("ls", newest, "--json")[1])["checkpoints"][0]["step"] == 150
        shutil.copytree(newest, tmp_path / "alone")
        _, out, _ = call("ls", tmp_path / "alone")
        assert len(out.splitlines()) == 2

    @pytest.mark.parametrize("there", ["nothing", "a folder", "another folder", "a file", "a job"])
    def test_not_a_run(self, call: Call, tmp_path: Path, there: str) -> None:
        url = tmp_path / "x"
        if there in ("a folder", "another folder"):
            url.mkdir()
        if there == "another folder":
            (url / "file").touch()
        if there == "a file":
            url.touch()
        if there == "a job":
            (url / "attempt-0001").mkdir(parents=True)
            (url / "attempt-0001/attempt.json").touch()
        code, out, err = call("ls", url)
        kind = "it is a file of 0 bytes, of no kind that is known here"
        kinds = {"another folder": "it has file, but no manifest.json", "a file": kind}
        found = f"{kinds.get(there, 'nothing is there')}. Check the URL."
        if there == "a job":
            found = "jobs have begun there, and none of them has saved a checkpoint yet."
        assert (code, out) == (3, "")
        assert err == f"shardckpt: {url} is neither a run with checkpoints nor a checkpoint: {found}\n"


class TestInfo:
    def test_tensors_of_one_kind_share_a_row(self, call: Call, run: Path) -> None:
        """Names that differ in numbers only, so that ten thousand tensors fit on a screen."""
        code, out, _ = call("info", run)
        assert code == 0
        assert re.search(r"^checkpoint +\S+/attempt-0002/step-00000150$", out, re.MULTILINE)
        assert re.search(r"^step +150$", out, re.MULTILINE)
        assert re.search(r"^tensors +9 tensors, 1\.1 KiB$", out, re.MULTILINE)
        assert re.search(r"^model/\{0\.\.3\}\.weight +8x8 +float32 +4 +1\.0 KiB +4$", out, re.MULTILINE)
        assert re.search(r"^sampler/position +1500$", out, re.MULTILINE)
        assert re.search(r"^rng +one for each rank$", out, re.MULTILINE)

    def test_all_has_a_row_for_each(self, call: Call, run: Path) -> None:
        _, out, _ = call("info", run, "--all")
        assert all(
            re.search(rf"^model/{i}\.bias +8 +float32 +32 B +1$", out, re.MULTILINE) for i in range(4)
        )

    def test_select(self, call: Call, run: Path) -> None:
        """By pattern, of tensors and of values."""
        _, out, _ = call("info", run, "--select", "model/[12].*", "--select", "*position")
        names = re.findall(r"^(\S+/\S+) ", out, re.MULTILINE)
        assert names == [
            "model/1.weight",
            "model/1.bias",
            "model/2.weight",
            "model/2.bias",
            "sampler/position",
        ]
        _, out, _ = call("info", run, "--select", "model/0*", "--json")
        document = json.loads(out)
        assert [tensor["name"] for tensor in document["tensors"]] == ["model/0.weight", "model/0.bias"]
        assert "values" not in document

    def test_json(self, call: Call, newest: Path) -> None:
        code, out, _ = call("info", newest, "--json")
        document = json.loads(out)
        assert code == 0
        assert document["url"] == str(newest)
        assert (document["step"], document["attempt"], document["world_size"]) == (150, 2, 1)
        assert document["tensors"][0] == {
            "name": "model/0.weight",
            "shape": [8, 8],
            "dtype": "float32",
            "bytes": 256,
            "chunks": 1,
        }
        assert document["values"]["sampler"] == {"position": 1500}

    def test_ten_thousand_tensors(self, call: Call, tmp_path: Path) -> None:
        """A few rows, quickly."""
        state = {f"layers.{i}": {k: torch.ones(2) for k in "qkvo"} for i in range(2500)}
        shardckpt.save(tmp_path / "many", {"model": state, "names": [f"layer {i}" for i in range(10_000)]})
        code, out, _ = call("info", tmp_path / "many")
        assert code == 0
        assert re.search(
            r"^model/layers\.\{0\.\.2499\}/q +2 +float32 +2,500 +19\.5 KiB +2,500$", out, re.MULTILINE
        )
        assert re.search(r"^names +\['layer 0', .* \.\.\. \(10,000 items\)$", out, re.MULTILINE)
        assert max(map(len, out.splitlines())) < 150
        assert len(out.splitlines()) < 20

    def test_a_pattern_that_matches_nothing(self, call: Call, run: Path) -> None:
        code, out, err = call("info", run, "--select", "modle/*")
        assert (code, out) == (2, "")
        assert "nothing in" in err and "'modle/*'" in err and "model/0.weight" in err


class TestVerify:
    def test_a_good_one(self, call: Call, run: Path, newest: Path) -> None:
        code, out, err = call("verify", run)
        assert (code, err) == (0, "")
        assert out.startswith(f"{newest} is good: 9 chunks, 1.1 KiB, every checksum is right")

    def test_names_every_bad_chunk(self, call: Call, newest: Path) -> None:
        """Not the first only."""
        offsets = shardckpt.open(newest).manifest.chunks.offset
        flip(newest / "rank-00000/data.pack", offsets[1])
        flip(newest / "rank-00000/data.pack", offsets[4] + 3)
        code, out, _ = call("verify", newest)
        assert code == 4
        assert f"{newest} is corrupt: 2 problems in 9 chunks" in out
        assert "the chunk of 'model/0.bias' at [0], shape [8] (pack rank-00000/data.pack, byte 320)" in out
        assert "the chunk of 'model/2.weight' at [0, 0]" in out
        code, out, _ = call("verify", newest, "--json")
        document = json.loads(out)
        assert (code, document["ok"], len(document["problems"])) == (4, False, 2)

    def test_a_checksum_in_the_pack(self, call: Call, newest: Path) -> None:
        """The four bytes after a chunk, which plain Zarr goes by."""
        flip(newest / "rank-00000/data.pack", shardckpt.open(newest).manifest.chunks.offset[0] + 256)
        assert call("verify", newest)[0] == 4

    def test_a_truncated_pack(self, call: Call, newest: Path) -> None:
        pack = newest / "rank-00000/data.pack"
        whole = pack.stat().st_size
        os.truncate(pack, 400)
        code, out, _ = call("verify", newest)
        assert code == 4
        assert f"the pack rank-00000/data.pack has 400 bytes and should have {whole}" in out
        assert "'model/1.weight'" in out
        pack.unlink()
        code, out, _ = call("verify", newest)
        assert code == 4
        assert "the pack rank-00000/data.pack is missing" in out

    @pytest.mark.parametrize(
        ("edit", "text"),
        [
            (
                lambda refs: refs["refs"]["model/0.weight/c/0/0"].__setitem__(1, 64),
                "'model/0.weight/c/0/0'",
            ),
            (lambda refs: refs["refs"].pop("model/1.bias/c/0"), "'model/1.bias/c/0'"),
            (lambda refs: refs["refs"].update(extra="{}"), "'extra'"),
            (lambda refs: refs["refs"].update({"model/zarr.json": "{}"}), "'model/zarr.json'"),
            (
                lambda refs: refs["refs"]["model/0.bias/c/0"].__setitem__(0, "{{u}}/other"),
                "'model/0.bias/c/0'",
            ),
            (lambda refs: refs.pop("refs"), "is not a reference file"),
        ],
    )
    def test_references_that_disagree(
        self, call: Call, newest: Path, edit: Callable[[Any], object], text: str
    ) -> None:
        change(newest / REFS, edit)
        code, out, _ = call("verify", newest)
        assert code == 4
        assert REFS in out and text in out

    def test_references_that_are_missing(self, call: Call, newest: Path) -> None:
        (newest / REFS).unlink()
        code, out, _ = call("verify", newest)
        assert code == 4
        assert "refs.json is missing" in out

    def test_a_moved_checkpoint_is_good(self, call: Call, newest: Path, made: Path) -> None:
        """Only plain Zarr needs to be told: that is a note, and not damage."""
        code, out, _ = call("verify", newest)
        assert code == 0
        assert (
            f"refs.json is for {made}/attempt-0002/step-00000150, from where it was moved or copied" in out
        )
        assert "note:" not in call("verify", made)[1]


class TestMerge:
    def test_weights_of_the_model(self, call: Call, run: Path, tmp_path: Path) -> None:
        code, out, err = call("merge", run, tmp_path / "w.safetensors", "--only", "model")
        assert (code, out, err) == (0, f"{tmp_path}/w.safetensors: 8 tensors, 1.7 KiB\n", "")
        found = safetensors.torch.load_file(tmp_path / "w.safetensors")
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).load_state_dict(found)

    def test_everything(self, call: Call, newest: Path, tmp_path: Path) -> None:
        code, out, _ = call("merge", newest, tmp_path / "w.pt", "--json")
        document = json.loads(out)
        assert (code, document["url"], document["tensors"]) == (0, str(newest), 9)
        assert document["bytes"] == (tmp_path / "w.pt").stat().st_size
        found = torch.load(tmp_path / "w.pt", weights_only=True)
        assert found["sampler"] == {"position": 1500}
        assert found["rng"][0].tolist() == [0, 1, 2]

    def test_select_and_force(self, call: Call, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "w.safetensors"
        assert call("merge", run, out)[0] == 0
        code, _, err = call("merge", run, out, "--select", "model/0.*")
        assert code == 6
        assert err == f"shardckpt: {out} exists already; it was left as it is. Replace it with --force\n"
        assert call("merge", run, out, "--select", "model/0.*", "--force")[0] == 0
        assert set(safetensors.torch.load_file(out)) == {"model/0.weight", "model/0.bias"}


class TestReshardAndCopy:
    def test_reshard(self, call: Call, newest: Path, tmp_path: Path) -> None:
        code, out, err = call("reshard", newest, tmp_path / "out", "--world-size", 3)
        assert (code, err) == (0, "")
        assert out.startswith(f"{tmp_path}/out: 3 ranks, ")
        assert call("verify", tmp_path / "out")[0] == 0
        assert len(list((tmp_path / "out").glob("rank-*/data.pack"))) == 3
        code, out, err = call("reshard", newest, tmp_path / "out", "--world-size", 2)
        assert code == 6
        assert "has a checkpoint already" in err

    def test_reshard_says_what_has_no_place(self, call: Call, newest: Path, tmp_path: Path) -> None:
        """A world of one has no place for the values of rank 1."""

        def second_rank(manifest: Any) -> None:
            manifest["per_rank"].append({"rng": [1, 2]})
            manifest["world_size"] = 2

        change(newest / MANIFEST, second_rank)
        code, out, err = call("reshard", newest, tmp_path / "out", "--world-size", 1, "--json")
        assert code == 0
        assert json.loads(out)["dropped_ranks"] == [1]
        assert err == "shardckpt: the PerRank values of ranks 1 have no place in it\n"

    def test_by_way_of_s3(self, call: Call, run: Path, tmp_path: Path, s3: tuple[str, list[str]]) -> None:
        """Every command takes a URL, with the endpoint from the command line."""
        url, endpoint = s3
        code, out, _ = call("copy", run, url, *endpoint)
        assert (code, out) == (0, f"{url}/attempt-0002/step-00000150\n")
        assert [
            row["newest"] for row in json.loads(call("ls", url, "--json", *endpoint)[1])["checkpoints"]
        ] == [True]
        assert json.loads(call("info", url, "--json", *endpoint)[1])["step"] == 150
        assert call("verify", url, *endpoint)[0] == 0
        assert call("merge", url, tmp_path / "w.pt", *endpoint)[0] == 0
        assert call("reshard", url, f"{url}-3", "--world-size", 3, *endpoint)[0] == 0
        assert call("reshard", f"{url}-3", tmp_path / "back", "--world-size", 1, *endpoint)[0] == 0
        assert call("verify", tmp_path / "back")[0] == 0
        code, _, err = call("ls", f"{url}-nothing", *endpoint)
        assert code == 3
        assert "nothing is there" in err


@pytest.fixture
def s3(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """A URL, and what a command needs to reach it; credentials come from the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto_s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto_s3.options["secret"])
    return moto_s3.url("cli"), ["--endpoint-url", moto_s3.endpoint]


class TestErrors:
    """One line on stderr, nothing on stdout, and an exit code that says what can be done."""

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["lss"], "unknown command 'lss'; did you mean ls?"),
            (["verfiy", "x"], "unknown command 'verfiy'; did you mean verify?"),
            (
                ["zzz"],
                "unknown command 'zzz'. The commands are ls, info, verify, merge, reshard, copy, refs",
            ),
            (["--jsn"], "unknown option --jsn"),
            (["ls"], "the following arguments are required: RUN. shardckpt ls --help"),
            (["ls", "a", "b"], "ls: one argument too many: b"),
            (["ls", "a", "--jsno"], "ls: unknown option --jsno; did you mean --json?"),
            (["ls", "a", "--sort"], "ls: unknown option --sort. shardckpt ls --help shows what it takes"),
            (["diff", "a", "b"], "unknown command 'diff'. The commands are"),
            (["merge", "a", "b.zip"], "OUT must end with .safetensors or .pt, not like 'b.zip'"),
            (["merge", "a", "s3://b/c.pt"], "merge writes a local file, not s3://b/c.pt"),
            (["reshard", "a", "b"], "the following arguments are required: --world-size"),
            (["reshard", "a", "b", "--world-size", "0"], "must be a whole number of 1 or more, not '0'"),
            (["reshard", "a", "b", "--world-size", "x"], "must be a whole number of 1 or more, not 'x'"),
            (["ls", "a", "--endpoint-url", "http://127.0.0.1:1"], "--endpoint-url is for s3:// URLs"),
            (
                ["copy", "a", "b", "--endpoint-url", "http://127.0.0.1:1"],
                "--endpoint-url is for s3:// URLs",
            ),
        ],
    )
    def test_the_command_line(self, call: Call, arguments: list[str], text: str) -> None:
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("shardckpt: ") and text in err
        assert err.count("\n") == 1

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


def rest(command: str, folder: Path) -> list[object]:
    """What a command needs beside the checkpoint, to write below a folder."""
    return {
        "merge": [folder / "out.pt"],
        "reshard": [folder / "out", "--world-size", 2],
        "copy": [folder / "out"],
    }.get(command, [])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint that takes a while to merge."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    shardckpt.save(folder, {str(i): torch.zeros(8 << 20) for i in range(8)})
    yield folder
    shutil.rmtree(folder)


class TestAsAProcess:
    def test_help(self) -> None:
        """Without arguments it says what there is; each command has its own, with the exit codes."""
        done = subprocess.run(
            [sys.executable, "-m", "shardckpt"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert all(f"  {command} " in done.stdout for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_of_a_command(self, call: Call, command: str) -> None:
        code, out, err = call(command, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: shardckpt {command}")
        assert "exit codes:" in out and "--json" in out and "--endpoint-url" in out

    def test_version(self, call: Call) -> None:
        assert call("--version") == (0, f"shardckpt {shardckpt.__version__}\n", "")

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

    def test_on_a_terminal(self, made: Path) -> None:
        """Colour for the newest, and no markup of names is obeyed."""
        out = on_terminal("ls", str(made))
        assert "\x1b[" in out
        assert re.search(r"\* +2 +150 ", re.sub(r"\x1b\[[0-9;]*m", "", out))


def on_terminal(*arguments: str) -> str:
    """What a command prints on a terminal of 100 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    child = subprocess.Popen(
        [sys.executable, "-m", "shardckpt", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    said = b""
    while select.select([master], [], [], 30)[0]:
        try:
            piece = os.read(master, 4096)
        except OSError:  # how Linux tells that the other side is closed
            break
        if not piece:
            break
        said += piece
    os.close(master)
    assert child.wait(30) == 0
    return said.decode()


class TestWords:
    def test_sizes(self) -> None:
        assert [size(n) for n in (0, 999, 1000, 1536, 150 << 20, 3 << 40, 5000 << 40)] == [
            "0 B",
            "999 B",
            "1.0 KiB",
            "1.5 KiB",
            "150 MiB",
            "3.0 TiB",
            "5000 TiB",
        ]

    def test_ages(self) -> None:
        assert [age(s) for s in (-1, 59, 119, 120, 7200, 200_000)] == [
            "0 s",
            "59 s",
            "119 s",
            "2 min",
            "2 h",
            "2 d",
        ]

    def test_what_a_terminal_would_obey(self) -> None:
        assert printable("a\x1b]0;x\x07\u202e\n") == "a\\x1b]0;x\\x07\\u202e\\n"
        assert printable("ü [bold]") == "ü [bold]"

    def test_columns_without_content_are_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        from shardckpt.cli.output import Column

        print_table((Column("A", number=True), Column("B"), Column("C")), [("1", "", "x"), ("20", "", "")])
        assert capsys.readouterr().out == " A  C\n 1  x\n20\n"


@pytest.fixture
def small_disk(tmp_path: Path, mounts: Mount) -> Path:
    """A file system with 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts("tmpfs", folder, "size=4m")
    return folder


def test_info_of_integers_that_python_does_not_write(call: Call, tmp_path: Path) -> None:
    """In decimal digits it writes no more than some thousand."""
    huge = 1 << 20_000
    state = {"n": huge, "set": {huge}}
    shardckpt.save(tmp_path / "c", state)
    code, out, err = call("info", tmp_path / "c")
    assert (code, err) == (0, "")
    assert "0x1000" in out
    assert "too long to be shown" in out
