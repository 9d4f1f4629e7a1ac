"""Settings: where they come from, and which source takes precedence."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import parse
from launcher.config.settings import settings_from_environ
from launcher.errors import UsageError

pytestmark = pytest.mark.usefixtures("folder")


def test_flag_beats_environment_beats_file_beats_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.yaml").write_text("nproc: 2\nmax_restarts: 2\ngrace: 2\npreload: [json, csv]\n")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    monkeypatch.setenv("PET_MAX_RESTARTS", "4")
    config = parse(["--config", "c.yaml", "--nproc", "5", "train.py"])
    assert (config.nproc, config.max_restarts, config.grace) == (5, 4, 2.0)
    assert config.preload == ("json", "csv")
    assert config.role == "default"


def test_mistakes_in_an_overridden_source_are_found(folder: Path) -> None:
    (folder / "c.yaml").write_text("nproc: none\n")
    with pytest.raises(UsageError, match=r"c\.yaml:1: nproc: expected a number .* found 'none'"):
        parse(["--config", "c.yaml", "--nproc", "5", "train.py"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nproc: 2\nmax_restart: 3\n", r"c.yaml:2: unknown option max_restart: did you mean max-res"),
        ("nproc: 2\nnproc: 3\n", r"c.yaml:2: nproc is given twice"),
        ("nproc: [1, 2\n", r"c.yaml is not YAML: .*line 2"),
        ("- nproc\n", r"expected lines like `nproc: 8`"),
        ("nproc: {a: 1}\n", r"c.yaml:1: nproc: expected one value or a list"),
        ("grace: soon\n", r"c.yaml:1: grace: expected a number of seconds, 0 or more, found 'soon'"),
        ("cold: maybe\n", r"c.yaml:1: cold: expected true or false, found 'maybe'"),
        ("config: d.yaml\n", r"c.yaml:1: config belongs on the command line"),
        ("help: true\n", r"c.yaml:1: help belongs on the command line"),
        ("rdzv_conf: a=1\n", r"c.yaml:1: rdzv_conf: expected keys of .*join_timeout.* found 'a=1'"),
        ("logs_specs: x\n", r"c.yaml:1: logs_specs is not supported by launch: there are no log plugins"),
    ],
)
def test_bad_files(folder: Path, text: str, message: str) -> None:
    (folder / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        parse(["--config", "c.yaml", "train.py"])


def test_the_example_file_is_valid() -> None:
    example = Path(__file__).parents[3] / "configs/launch.yaml"
    assert parse(["--config", str(example), "train.py"]).max_restarts == 10


def test_an_empty_file(folder: Path) -> None:
    (folder / "c.yaml").write_text("# nothing\n")
    assert parse(["--config", "c.yaml", "train.py"]).nproc == 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_files(folder: Path, content: bytes | None) -> None:
    if content is not None:
        (folder / "c.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"c\.yaml cannot be read"):
        parse(["--config", "c.yaml", "train.py"])


def test_environment_of_torchrun_is_read() -> None:
    settings = settings_from_environ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "NNODES": "9"})
    assert {(setting.option.name, setting.text) for setting in settings} == {
        ("nnodes", "2"),
        ("nproc", "4"),
    }


def test_pet_mistakes_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "two")
    with pytest.raises(UsageError, match="PET_NNODES in the environment: expected a number of nodes"):
        parse(["train.py"])
