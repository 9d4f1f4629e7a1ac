"""GPUs, counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.system.devices import count_gpus


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices of the driver, of which CUDA_VISIBLE_DEVICES leaves those before its first mistake."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("")
    (tmp_path / "torch/version.py").write_text("cuda: str | None = '12.6'\n")
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert count_gpus({}, tmp_path) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, tmp_path) == 1
    for name in ("a", "b", "c"):
        (tmp_path / "proc/driver/nvidia/gpus" / name).mkdir(parents=True)
    assert count_gpus({}, tmp_path) == 3
    (tmp_path / "torch/version.py").write_text("cuda: str | None = None\n")
    assert count_gpus({}, tmp_path) == 0
