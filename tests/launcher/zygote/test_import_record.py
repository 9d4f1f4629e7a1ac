"""The record of what workers have imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.zygote.fork_safety import is_fork_safe
from launcher.zygote.import_record import ImportRecord, ImportRecorder, import_recorded


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        json.dumps({"python": sys.version, "packages": {}}).encode(),
        json.dumps({"python": "2.7", "packages": {}, "names": ["torch.nn"]}).encode(),
        json.dumps({"python": sys.version, "packages": [], "names": ["torch.nn"]}).encode(),
        json.dumps({"python": sys.version, "packages": {}, "names": [7]}).encode(),
        json.dumps({"python": sys.version, "packages": {}, "names": ["torch; exit()"]}).encode(),
    ],
)
def test_what_is_no_record_of_this_interpreter_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "imports.json").write_bytes(content)
    assert ImportRecord.read(str(tmp_path / "imports.json")) == ImportRecord(sys.version, {}, [])


def test_only_well_known_packages_that_have_not_changed_are_imported(tmp_path: Path) -> None:
    """A record that names others, or others' versions, has no effect."""
    record = ImportRecord(sys.version, {"json": ["x"], "torch": ["other", 1, 1]}, ["json.tool", "torch.nn"])
    record.write(str(tmp_path / "imports.json"))
    assert ImportRecord.read(str(tmp_path / "imports.json")) == record
    assert import_recorded(str(tmp_path / "imports.json")) == []
    assert import_recorded(str(tmp_path / "missing.json")) == []


def test_a_recorder_writes_while_imports_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the record is there even if the worker is killed. Modules that could not be imported are left out."""
    package = tmp_path / "torchmetrics"
    package.mkdir()
    for name in ("__init__", "first", "second"):
        (package / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    now = 0.0
    path = tmp_path / "imports.json"
    recorder: Any = ImportRecorder(str(path), ["torchmetrics.known"], {}, [str(tmp_path)], lambda: now)
    monkeypatch.setattr(sys, "meta_path", [recorder, *sys.meta_path])
    __import__("torchmetrics.first")
    assert not path.exists()
    now = 1.0
    with pytest.raises(ImportError):
        __import__("torchmetrics.missing")
    names = ["torchmetrics.known", "torchmetrics", "torchmetrics.first"]
    assert json.loads(path.read_text())["names"] == names
    __import__("torchmetrics.second")
    recorder.write()
    assert json.loads(path.read_text())["names"] == [*names, "torchmetrics.second"]
    assert ImportRecord.read(str(path)).valid_names([str(tmp_path)]) == [*names, "torchmetrics.second"]
    assert ImportRecord.read(str(path)).valid_names([]) == []
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        del sys.modules[name]


def test_what_fails_in_a_fork_is_not_safe() -> None:
    assert is_fork_safe(lambda: None)
    assert not is_fork_safe(lambda: 1 / 0)
