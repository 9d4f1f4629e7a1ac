"""The command line: what is refused, what is suggested, what the help says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shardckpt
from tests.shardckpt.cli.helpers import COMMANDS, Call, rest


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
        (["--versoin"], "unknown option --versoin; did you mean --version?"),
        (["--print-completion", "tcl"], "invalid choice: 'tcl'"),
        (["ls"], "the following arguments are required: RUN. shardckpt ls --help"),
        (["ls", "a", "b"], "ls: one argument too many: b"),
        (["ls", "a", "--jsno"], "ls: unknown option --jsno; did you mean --json?"),
        (["ls", "a", "--sort"], "ls: unknown option --sort. shardckpt ls --help shows what it takes"),
        (["reshard", "a", "b", "--dry-run"], "required: --world-size"),
        (["copy", "a", "b", "--dry-run"], "copy: unknown option --dry-run. shardckpt copy --help"),
        (["diff", "a", "b"], "unknown command 'diff'. The commands are"),
        (["merge", "a", "b.zip"], "OUT must end with .safetensors or .pt, not like 'b.zip'"),
        (["merge", "a", "s3://b/c.pt"], "merge writes a local file, not s3://b/c.pt"),
        (["reshard", "a", "b"], "the following arguments are required: --world-size"),
        (["reshard", "a", "b", "--world-size", "0"], "must be a whole number of 1 or more, not '0'"),
        (["reshard", "a", "b", "--world-size", "x"], "must be a whole number of 1 or more, not 'x'"),
        (["ls", "a", "--endpoint-url", "http://127.0.0.1:1"], "--endpoint-url is for s3:// URLs"),
        (["copy", "a", "b", "--endpoint-url", "http://127.0.0.1:1"], "--endpoint-url is for s3:// URLs"),
    ],
)
def test_what_is_refused(call: Call, arguments: list[str], text: str) -> None:
    """One line on stderr that names the mistake; a name is suggested only if it is spelt like the given one."""
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("shardckpt: ") and text in err
    assert err.count("\n") == 1


def test_help_lists_the_commands_and_exit_codes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --help it succeeds; without any argument it is an error that prints the same."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert max(map(len, out.splitlines())) <= 80
    assert "exit codes:" in out and "AWS_PROFILE" in out
    assert call() == (2, out, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(call: Call, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own arguments and fields, not what holds for all commands; no line is wider than 80."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: shardckpt {command}")
    assert "--json" in out and "--endpoint-url" in out
    assert "AWS_PROFILE" not in out and "Ctrl-C" not in out
    assert "exit codes: shardckpt --help" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_fields_of_the_json_document(
    call: Call, run: Path, tmp_path: Path, command: str
) -> None:
    """All of them, at every level that is the same for each checkpoint."""
    code, out, _ = call(command, run, *rest(command, tmp_path), "--json")
    fields = call(command, "--help")[1].partition("fields of --json:")[2].replace(",", " ").split()
    assert code == 0
    assert set(_keys(json.loads(out))) <= set(fields)


def _keys(document: Any) -> Iterator[str]:
    if isinstance(document, list):
        for item in document:
            yield from _keys(item)
    elif isinstance(document, dict):
        for name, value in document.items():
            yield name
            if name not in ("metrics", "values", "per_rank"):
                yield from _keys(value)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(call: Call, shell: str) -> None:
    """A script that knows every command and its options."""
    pytest.importorskip("shtab")
    code, out, err = call("--print-completion", shell)
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)
    assert "world-size" in out


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"shardckpt {shardckpt.__version__}\n", "")
